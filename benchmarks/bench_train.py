"""What training costs: tokens/s of `mmqwen train`, the padded way, and text of the same lengths.

    python benchmarks/bench_train.py --out train.json            # the published cases, one GPU
    torchrun --nproc-per-node 2 benchmarks/bench_train.py --cases 0.6B --out two.json

Samples are ragged: lengths lognormal (median 96, longest 900), a quarter prompt, half rows (768
wide), a quarter answer. Weights are random; a step costs the same. Each case trains for some steps
after a first one, which compiles, and reports the median over log windows. "padded" is Trainer with
the same model and samples padded to the longest of a batch; "text" is TRL's SFTTrainer (packing,
padding-free, fused head, Liger where it installs) over tokens in place of rows: with LoRA as ours
has it, or, beside stage projector, with a LoRA of rank 1 on the first layer alone, so that its
gradients take the same way down.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_vllm_prefill import text_fields
from timing import about

WIDTH = 768
LONGEST = 900
SAMPLES = 6_000


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        shape: of the text model.
        way: "ours", "padded" or "text".
        tokens: of a pass; for "padded" samples of a batch.
        options: further settings of `mmqwen train`.
        steps: measured steps.
    """

    shape: str
    way: str
    tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 20

    @property
    def name(self) -> str:
        extra = [f"{k}={v}" for k, v in self.options.items()]
        return " ".join([self.shape, self.way, str(self.tokens), *extra])


CASES = [
    Case("0.6B", "ours", 16_384),
    Case("0.6B", "text", 16_384),
    Case("0.6B", "ours", 32_768),
    Case("0.6B", "ours", 32_768, {"lean": True}),
    Case("0.6B", "padded", 16),
    Case("0.6B", "ours", 16_384, {"stage": "lora"}),
    Case("0.6B", "text", 16_384, {"stage": "lora"}),
    Case("8B", "ours", 8_192, steps=8),
    Case("8B", "text", 8_192, steps=8),
    Case("8B", "ours", 16_384, {"gradient_checkpointing": True}, steps=8),
    Case("8B", "text", 16_384, {"gradient_checkpointing": True}, steps=6),
    Case("8B", "ours", 8_192, {"stage": "lora"}, steps=8),
    Case("8B", "text", 8_192, {"stage": "lora"}, steps=8),
]


