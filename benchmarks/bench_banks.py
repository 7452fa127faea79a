"""What rows of a bank cost inside vLLM, against the same rows sent and the same tokens as text.

    python benchmarks/bench_banks.py --shape 0.6B --rows 1000000 --out banks.json
    python benchmarks/bench_banks.py --shape 8B --rows 1000000 --placements device,projected
    python benchmarks/bench_banks.py --rows 10000000 --width 64 --placements device,host --keys

Prefill alone (`max_tokens=1`), random weights, `LLM.generate` wall time on one engine; text, rows
sent, and rows named of the same file in each placement take turns, after a round that warms up; by
`--keys` also rows named by their keys, of the first placement. A request is 64 tokens of text and
one item of 1, 8, 64 or 512 rows. Nothing is timed before rows named and rows sent have given the
same log-probabilities. Raw JSON is written after each number of ids; it ends with a table of ratios
to text. `projected` takes rows x hidden size x 2 bytes of the GPU: 20 GB for 10^7 at 0.6B's shape.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_vllm_prefill import (
    SHAPES,
    WIDTHS,
    Clock,
    as_text,
    environment,
    start,
    summary,
    write_checkpoint,
)

from mmqwen.banks.spec import PLACEMENTS

MODALITY = "m1"
IDS = (1, 8, 64, 512)
KEYS = "keys"
_BLOCK = 1 << 16


def write_table(folder: Path, count: int, width: int, keys: bool) -> Path:
    """A bank of random rows in bf16: one block of them, turned, some MiB at a time."""
    from safetensors.torch import save_file

    from mmqwen.banks import build_bank

    parts, names = folder / f"rows-{count}", folder / "keys.txt"
    parts.mkdir()
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(min(_BLOCK, count), width, generator=generator).bfloat16()
    with names.open("w") as lines:
        for turn, at in enumerate(range(0, count, _BLOCK)):
            rows = block.roll(turn, dims=1)[: count - at].contiguous()
            save_file({"rows": rows}, parts / f"{at:012}.safetensors")
            if keys:
                lines.writelines(f"{key_of(row)}\n" for row in range(at, at + len(rows)))
    file = folder / f"{count}.bank"
    build_bank(parts, file, modality=MODALITY, keys=names if keys else None)
    shutil.rmtree(parts)
    return file


def key_of(row: int) -> str:
    """A key of ten characters, as shops have them."""
    return f"B{row:09X}"


def make_requests(
    kind: str, requests: int, ids: int, seed: int, bank: Any, first: str
) -> list[dict[str, Any]]:
    """Requests of one kind, with ids of their own; keys are of the bank `first`."""
    from mmqwen.banks import BankRows

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(requests):
        text = torch.randint(1, 200, (64,), generator=generator).tolist()
        rows = torch.randint(0, bank.num_rows, (ids,), generator=generator)
        item: Any = BankRows(kind, rows.tolist())
        if kind in ("sent", "text"):
            item = bank.rows[rows]
        elif kind == KEYS:
            item = BankRows(first, keys=[key_of(row) for row in rows.tolist()])
        made.append({"prompt_token_ids": text, "multi_modal_data": {MODALITY: [item]}})
    return as_text(made, seed) if kind == "text" else made


def check(llm: Any, bank: Any, kinds: list[str]) -> dict[str, bool]:
    """Of each kind whether rows named give the bits of rows sent.

    Raises:
        RuntimeError: they do not even give the same answer but for rounding.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)

    def answers(kind: str) -> list[dict[int, float]]:
        found = []
        for request in make_requests(kind, 4, 64, 7, bank, kinds[0]):
            output = llm.generate([request], params, use_tqdm=False)[0].outputs[0]
            found.append({token: entry.logprob for token, entry in output.logprobs[0].items()})
        return found

    expected, same = answers("sent"), {}
    for kind in kinds:
        got = answers(kind)
        same[kind] = got == expected
        for one, other in zip(got, expected, strict=True):
            shared = one.keys() & other.keys()
            if not shared or any(abs(one[t] - other[t]) > 0.05 for t in shared):
                raise RuntimeError(f"rows of the bank, {kind}, give {one}, sent {other}")
    return same


