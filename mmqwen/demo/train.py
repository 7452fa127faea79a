"""Trains the demo's model from scratch: a small Qwen3 and the projectors of both modalities."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mmqwen import training
from mmqwen.checkpoint import UntrainedProjectorsWarning, build_checkpoint
from mmqwen.data import DatasetWriter
from mmqwen.demo import digits
from mmqwen.demo.digits import Sample
from mmqwen.hf import MultimodalQwen3ForConditionalGeneration, MultimodalQwen3Processor
from mmqwen.training import TrainSettings
from mmqwen.training.meter import without_file_bars

KINDS = (0, 0, 1, 0, 0, 2, 0, 0)
"""Turns of the samples that follow one another; 0 is a prompt."""
COPIES = 3
"""How often each digit is written, each time with other noise and words."""
TOKENS_PER_STEP = 512
LEARNING_RATE = 2e-3
MAX_THREADS = 4
"""The matrices are small: more threads wait for one another longer than they compute."""
INITIALIZER_RANGE = 0.15
"""Qwen3's own 0.02 suits wide models; at width 128 it spends 100 of 300 steps on a plateau."""
NOISE = 0.1
"""Spread of the noise added to training rows: 1437 images are few enough to learn by heart."""


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        output: folder of the checkpoint.
        accuracy: share of the held-out digits that the model reads right, by transformers.
        seconds: time that the training steps took.
        steps: how many they were.
        losses: the loss of each.
        parameters: number of trained parameters.
    """

    output: Path
    accuracy: float
    seconds: float
    steps: int
    losses: list[float]
    parameters: int


@dataclass(frozen=True)
class Answers:
    """A model's reading of some digits, as `[n]` tensors in their order.

    Attributes:
        token_ids: the most probable next token of each prompt.
        logprobs: `[n, V]`, log-probabilities of all tokens.
        correct: whether the token spells the label.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    correct: torch.Tensor

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


def make_base(folder: Path, seed: int = 0) -> None:
    """Write a fresh text model of 3 layers of width 128, and its tokenizer."""
    tokenizer = digits.make_tokenizer()
    config = Qwen3Config(
        vocab_size=math.ceil(len(tokenizer) / 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=digits.MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_dataset(folder: Path, samples: Sequence[Sample], count: int, seed: int = 0) -> None:
    """Write digits, with noise, as samples of three kinds: prompts, questions, conversations.

    Args:
        folder: directory to create.
        samples: the digits; when all have come, they come again, with other noise.
        count: digits to write.
        seed: of the order, the noise and the wording.
    """
    rng = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(
        rng.permutation(len(samples)).tolist() for _ in itertools.count()
    )

    def noisy(rows: torch.Tensor) -> torch.Tensor:
        return rows + NOISE * torch.from_numpy(rng.standard_normal(rows.shape, dtype=np.float32))

    with DatasetWriter(folder, digits.MODALITIES) as writer:
        markers = [spec.token for spec in writer.specs.values()]
        for turns in itertools.cycle(KINDS):
            group = [samples[next(order)] for _ in range(turns or 1)]
            items = {name: [noisy(s.items[name]) for s in group] for name in writer.specs}
            if turns == 0:
                writer.add(digits.PROMPT, f" {group[0].label}", items)
            else:
                writer.add_messages(_conversation(group, markers, rng), items)
            count -= len(group)
            if count <= 0:
                return


def _conversation(
    group: Sequence[Sample], markers: Sequence[str], rng: np.random.Generator
) -> list[dict[str, str]]:
    messages = []
    for sample in group:
        # Servers and clients join the parts of a message in different ways.
        parts = rng.permutation(markers).tolist()
        parts.insert(2 * rng.integers(2), str(rng.choice(digits.QUESTIONS)))
        content = str(rng.choice(["", " ", "\n"])).join(parts)
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": str(sample.label)})
    return messages


def train(
    output: str | os.PathLike[str],
    *,
    steps: int = 300,
    seed: int = 0,
    console: Console | None = None,
) -> TrainResult:
    """Train on 1437 digits, read the 360 others, and save a composite checkpoint.

    Takes some 50 s where other processes keep two cores busy.

    Args:
        output: folder to write; made if it is not there.
        steps: of some 22 digits each.
        seed: of the weights, the split and the order.
        console: a progress bar is shown if there is one.

    Raises:
        OSError: the folder cannot be written.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    train_samples, test_samples = digits.load(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, MAX_THREADS))
    try:
        with TemporaryDirectory() as scratch, without_file_bars():
            folder = Path(scratch)
            make_base(folder / "base", seed)
            write_dataset(folder / "data", train_samples, COPIES * len(train_samples), seed)
            with warnings.catch_warnings(action="ignore", category=UntrainedProjectorsWarning):
                build_checkpoint(folder / "base", digits.MODALITIES, folder / "start", seed=seed)
            settings = TrainSettings(
                model=str(folder / "start"),
                data=str(folder / "data"),
                output=str(folder / "trained"),
                stage="full",
                max_steps=steps,
                lr=LEARNING_RATE,
                tokens_per_step=TOKENS_PER_STEP,
                warmup=0.07,
                weight_decay=0.05,
                seed=seed,
                save_steps=steps,
                log_steps=1,
                cpu=True,
                progress=console is not None,
            )
            shutil.copytree(training.train(settings), output, dirs_exist_ok=True)
            model = MultimodalQwen3ForConditionalGeneration.from_pretrained(output).eval()
        accuracy = answer(model, digits.make_tokenizer(), test_samples).accuracy
    finally:
        torch.set_num_threads(threads)
    report = json.loads((output / "training.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in report["log"] if "loss" in entry]
    seconds = report["log"][-1]["train_runtime"]
    return TrainResult(output, accuracy, seconds, report["steps"], losses, model.num_parameters())


@torch.inference_mode()
def answer(
    model: MultimodalQwen3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
) -> Answers:
    """Read digits with the transformers model, in one padded batch."""
    processor = MultimodalQwen3Processor(tokenizer, model.config.modalities)
    batch = processor([sample.prompt for sample in samples]).to(model.device)
    logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
    logprobs = logits.float().log_softmax(-1).cpu()
    token_ids = logprobs.argmax(-1)
    expected = torch.tensor([tokenizer(f" {s.label}")["input_ids"][0] for s in samples])
    return Answers(token_ids, logprobs, token_ids == expected)