# -- what is trained on ------------------------------------------------------------------------


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words `w0`, `w1`, ... of one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocab_size - 300)}
    plain = Tokenizer(models.WordLevel(words, unk_token="w0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "pad_token": "<|pad|>"})
    tokenizer.save_pretrained(folder)


def write_base(folder: Path, shape: str, device: str) -> Path:
    """A random text model of a shape, and the composite checkpoint that is built over it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from mmqwen.checkpoint import build_checkpoint

    base = folder / f"{shape}-base"
    fields = text_fields(shape)
    config = Qwen3Config(**fields, max_position_embeddings=40_960, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(base)
    write_tokenizer(base, fields["vocab_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_checkpoint(base, {"m1": {"dim": WIDTH, "max_rows": LONGEST}}, folder / shape)


def draw_lengths(count: int) -> list[int]:
    """Tokens of each sample."""
    return np.random.default_rng(0).lognormal(4.6, 0.8, count).clip(8, LONGEST).astype(int).tolist()


def write_data(folder: Path, count: int, words: int) -> Path:
    """A dataset of ragged samples."""
    from mmqwen.data import DatasetWriter

    draw = np.random.default_rng(1)
    with DatasetWriter(folder / "data", {"m1": WIDTH}, dtype=torch.bfloat16) as writer:
        for length in draw_lengths(count):
            question, answer = max(1, length // 4), max(1, length // 4 - 1)
            rows = max(1, length - question - answer - 1)
            text = [f"w{i}" for i in draw.integers(0, words, question + answer)]
            prompt = " ".join(["<|m1|>", *text[:question]])
            writer.add(prompt, " " + " ".join(text[question:]), {"m1": [torch.randn(rows, WIDTH)]})
    return folder / "data"


# -- the ways ----------------------------------------------------------------------------------


def run_ours(case: Case, folder: Path) -> dict[str, Any]:
    """`mmqwen train` as a user calls it."""
    from mmqwen.training import TrainSettings, train

    output = folder / "ours"
    window = max(2, case.steps // 4)
    settings = TrainSettings(
        model=str(folder / case.shape),
        data=str(folder / "data"),
        output=str(output),
        tokens_per_step=case.tokens,
        max_steps=1 + case.steps,
        log_steps=window,
        save_steps=10_000,
        bf16=True,
        progress=False,
        validate=False,
        **{"compile": True, **case.options},
    )
    begin = time.perf_counter()
    train(settings)
    if int(os.environ.get("RANK", "0")):
        return {}
    report = json.loads((output / "training.json").read_text())
    shutil.rmtree(output)
    shutil.rmtree(settings.run_folder)
    log = [e for e in report["log"] if "tokens_per_second" in e][1:]
    return {
        "tokens_per_second": statistics.median(e["tokens_per_second"] for e in log),
        "windows": [e["tokens_per_second"] for e in log],
        "share_of_peak": statistics.median(e.get("share_of_peak", 0.0) for e in log),
        "padding": report["padding"],
        "memory_gb": max(e.get("memory_gb", 0.0) for e in log),
        "losses": [e["loss"] for e in log],
        "wall_s": time.perf_counter() - begin,
        **{key: report[key] for key in ("attention", "compiled", "liger")},
    }


class Clock:
    """Tokens between steps, of a loop that is not ours."""

    def __init__(self, warm: int) -> None:
        self.warm, self.seen, self.tokens, self.begin = warm, 0, 0, 0.0

    def step(self, tokens: int) -> None:
        """A step of so many tokens was queued."""
        self.seen += 1
        if self.seen == self.warm:
            torch.cuda.synchronize()
            self.begin = time.perf_counter()
        elif self.seen > self.warm:
            self.tokens += tokens

    def result(self) -> dict[str, Any]:
        """What was reached."""
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.begin
        memory = torch.cuda.max_memory_allocated() / 1e9
        return {"tokens_per_second": self.tokens / seconds, "memory_gb": memory}


def run_padded(case: Case, folder: Path) -> dict[str, Any]:
    """Batches padded to their longest sample, logits of the tail from the first learnt token on."""
    from transformers import AutoTokenizer

    from mmqwen.checkpoint import read_config
    from mmqwen.data import RowsDataset, encode
    from mmqwen.hf import MultimodalQwen3ForConditionalGeneration

    source = folder / case.shape
    specs = read_config(source).modality_specs
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    model.requires_grad_(False).cuda().train()
    model.projectors.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.projectors.parameters(), 1e-3, fused=True)
    data = RowsDataset(folder / "data")
    clock = Clock(warm=3)
    order = np.random.default_rng(2).permutation(len(data))
    for step in range(3 + case.steps):
        examples = [data[int(i)] for i in order[step * case.tokens : (step + 1) * case.tokens]]
        encoded = [encode(e.sample, e.counts, tokenizer, specs) for e in examples]
        width = max(len(e.token_ids) for e in encoded)
        first = min(
            width - len(e.labels) + next(i for i, v in enumerate(e.labels) if v != -100)
            for e in encoded
        )

        def left(value: int, rows: list[list[int]], width: int = width) -> torch.Tensor:
            return torch.tensor([[value] * (width - len(r)) + r for r in rows]).cuda()

        batch = {
            "input_ids": left(tokenizer.pad_token_id, [e.token_ids for e in encoded]),
            "attention_mask": left(0, [[1] * len(e.token_ids) for e in encoded]),
            "labels": left(-100, [e.labels for e in encoded]),
            "embeddings": {"m1": torch.cat([e.rows["m1"][0] for e in examples]).float().cuda()},
            "logits_to_keep": width - first + 1,
        }
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        clock.step(sum(len(e.token_ids) for e in encoded))
    return clock.result()


def run_text(case: Case, folder: Path) -> dict[str, Any]:
    """TRL's SFTTrainer over token ids of the same lengths, a quarter of which are learnt."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from mmqwen.training.attention import VARLEN, register
    from mmqwen.training.packing import pack

    register()
    vocab = text_fields(case.shape)["vocab_size"]
    draw = np.random.default_rng(3)
    lengths = draw_lengths(SAMPLES)
    rows = []
    for samples in pack(lengths, range(len(lengths)), case.tokens):
        own = [lengths[i] for i in samples]
        ids = draw.integers(0, vocab - 300, sum(own))
        labels = [[-100] * (n - n // 4) + [1] * (n // 4) for n in own]
        learnt = np.array([label for sample in labels for label in sample])
        rows.append(
            {
                "input_ids": ids.tolist(),
                "labels": np.where(learnt == 1, ids, -100).tolist(),
                "seq_lengths": own,
            }
        )
    base = folder / f"{case.shape}-base"
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation=VARLEN
    )
    options = {k: v for k, v in case.options.items() if k != "stage"}
    whole = case.options.get("stage") == "lora"
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(
        r=16 if whole else 1,
        lora_alpha=32,
        target_modules=names if whole else ["q_proj"],
        layers_to_transform=None if whole else [0],
        task_type="CAUSAL_LM",
    )
    clock = Clock(warm=4)

    class Watch(TrainerCallback):
        """Counts tokens."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.step(int(sum(lengths) / len(rows)))

    arguments = SFTConfig(
        output_dir=str(folder / "sft"),
        max_length=case.tokens,
        packing=True,
        per_device_train_batch_size=1,
        max_steps=4 + case.steps,
        bf16=True,
        logging_steps=case.steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=4,
        gradient_checkpointing=bool(options.get("gradient_checkpointing")),
        use_liger_kernel=bool(options.get("liger", True)),
        torch_compile=bool(options.get("compile", False)),
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset(InMemoryTable.from_pylist(rows), fingerprint="rows"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=lora,
        callbacks=[Watch()],
    )
    trainer.train()
    return clock.result()


WAYS: dict[str, Callable[[Case, Path], dict[str, Any]]] = {
    "ours": run_ours,
    "padded": run_padded,
    "text": run_text,
}


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """One case, or why it did not run."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()
    begin = time.perf_counter()
    try:
        found = WAYS[case.way](case, folder)
    except Exception as error:  # the table says so
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"case": case.name, **found, "seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    """Measure the cases whose names hold one of the words given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=[], help="words in a case's name")
    parser.add_argument("--extra", nargs="*", default=[], help='further cases, as JSON: {"shape":')
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--folder", type=Path, help="where checkpoints and data are kept")
    parser.add_argument("--seconds", type=float, default=540, help="no case begins after")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    begin = time.perf_counter()
    rank = int(os.environ.get("RANK", "0"))
    folder = args.folder or Path(tempfile.mkdtemp())
    cases = [c for c in CASES if not args.cases or any(w in c.name for w in args.cases)]
    if args.extra:
        cases = [Case(**json.loads(text)) for text in args.extra]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if rank == 0:
        folder.mkdir(exist_ok=True)
        if not (folder / "data").exists():
            write_data(folder, args.samples, text_fields(cases[0].shape)["vocab_size"] - 300)
        for shape in {case.shape for case in cases}:
            if not (folder / shape).exists():
                write_base(folder, shape, device)
        (folder / ".ready").touch()
    while not (folder / ".ready").exists():  # the first process writes, the others wait
        time.sleep(0.5)
    results = []
    for case in cases:
        if time.perf_counter() - begin > args.seconds:
            results.append({"case": case.name, "failed": "not run: no time left"})
            continue
        results.append(measure(case, folder))
        if rank == 0:
            record = {**about(device), "world": int(os.environ.get("WORLD_SIZE", "1"))}
            record["results"] = results
            args.out.write_text(json.dumps(record, indent=1) + "\n")
            found = results[-1]
            shown = found.get("failed") or (
                f"{found['tokens_per_second']:>9,.0f} tokens/s  "
                f"{found.get('share_of_peak', 0):.1%} of peak  {found['memory_gb']:.1f} GB  "
                f"{found.get('attention', '')} compiled={found.get('compiled')} "
                f"liger={found.get('liger')}"
            )
            print(f"{found['case']:<60} {shown}  ({found['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
