"""`pytest benchmarks/ --benchmark-only`: a step by every provider that runs here, and its parts.

Names say what is timed: `test_step[ours-D4096-2_modalities-512_rows-64_text]`; `providers.py` says
what the providers do. `bench_kernels.py` is the full measurement, with device times.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from providers import PROVIDERS, WIDTHS, gate, into_buffer, make_workload, why_not

from mmqwen.pack_slices import find_rows
from mmqwen.packs import directory, pack_rows
from mmqwen_kernels import plan_rows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SIZES = [1024, 4096] if CUDA else [256]
ROWS = [1, 64, 1024, 8192] if CUDA else [4, 64, 256]

Benchmark = Callable[..., Any]
ITEMS = [(1, 64, 1), (16, 4, 1), (128, 1, 1), (128, 1, 4), (1024, 1, 1)]
REQUESTS = [(64, 4, 1), (64, 4, 4), (256, 1, 1)]


def words(count: int, rows: int, modalities: int, of: str) -> str:
    return f"{count}_{of}_of_{rows}_rows-{modalities}_modalities"


def make_items(count: int, rows: int, modalities: int) -> list[tuple[int, torch.Tensor]]:
    return [
        (i % modalities, torch.randn(rows, WIDTHS[i % modalities]).bfloat16()) for i in range(count)
    ]


@pytest.mark.parametrize(
    ("count", "rows", "modalities"), ITEMS, ids=[words(*i, "items") for i in ITEMS]
)
def test_pack(benchmark: Benchmark, count: int, rows: int, modalities: int) -> None:
    """A message's items into one pack, as the front end does at each request."""
    benchmark(pack_rows, make_items(count, rows, modalities))


def plan_of(packs: list[torch.Tensor], rows: int) -> Callable[[], object]:
    mask = torch.zeros(rows + 256, dtype=torch.bool)
    mask[100 : 100 + rows] = True
    dtype = torch.bfloat16
    return lambda: plan_rows(
        find_rows(packs, WIDTHS, dtype), mask, len(mask), WIDTHS, dtype=dtype, device=DEVICE
    )


@pytest.mark.parametrize(
    ("count", "rows", "modalities"), ITEMS, ids=[words(*i, "items") for i in ITEMS]
)
def test_plan_one_request(benchmark: Benchmark, count: int, rows: int, modalities: int) -> None:
    """From one pack to where the kernels can begin."""
    benchmark(plan_of([directory(pack_rows(make_items(count, rows, modalities)))], count * rows))


@pytest.mark.parametrize(
    ("requests", "rows", "modalities"), REQUESTS, ids=[words(*r, "requests") for r in REQUESTS]
)
def test_plan_many_requests(
    benchmark: Benchmark, requests: int, rows: int, modalities: int
) -> None:
    """The same from a pack a request."""
    packs = [directory(pack_rows(make_items(rows, 1, modalities))) for _ in range(requests)]
    benchmark(plan_of(packs, requests * rows))


STEPS = [
    (name, size, modalities, rows)
    for name in PROVIDERS
    for size in SIZES
    for modalities in (1, 4)
    for rows in ROWS
    # compiled takes seconds for each shape: bench_kernels.py --providers compiled
    if name != "compiled" and rows >= modalities and why_not(name, DEVICE, DTYPE) is None
]


@pytest.mark.parametrize(
    ("name", "size", "modalities", "rows"),
    STEPS,
    ids=[f"{n}-D{size}-{m}_modalities-{rows}_rows-64_text" for n, size, m, rows in STEPS],
)
def test_step(benchmark: Benchmark, name: str, size: int, modalities: int, rows: int) -> None:
    """A whole step to the end of its work, from packs on the host; correct before it is timed."""
    work = make_workload(size, modalities, rows, 64, steps=8, dtype=DTYPE, device=DEVICE)
    gate(work, [name])
    run, steps = into_buffer(work, PROVIDERS[name](work)), cycle(work.steps)

    def timed() -> None:
        run(next(steps))
        if CUDA:
            torch.cuda.synchronize()

    benchmark(timed)
