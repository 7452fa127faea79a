"""The demonstration: train on digits, serve the held-out ones through vLLM, compare, draw."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mmqwen.demo import digits
from mmqwen.demo.digits import Sample
from mmqwen.demo.train import Answers, answer, train
from mmqwen.training.meter import without_file_bars

PICTURE_FILE = "digits.png"
GRID = (4, 8)
MIN_ACCURACY = 0.95
MAX_LOGPROB_DIFF = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest difference of a chosen token's log-probability that passes, by dtype.

Within it, two answers are tied, and either may be given.
"""

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Defaults of the process; what the user has set stays."""


@dataclass(frozen=True)
class Served:
    """What vLLM answered.

    Attributes:
        texts: the text of each answer.
        token_ids: `[n]`, the first token of each answer.
        logprobs: `[n]`, its log-probability.
        start_seconds: time to load the checkpoint and start the engine.
        seconds: time to answer all prompts.
    """

    texts: list[str]
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    start_seconds: float
    seconds: float


@dataclass(frozen=True)
class Agreement:
    """How far two engines differ on the same prompts.

    Attributes:
        logprob_diff: largest difference of the log-probability of vLLM's token.
        different: number of prompts with different answers, ties apart.
    """

    logprob_diff: float
    different: int


def run(
    output: str | os.PathLike[str] = "demo-out",
    *,
    steps: int = 300,
    seed: int = 0,
    console: Console | None = None,
) -> int:
    """Run the whole demonstration; under 2 minutes on two CPU cores.

    Args:
        output: folder for the checkpoint and the picture.
        steps: training steps.
        seed: of the split, the weights and the order.
        console: where to print; the terminal unless given.

    Returns:
        The exit code: 0 if vLLM reads at least 95% of the held-out digits and agrees with
        transformers; else 1.
    """
    console = console or Console()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if find_spec("vllm") is None:
        console.print(
            "[red]vLLM is not installed:[/] pip install 'mmqwen\\[cpu]' or 'mmqwen\\[vllm]'"
        )
        return 1
    output = Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / ".writable").touch()
        (output / ".writable").unlink()
    except OSError as error:
        console.print(f"[red]cannot write to {output}:[/] {error}; choose another folder")
        return 1

    console.print(
        "[bold]1. Train[/] a Qwen3 of 3 layers and two projectors, from scratch, on handwritten "
        "digits. Each image is ragged rows of two modalities: "
        f"strokes (2 to 8 rows of {digits.STROKES_DIM}) and profile (2 rows of "
        f"{digits.PROFILE_DIM})."
    )
    checkpoint = output / "checkpoint"
    trained = train(checkpoint, steps=steps, seed=seed, console=console)
    _, samples = digits.load(seed)
    console.print(
        f"{trained.parameters:,} parameters in {trained.seconds:.1f} s; checkpoint: {checkpoint}\n"
        f"[bold]2. Read[/] the {len(samples)} held-out digits with transformers, the reference."
    )
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    reference, load_seconds, reference_seconds = read_by_transformers(
        checkpoint, samples, device, dtype
    )
    console.print(
        "[bold]3. Serve[/] the same checkpoint with vLLM: raw rows go in with the prompts, and are "
        "projected where a step places them among the token embeddings."
    )
    served = serve_by_vllm(checkpoint, samples, dtype)
    correct = [
        text.strip() == str(sample.label)
        for text, sample in zip(served.texts, samples, strict=True)
    ]
    accuracy = sum(correct) / len(correct)
    agreement = compare(reference, served, MAX_LOGPROB_DIFF[dtype])
    draw(samples, served.texts, output / PICTURE_FILE)

    table = Table(title=f"{len(samples)} held-out digits, {dtype} on {device}", title_style="bold")
    for column in ("", "transformers", "vLLM"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("accuracy", f"{reference.accuracy:.1%}", f"{accuracy:.1%}")
    table.add_row("wrong", str(int((~reference.correct).sum())), str(correct.count(False)))
    table.add_row("start, s", f"{load_seconds:.1f}", f"{served.start_seconds:.1f}")
    table.add_row("reading, s", f"{reference_seconds:.2f}", f"{served.seconds:.2f}")
    table.add_section()
    table.add_row("different answers", "", str(agreement.different))
    table.add_row("largest log-probability difference", "", f"{agreement.logprob_diff:.1e}")
    console.print(table)
    console.print(f"Picture: {output / PICTURE_FILE}")

    problems = judge(accuracy, agreement, MAX_LOGPROB_DIFF[dtype])
    for problem in problems:
        console.print(f"[red]FAILED:[/] {problem}")
    return 1 if problems else 0


def judge(accuracy: float, agreement: Agreement, tolerance: float) -> list[str]:
    """What is wrong with a result, in words; empty if nothing is."""
    problems = []
    if not accuracy >= MIN_ACCURACY:
        problems.append(f"vLLM reads {accuracy:.1%}, expected at least {MIN_ACCURACY:.0%}")
    if agreement.different:
        problems.append(f"vLLM and transformers give {agreement.different} different answer(s)")
    if not agreement.logprob_diff <= tolerance:
        problems.append(
            f"log-probabilities differ by {agreement.logprob_diff:.2e}, expected at most "
            f"{tolerance:.0e}"
        )
    return problems


def read_by_transformers(
    checkpoint: Path, samples: Sequence[Sample], device: str, dtype: str
) -> tuple[Answers, float, float]:
    """The reference's answers from the saved checkpoint, seconds to load it, and to read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    begin = time.perf_counter()
    with without_file_bars():
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    loaded = time.perf_counter()
    answers = answer(model, tokenizer, samples)
    return answers, loaded - begin, time.perf_counter() - loaded


