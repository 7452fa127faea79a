"""Two ways to tell the kernels which token is a row: planned on the host, or on the GPU.

    python benchmarks/bench_plan.py [--out FILE]

- *host*: what `mmqwen_kernels.plan` does: the order of the tokens from vLLM's mask, by numpy,
  in one copy with the row tables, beside the step's stream where that is busy (`side`: as for its
  device time; the host's, of an idle stream, is of a copy into it) or always in it (`in stream`).
- *gpu*: a third kernel reads `input_ids`, one placeholder id a modality, and writes the same order;
  nothing is copied, but the kernel stands in the stream before K2.

Prints and writes device and host time of each, us, medians; checks that all give the same order.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]

from bench_kernels import Clock, about  # noqa: E402

from mmqwen_kernels.plan import _grouped_positions, _split_tokens, _write_order  # noqa: E402
from mmqwen_kernels.staging import Staging, uploader  # noqa: E402

PLACEHOLDERS = (50, 51, 52, 53)
TOKENS = (320, 1280, 8192)


@triton.jit
def _order_kernel(
    ids_ptr,
    order_ptr,
    num_tokens,
    FIRST: tl.constexpr,
    MODALITIES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """order = text slots, then the slots of each modality, each ascending. One program.

    ids `[T]`, order int64 `[T]`; modality m has id FIRST + m; SIZE >= T, a power of two.
    """
    at = tl.arange(0, SIZE)
    inside = at < num_tokens
    ids = tl.load(ids_ptr + at, mask=inside, other=0)
    begin = 0
    for m in tl.static_range(MODALITIES + 1):
        if m == 0:
            mine = inside & ((ids < FIRST) | (ids >= FIRST + MODALITIES))
        else:
            mine = inside & (ids == FIRST + m - 1)
        ones = mine.to(tl.int32)
        tl.store(order_ptr + begin + tl.cumsum(ones) - 1, at.to(tl.int64), mask=mine)
        begin += tl.sum(ones)


def run(tokens: int, modalities: int, clock: Clock | None, device: str) -> dict[str, dict]:
    """Check that both ways agree, and time them where there is a clock."""
    g = torch.Generator().manual_seed(0)
    modality = torch.randint(-modalities, modalities, (tokens,), generator=g)
    ids = torch.where(modality < 0, 7, PLACEHOLDERS[0] + modality).to(device)
    mask = modality >= 0
    runs = [(int(m), 1) for m in modality[mask]]
    wanted = np.concatenate([(modality < 0).nonzero()[:, 0].numpy()] + [
        (modality == m).nonzero()[:, 0].numpy() for m in range(modalities)
    ])  # fmt: skip
    found = torch.full((tokens,), -1, dtype=torch.int64, device=device)
    size = triton.next_power_of_2(tokens)

    def on_gpu() -> torch.Tensor:
        _order_kernel[(1,)](ids, found, tokens, PLACEHOLDERS[0], modalities, size, num_warps=8)
        return found

    def order(raw: np.ndarray) -> None:
        text, positions = _split_tokens(mask, tokens)
        if modalities > 1:
            kinds = np.array([m for m, _ in runs], dtype=np.uint8)
            positions = positions[kinds.argsort(kind="stable")]
        _write_order(raw, 0, text, positions)

    raw = np.empty(8 * tokens, dtype=np.uint8)
    order(raw)
    if not np.array_equal(raw.view(np.int64), wanted) or not np.array_equal(
        on_gpu().cpu().numpy(), wanted
    ):
        raise RuntimeError("the two ways differ")
    if modalities > 1 and not np.array_equal(
        _grouped_positions(np.flatnonzero(mask.numpy()), runs, modalities),
        wanted[int((~mask).sum()) :],
    ):
        raise RuntimeError("grouping by slices differs from grouping by a sort")
    if clock is None:
        return {}

    here = torch.device(device, torch.cuda.current_device())

    def side() -> torch.Tensor:
        up = uploader(here)
        staging = up.lend(8 * tokens)
        order(staging.bytes)
        return up.upload(staging, 8 * tokens, lambda address: None)

    pinned = Staging(8 * tokens)

    def in_stream() -> torch.Tensor:
        order(pinned.bytes)
        return pinned.pinned.to(here, non_blocking=True)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "host, side": side,
        "host, in stream": in_stream,
        "gpu": on_gpu,
    }
    times = {}
    for name, step in ways.items():
        for _ in range(5):
            step()
        host = clock.host(step, 30)
        times[name] = {"host_us": host, "device_us": clock.device(step, 30, host["p50"])}
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plan.json")
    args = parser.parse_args()
    report = about("cuda")
    report["points"] = points = []
    clock = Clock("cuda")
    for tokens in TOKENS:
        for modalities in (1, 4):
            times = run(tokens, modalities, clock, "cuda")
            points.append({"tokens": tokens, "modalities": modalities, "ways": times})
            cells = [
                f"{name} {t['device_us']['p50']:.1f}/{t['host_us']['p50']:.0f}"
                for name, t in times.items()
            ]
            print(f"{tokens:5d} {modalities}  " + "  ".join(cells), flush=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
