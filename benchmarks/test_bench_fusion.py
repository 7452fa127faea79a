"""`pytest benchmarks/ --benchmark-only`: torch backend, planner and packer on a CPU.

The providers too where there is a GPU. `bench_kernels.py` is the full measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from providers import PROVIDERS, WIDTHS, gate, make_workload, why_not

from mmqwen_kernels import directory, fuse_embeddings, pack_rows, plan_rows

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
SIZES = [1024, 4096] if CUDA else [256]
ROWS = [1, 64, 1024, 8192] if CUDA else [1, 64, 256]

Benchmark = Callable[..., Any]
ITEM_SHAPES = [(1, 64, 1), (16, 4, 1), (128, 1, 1), (128, 1, 4), (1024, 1, 1)]


def make_items(count: int, rows: int, modalities: int) -> list[tuple[int, torch.Tensor]]:
    return [
        (i % modalities, torch.randn(rows, WIDTHS[i % modalities]).bfloat16()) for i in range(count)
    ]


def mask_for(total: int) -> torch.Tensor:
    mask = torch.zeros(total + 256, dtype=torch.bool)
    mask[100 : 100 + total] = True
    return mask


@pytest.mark.parametrize(("count", "rows", "modalities"), ITEM_SHAPES)
def test_pack(benchmark: Benchmark, count: int, rows: int, modalities: int) -> None:
    items = make_items(count, rows, modalities)
    benchmark(pack_rows, items)


@pytest.mark.parametrize(("count", "rows", "modalities"), ITEM_SHAPES)
@pytest.mark.parametrize("packed", [True, False])
def test_plan(benchmark: Benchmark, count: int, rows: int, modalities: int, packed: bool) -> None:
    """From one pack, or from as many loose items, to where the kernels can begin."""
    sources: list = make_items(count, rows, modalities)
    if packed:
        sources = [directory(pack_rows(sources))]
    mask = mask_for(count * rows)

    def plan() -> object:
        made = plan_rows(sources, mask, len(mask), WIDTHS, dtype=torch.bfloat16, device=DEVICE)
        return made.rows if DEVICE == "cpu" else made

    benchmark(plan)


@pytest.mark.parametrize(("requests", "rows", "modalities"), [(64, 4, 1), (64, 4, 4), (256, 1, 1)])
def test_plan_of_many_requests(
    benchmark: Benchmark, requests: int, rows: int, modalities: int
) -> None:
    parts = [directory(pack_rows(make_items(rows, 1, modalities))) for _ in range(requests)]
    mask = mask_for(requests * rows)

    def plan() -> object:
        made = plan_rows(parts, mask, len(mask), WIDTHS, dtype=torch.bfloat16, device=DEVICE)
        return made.rows if DEVICE == "cpu" else made

    benchmark(plan)


def test_torch_backend_from_a_pack(benchmark: Benchmark) -> None:
    work = make_workload(256, 2, 64, dtype=torch.float32, device="cpu")
    pack = directory(pack_rows([(m, x) for m, x in work.items]))
    benchmark(
        lambda: fuse_embeddings(
            work.input_ids, work.table, [pack], work.projectors, slots=work.mask, backend="torch"
        )
    )


STEPS = [
    (name, size, modalities, rows)
    for name in PROVIDERS
    for size in SIZES
    for modalities in (1, 4)
    for rows in ROWS
    # C compiles anew at each point, A projects item by item: minutes.
    if name != "C" and not (name == "A" and rows > 1024)
    if why_not(name, DEVICE, DTYPE, rows) is None
]


@pytest.mark.parametrize(("name", "size", "modalities", "rows"), STEPS)
def test_step(benchmark: Benchmark, name: str, size: int, modalities: int, rows: int) -> None:
    work = make_workload(size, modalities, rows, dtype=DTYPE, device=DEVICE)
    gate(work, [name])
    step = PROVIDERS[name](work)

    def timed() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(timed)