def measure(arguments: argparse.Namespace, folder: Path, raw: dict[str, Any]) -> None:
    """Fill `raw` with times in ms, and write it as they come."""
    from mmqwen.banks import open_bank

    width, with_keys = WIDTHS[MODALITY], arguments.keys
    bank = open_bank(write_table(folder, arguments.rows, width, with_keys))
    places = {p: {"file": str(bank.file), "placement": p} for p in arguments.placements}
    named = [*places, *([KEYS] if with_keys else [])]
    kinds = ["text", "sent", *named]
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint, arguments.shape)
    begin = time.perf_counter()
    options = json.loads(arguments.engine_options)
    llm = start(checkpoint / "ours", hf_overrides={"banks": places}, **options)
    raw["start_s"] = time.perf_counter() - begin
    raw["bank_bytes"] = bank.file.stat().st_size
    raw["same_bits"] = check(llm, bank, named)
    clock = Clock(llm, time.monotonic() + arguments.timeout)
    for ids in arguments.ids:
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        alone: dict[str, list[float]] = {kind: [] for kind in kinds}
        for repeat in range(arguments.repeats + 1):
            for at, kind in enumerate(kinds):
                if clock.over:
                    break
                seed = 1000 * repeat + 10 * at
                many = make_requests(kind, arguments.requests, ids, seed, bank, named[0])
                single = make_requests(kind, 5, ids, seed + 1, bank, named[0])
                elapsed, _ = clock.once(many)
                waits = [clock.once([one])[0] for one in single]
                if repeat:
                    times[kind].append(elapsed)
                    alone[kind] += waits
        raw["results"][str(ids)] = {kind: summary(times[kind], alone[kind]) for kind in kinds}
        arguments.out.write_text(json.dumps(raw, indent=1) + "\n")


def show(raw: dict[str, Any]) -> None:
    """The table of ratios to text."""
    print(f"a bank of {raw['rows']} rows, {raw['shape']}; same bits as sent: {raw['same_bits']}")
    kinds = ["sent", *raw["same_bits"]]
    print("ids | " + " | ".join(f"{kind} / text, alone" for kind in kinds))
    for ids, of_ids in raw["results"].items():
        text = of_ids["text"]
        if text["median_ms"] is None:
            continue
        cells = [
            ", ".join(
                f"{of_ids[kind][field] / text[field]:.3f}" if of_ids[kind][field] else "-"
                for field in ("median_ms", "alone_median_ms")
            )
            for kind in kinds
        ]
        print(f"{ids} | " + " | ".join(cells))


def main() -> int:
    """Measure one size of the bank."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def places(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(PLACEMENTS):
            raise argparse.ArgumentTypeError(f"{found}, expected some of {PLACEMENTS}")
        return found

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="0.6B")
    parser.add_argument("--rows", type=int, default=10_000, help="of the bank")
    parser.add_argument("--width", type=int, default=WIDTHS[MODALITY], help="of a row")
    parser.add_argument("--placements", type=places, default=list(PLACEMENTS))
    parser.add_argument("--keys", action="store_true", help="also name rows by their keys")
    parser.add_argument("--ids", type=numbers, default=list(IDS), help="of a request")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of measuring")
    parser.add_argument("--engine-options", default="{}", help="JSON, for vllm.LLM")
    parser.add_argument("--out", type=Path, default=Path("banks.json"))
    arguments = parser.parse_args()
    WIDTHS[MODALITY] = arguments.width  # of the checkpoint, too
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    raw: dict[str, Any] = {
        "environment": environment(),
        "shape": arguments.shape,
        "rows": arguments.rows,
        "width": arguments.width,
        "results": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        measure(arguments, Path(scratch), raw)
    show(raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