def serve_by_vllm(checkpoint: Path, samples: Sequence[Sample], dtype: str) -> Served:
    """The answers of vLLM's offline engine, all prompts in one call."""
    if os.environ.get("VLLM_LOGGING_LEVEL") == "ERROR":
        logging.getLogger("vllm").setLevel(logging.ERROR)  # some speak before vLLM reads it
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    from vllm import LLM, SamplingParams

    from mmqwen.vllm_plugin import register

    register()  # vLLM's plugin loader does the same where the package is installed
    # Compiling, a CPU engine starts in 17 to 36 s (a busy two-core machine); eagerly, in 6.
    options: dict[str, Any] = (
        {"gpu_memory_utilization": 0.3} if torch.cuda.is_available() else {"enforce_eager": True}
    )
    begin = time.perf_counter()
    llm = LLM(
        model=str(checkpoint), dtype=dtype, max_model_len=512, use_tqdm_on_load=False, **options
    )
    started = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=2, logprobs=1)
    outputs = llm.generate([sample.prompt for sample in samples], params, use_tqdm=False)
    done = time.perf_counter()
    completions = [output.outputs[0] for output in outputs]
    token_ids = [completion.token_ids[0] for completion in completions]
    logprobs = [
        c.logprobs[0][token].logprob for c, token in zip(completions, token_ids, strict=True)
    ]
    shutdown = getattr(getattr(llm.llm_engine, "engine_core", None), "shutdown", None)
    if shutdown is not None:
        shutdown()
    return Served(
        [completion.text for completion in completions],
        torch.tensor(token_ids),
        torch.tensor(logprobs),
        started - begin,
        done - started,
    )


def compare(reference: Answers, served: Served, tolerance: float) -> Agreement:
    """Differences of vLLM from the reference.

    Args:
        reference: answers `[n]` with log-probabilities of all tokens `[n, V]`.
        served: vLLM's answers to the same prompts.
        tolerance: two tokens whose log-probabilities are this close are tied.
    """
    own = reference.logprobs.gather(1, served.token_ids[:, None]).squeeze(1)
    best = reference.logprobs.max(dim=1).values
    untied = (served.token_ids != reference.token_ids) & (best - own > tolerance)
    diff = (own - served.logprobs).abs()
    largest = float(diff.max()) if bool(diff.isfinite().all()) else math.inf
    return Agreement(largest, int(untied.sum()))


def draw(samples: Sequence[Sample], texts: Sequence[str], file: Path) -> None:
    """A grid of digits with their answers; wrong ones come first and are red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    answers = [text.strip() for text in texts]
    order = sorted(range(len(samples)), key=lambda at: answers[at] == str(samples[at].label))
    wrong = sum(answers[at] != str(samples[at].label) for at in order)
    rows, columns = GRID
    figure = Figure(figsize=(columns * 1.1, rows * 1.4 + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{wrong} of {len(samples)} held-out digits are read wrongly (red)")
    for at, axes in zip(order, figure.subplots(rows, columns).flat, strict=False):
        right = answers[at] == str(samples[at].label)
        axes.imshow(samples[at].image, cmap="gray_r", vmin=0, vmax=1)
        title = answers[at] if right else f"{answers[at] or '?'} (is {samples[at].label})"
        axes.set_title(title, color="black" if right else "red")
    for axes in figure.axes:
        axes.axis("off")
    figure.savefig(file, dpi=110)
