"""The kernels on a GPU: `pytest tests/kernels/test_gpu.py -m gpu`. Skipped where there is none."""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_cases import (
    EVERY_SPEC,
    Case,
    beside_projected,
    check_against_torch,
    make_case,
    make_projector,
    relative_error,
    rows_that_stay,
    shard,
    spec_name,
)
from rounding import random_walk
from torch.profiler import ProfilerActivity, profile

from mmqwen.pack_slices import find_rows
from mmqwen.packs import directory, pack_rows
from mmqwen_kernels import (
    HostRows,
    RowPlan,
    fuse_embeddings,
    plan_rows,
    project_rows,
    triton_backend,
    warm_up,
)
from mmqwen_kernels.launcher import DISPATCH_VARIABLE
from mmqwen_kernels.plan import RowSource
from mmqwen_kernels.triton_backend import TritonBackend

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 500, 1024)
WIDTHS = (64, 384, 512, 768, 770, 1024, 1280, 4096)
NAN = float("nan")


@pytest.fixture(autouse=True)
def _deterministic_torch() -> None:
    """torch's own products in full precision, so that they are a fair measure of error."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def gpu_case(widths: list[int], counts: list[int], dtype: torch.dtype, **more: object) -> Case:
    options: dict = {"hidden": 1024, "columns": 1024, "text": 40, "device": "cuda"} | more
    return make_case(widths, counts, dtype, **options)


def poisoned(case: Case) -> torch.Tensor:
    return torch.full(
        (len(case.input_ids), case.columns), NAN, dtype=case.table.dtype, device="cuda"
    )


def check(case: Case, **more: object) -> torch.Tensor:
    out = poisoned(case)
    assert case.run("triton", out=out, **more) is out
    check_against_torch(case, out)
    return out


def plan_of(case: Case, items: list[RowSource] | HostRows | None = None) -> RowPlan:
    return plan_rows(
        case.items if items is None else items,
        case.slots,
        len(case.input_ids),
        [p.width for p in case.projectors],
        dtype=case.table.dtype,
        device="cuda",
    )


def backend_in_use() -> TritonBackend:
    return triton_backend.triton_backend(torch.device("cuda", torch.cuda.current_device()))


def launched_by(step: Callable[[], object]) -> tuple[list[str], list[str]]:
    """Names of the copies and of the kernels that the GPU runs for a step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        step()
        torch.cuda.synchronize()
    on_device = [e.name for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in on_device if "memcpy" in name.lower()]
    return copies, [name for name in on_device if name not in copies]


# -- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows(rows: int, dtype: torch.dtype) -> None:
    check(gpu_case([768], [rows], dtype, item_rows=64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, dtype: torch.dtype) -> None:
    for rows in (5, 100):
        check(gpu_case([width], [rows], dtype))


@pytest.mark.parametrize("rows", [1, 64, 200, 2048, 8192])
@pytest.mark.parametrize("modalities", [1, 4])
def test_full_size(rows: int, modalities: int) -> None:
    widths = [1024, 768, 512, 1280][:modalities]
    counts = [rows // modalities] * (modalities - 1)
    counts.append(rows - sum(counts))
    check(
        gpu_case(widths, counts, torch.bfloat16, hidden=4096, columns=4096, text=256, item_rows=64)
    )


def test_8192_columns() -> None:
    check(gpu_case([512], [70], torch.bfloat16, hidden=1024, columns=8192))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "counts"),
    [
        ([768, 512], [1, 300]),
        ([768, 512, 384], [17, 0, 130]),
        ([768, 512, 384, 770], [200, 1, 64, 9]),
        ([768, 512, 384, 1024], [0, 0, 0, 3]),
    ],
)
def test_unequal_loads(widths: list[int], counts: list[int], dtype: torch.dtype) -> None:
    check(gpu_case(widths, counts, dtype, item_rows=9))


def test_modalities_of_different_hidden_sizes() -> None:
    check(gpu_case([768, 512], [40, 90], torch.bfloat16, hidden=[1024, 520]))


@pytest.mark.parametrize("item_rows", [1, 7, 512])
def test_strided_items(item_rows: int) -> None:
    check(gpu_case([768, 770], [130, 20], torch.bfloat16, strided=True, item_rows=item_rows))


def test_slices_of_packs_and_items_on_both_sides() -> None:
    case = gpu_case([768, 512], [60, 45], torch.bfloat16, item_rows=5)
    host = [(m, x.cpu()) for m, x in case.items]  # type: ignore[misc]
    pack = directory(pack_rows(host))
    total = sum(x.shape[0] for _, x in host)
    slices = [pack[:7], pack[7 : total - 1], pack[total - 1 :]]
    sliced = find_rows(slices, [768, 512], torch.bfloat16)
    mixed: list[RowSource] = [
        item if at % 2 else (item[0], item[1].cpu())  # type: ignore[index]
        for at, item in enumerate(case.items)
    ]
    want = case.run("triton")
    for items in (host, sliced, mixed):
        plan = plan_of(case, items)
        got = fuse_embeddings(case.input_ids, case.table, plan, case.projectors, backend="triton")
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("stays", [(True, False), (True, True), (False, False, False, True)])
@pytest.mark.parametrize("widths", [[768, 512], [768, 770], [64, 33]])
def test_rows_that_stay_on_the_gpu_beside_rows_that_travel(
    widths: list[int], stays: tuple[bool, ...], backend: str
) -> None:
    case = gpu_case(widths, [160, 45], torch.bfloat16, item_rows=5)
    want = case.run(backend)
    sources = rows_that_stay(case.items, stays)
    plan = plan_of(case, sources)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = fuse_embeddings(case.input_ids, case.table, plan, case.projectors, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if backend == "triton" and widths[1] % 8 == 0:  # else other loads, in another order
        assert torch.equal(got, want)
    case.check(got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("counts", [[0, 0], [3, 0], [160, 45]])
@pytest.mark.parametrize("columns", [1024, 4096, 1000, 77])
def test_rows_projected_before(columns: int, counts: list[int], dtype: torch.dtype) -> None:
    """Gathered beside text, rows that stay and rows that travel, bit for bit, without a sync."""
    case = gpu_case([768, 512], counts, dtype, columns=columns, text=90, ids_dtype=torch.int32)
    warm_up(case.projectors, backend="triton", resident=True, projected=True)
    for count in (1, 8, 90):
        beside = beside_projected(case, count, (True, False))
        out = poisoned(case)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fuse_embeddings(
                case.input_ids, case.table, beside.sources, case.projectors,
                slots=beside.slots, out=out, backend="triton",
            )  # fmt: skip
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out[beside.at], beside.rows)
        out[beside.at] = case.run("torch")[beside.at]
        check_against_torch(case, out)


def test_ranks_add_rows_projected_before_once() -> None:
    case = gpu_case([768, 512], [9, 20], torch.bfloat16, text=90)
    total = torch.zeros(len(case.input_ids), case.columns, dtype=torch.bfloat16, device="cuda")
    for rank in range(2):
        mine, beside = shard(case, rank, 2), beside_projected(case, 40, rank=rank, ranks=2)
        total += fuse_embeddings(
            mine.input_ids, mine.table, beside.sources, mine.projectors,
            slots=beside.slots, vocab_start=mine.vocab_start, backend="triton",
        )  # fmt: skip
    assert torch.equal(total[beside.at], beside.rows)


@pytest.mark.parametrize("counts", [[0, 0], [60, 45]])
def test_rows_projected_before_wait_for_their_ids_and_launch_nothing_more(
    counts: list[int],
) -> None:
    """Without a K1 before it, K2 may overtake nothing: neither what writes ids nor the table."""
    case = gpu_case([768, 512], counts, torch.bfloat16, text=4000, ids_dtype=torch.int32)
    warm_up(case.projectors, backend="triton", resident=True, projected=True)
    ready = len(backend_in_use().kernels)
    beside = beside_projected(case, 1000)
    ids, tables = case.input_ids.clone(), [table.clone() for table in beside.sources.tables]

    def step() -> torch.Tensor:
        return fuse_embeddings(
            case.input_ids, case.table, beside.sources, case.projectors,
            slots=beside.slots, backend="triton",
        )  # fmt: skip

    want = step()
    for _ in range(20):
        case.input_ids.zero_()
        for table in beside.sources.tables:
            table.zero_()
        torch.cuda._sleep(200_000)
        case.input_ids.copy_(ids)
        for table, rows in zip(beside.sources.tables, tables, strict=True):
            table.copy_(rows)
        assert torch.equal(step(), want)
    assert len(backend_in_use().kernels) == ready
    copies, kernels = launched_by(step)
    assert len(copies) <= 1, copies
    assert len(kernels) == (2 if any(counts) else 1), kernels


def test_a_row_has_the_same_bits_projected_before_and_in_its_step() -> None:
    case = gpu_case([768], [37], torch.bfloat16, item_rows=37)
    rows = case.items[0][1]  # type: ignore[index]
    padded = torch.cat([torch.randn(8000, 768, device="cuda").bfloat16(), rows])
    table = project_rows(padded, case.projectors[0], backend="triton")
    assert torch.equal(case.run("triton")[case.slots], table[8000:])


@pytest.mark.parametrize("rows", [9, 200])
def test_neighbours_are_untouched(rows: int) -> None:
    case = gpu_case([768], [rows], torch.bfloat16)
    buffer = torch.full(
        (len(case.input_ids) + 6, case.columns + 16), NAN, dtype=torch.bfloat16, device="cuda"
    )
    out = buffer[3:-3, 8:-8]
    case.run("triton", out=out)
    check_against_torch(case, out)
    out.fill_(NAN)
    assert buffer.isnan().all()


def test_a_nan_row_stays_in_its_slot() -> None:
    case = gpu_case([768], [90], torch.bfloat16, item_rows=1)
    case.items[50][1].fill_(NAN)  # type: ignore[index]
    out = case.run("triton")
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [case.slots[50]]


@pytest.mark.parametrize("rows", [8, 300])
def test_shards_sum_to_the_whole(rows: int) -> None:
    case = gpu_case([768, 512], [rows, rows], torch.float32, text=60)
    parts = [shard(case, rank, 2) for rank in range(2)]
    total = sum(part.run("triton") for part in parts)
    assert relative_error(total, case.exact()) <= max(map(random_walk, case.projectors))


def test_project_rows() -> None:
    projector = make_projector(768, 1024, 1024, torch.bfloat16, "cuda")
    rows = torch.randn(70, 768, device="cuda", dtype=torch.bfloat16)
    exact = project_rows(rows.double(), projector.map(torch.Tensor.double))
    got, peer = (project_rows(rows, projector, backend=name) for name in ("triton", "torch"))
    assert relative_error(got, exact) <= 1.1 * relative_error(peer, exact)


# -- kinds of projectors -------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 40, 100, 300, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", EVERY_SPEC, ids=spec_name)
def test_kinds_of_projectors(spec: dict[str, Any], dtype: torch.dtype, rows: int) -> None:
    for width in (768, 770):
        check(gpu_case([width], [rows], dtype, specs=[spec], item_rows=64))


@pytest.mark.parametrize("rows", [3, 60, 700])
@pytest.mark.parametrize("dtype", DTYPES)
def test_modalities_of_different_kinds(dtype: torch.dtype, rows: int) -> None:
    """Every kind at once: 36 groups in one launch."""
    widths = [(768, 512, 384)[at % 3] for at in range(len(EVERY_SPEC))]
    counts = [rows // (1 + at % 4) for at in range(len(EVERY_SPEC))]
    check(gpu_case(widths, counts, dtype, hidden=512, specs=EVERY_SPEC))


@pytest.mark.parametrize("spec", [EVERY_SPEC[at] for at in (8, 10, 32, 34)], ids=spec_name)
def test_a_row_of_any_kind_has_the_same_bits_in_any_batch(spec: dict[str, Any]) -> None:
    case = gpu_case([770], [1500], torch.bfloat16, text=0, item_rows=1500, specs=[spec])
    (_, rows), projector = case.items[0], case.projectors[0]  # type: ignore[misc]
    whole = project_rows(rows, projector, backend="triton")
    for count in (1, 9, 17, 40, 100, 300, 700):
        assert torch.equal(project_rows(rows[:count], projector, backend="triton"), whole[:count])


# -- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 60, 700])
def test_runs_are_bit_identical(rows: int) -> None:
    case = gpu_case([768, 512], [rows, rows], torch.bfloat16)
    want = case.run("triton")
    for _ in range(20):
        assert torch.equal(case.run("triton"), want)


def batch_dependence(batches: int) -> int:
    """Batches, of `batches` drawn at random, in which some row's bits are not its bits alone."""
    rng = random.Random(0)
    widths = [768, 512]
    case = gpu_case(widths, [0, 0], torch.bfloat16, hidden=2048, columns=2048)
    pool = [torch.randn(4096, w, device="cuda").bfloat16() for w in widths]

    def run(picks: list[tuple[int, int]]) -> torch.Tensor:
        items: list[RowSource] = [(m, pool[m][r : r + 1]) for m, r in picks]
        ids = torch.zeros(len(picks), dtype=torch.int64, device="cuda")
        return fuse_embeddings(
            ids,
            case.table,
            items,
            case.projectors,
            slots=range(len(picks)),
            backend="triton",
        )

    alone = [torch.cat([run([(m, r)]) for r in range(64)]) for m in range(2)]
    different = 0
    for _ in range(batches):
        size = int(2 ** rng.uniform(0, 11))
        probes = [(rng.randrange(2), rng.randrange(64)) for _ in range(4)]
        others = [(rng.randrange(2), rng.randrange(4096)) for _ in range(size)]
        picks = probes + others
        rng.shuffle(picks)
        out = run(picks)
        different += any(not torch.equal(out[picks.index((m, r))], alone[m][r]) for m, r in probes)
    return different


def test_batch_invariance() -> None:
    """1,000 random batches of 1 to 2,000 rows, every bit of the probes."""
    assert batch_dependence(1000) == 0


# -- host path -----------------------------------------------------------------------------------


def engine_step(case: Case) -> tuple[HostRows, torch.Tensor, torch.Tensor]:
    """The plugin's inputs: rows of a pack and a mask, all on the host; and the pack, to be kept."""
    order = sorted(range(len(case.slots)), key=case.slots.__getitem__)
    rows = [(m, x.cpu()) for m, item in case.items for x in item.split(1)]  # type: ignore[misc]
    case.items = [(rows[r][0], rows[r][1].to("cuda")) for r in order]
    case.slots = sorted(case.slots)
    mask = torch.zeros(len(case.input_ids), dtype=torch.bool)
    mask[case.slots] = True
    pack = directory(pack_rows([rows[r] for r in order]))
    widths = [p.width for p in case.projectors]
    return find_rows([pack], widths, case.table.dtype), mask, pack


@pytest.mark.parametrize("from_host", [True, False])
def test_no_device_sync(from_host: bool) -> None:
    case = gpu_case([768, 512], [60, 45], torch.bfloat16, item_rows=5)
    packed, mask, _pack = engine_step(case)
    sources = packed if from_host else case.items

    def step() -> torch.Tensor:
        return fuse_embeddings(
            case.input_ids, case.table, sources, case.projectors, slots=mask, backend="triton"
        )

    want = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
    check_against_torch(case, got)


@pytest.mark.parametrize("from_host", [True, False])
@pytest.mark.parametrize("rows", [3, 400])
def test_two_kernels_and_one_copy(rows: int, from_host: bool) -> None:
    case = gpu_case([768, 512], [rows, rows], torch.bfloat16, item_rows=5)
    packed, mask, _pack = engine_step(case)
    sources = packed if from_host else case.items

    def step() -> None:
        fuse_embeddings(
            case.input_ids, case.table, sources, case.projectors, slots=mask, backend="triton"
        )

    step()
    copies, kernels = launched_by(step)
    assert len(copies) <= 1, copies
    assert len(kernels) <= 2, kernels


def test_warm_up_leaves_nothing_to_compile() -> None:
    """Steps of an engine, rows in packs on the host, of any size."""
    case = gpu_case([768, 512], [0, 0], torch.bfloat16, ids_dtype=torch.int32)
    warm_up(case.projectors, backend="triton")
    made = len(backend_in_use().kernels)
    assert warm_up(case.projectors, backend="triton") == 0
    for counts in ([1, 0], [16, 17], [0, 33], [130, 70], [600, 1], [3000, 2000]):
        case = gpu_case([768, 512], counts, torch.bfloat16, item_rows=5, ids_dtype=torch.int32)
        packed, mask, _pack = engine_step(case)
        got = fuse_embeddings(
            case.input_ids, case.table, packed, case.projectors, slots=mask, backend="triton"
        )
        check_against_torch(case, got)
    assert len(backend_in_use().kernels) == made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[0, 0], [3, 0], [40, 9], [300, 700]])
def test_tritons_own_dispatch_gives_the_same_bits(
    counts: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs where the installed Triton launches otherwise than is known; forced here."""
    case = gpu_case([768, 770], counts, dtype, item_rows=9)
    want = check(case)
    assert not backend_in_use().kernels.dispatches(), "this Triton is launched past its dispatch"
    monkeypatch.setattr(triton_backend, "triton_backend", cache(TritonBackend))
    monkeypatch.setenv(DISPATCH_VARIABLE, "1")
    warm_up(case.projectors, backend="triton")
    assert torch.equal(check(case), want)
    assert backend_in_use().kernels.dispatches()


def test_compiled_kernels_outlive_a_collection() -> None:
    case = gpu_case([768], [40], torch.bfloat16)
    want = case.run("triton")
    gc.collect()
    assert torch.equal(case.run("triton"), want)


@pytest.mark.parametrize("device_is", ["busy", "idle", "idle at times"])
def test_an_upload_waits_for_its_rows_to_be_read(device_is: str) -> None:
    """Staging buffers and device buffers are used again; many steps in flight must not mix.

    Copies go beside the stream where it is busy, into it where it is idle.
    """
    case = gpu_case([768], [40], torch.bfloat16, item_rows=40)
    steps = []
    for seed in range(60):
        torch.manual_seed(seed)
        rows = torch.randn(40, 768).bfloat16()
        steps.append((directory(pack_rows([(0, rows)])), rows.cuda()))
    outs = []
    for at, (pack, _) in enumerate(steps):
        if device_is == "idle" or (device_is == "idle at times" and at % 7 == 0):
            torch.cuda.synchronize()
        elif device_is == "idle at times" or at == 0:
            torch.cuda._sleep(20_000_000 if at == 0 else 200_000)  # 10 ms: all are queued meanwhile
        outs.append(
            fuse_embeddings(
                case.input_ids,
                case.table,
                find_rows([pack], [768], torch.bfloat16),
                case.projectors,
                slots=case.slots,
                backend="triton",
            )
        )
    for out, (_, rows) in zip(outs, steps, strict=True):
        want = project_rows(rows, case.projectors[0], backend="triton")
        assert torch.equal(out[case.slots], want)


def captured(case: Case, out: torch.Tensor) -> tuple[torch.cuda.CUDAGraph, RowPlan]:
    """A graph of the case's step into `out`, and the plan, to be kept as long as the graph."""
    plan = plan_of(case)

    def step() -> None:
        fuse_embeddings(
            case.input_ids, case.table, plan, case.projectors, out=out, backend="triton"
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, plan


@pytest.mark.parametrize("rows", [4, 100])
def test_cuda_graph(rows: int) -> None:
    """A captured plan follows what is written into its rows and ids."""
    case = gpu_case([768], [rows], torch.bfloat16, item_rows=rows)
    out = poisoned(case)
    graph, _plan = captured(case, out)
    for seed in range(3):
        torch.manual_seed(seed)
        case.items[0][1].normal_()  # type: ignore[index]
        case.input_ids.random_(0, 50)
        out.fill_(NAN)
        graph.replay()
        torch.cuda.synchronize()
        check_against_torch(case, out)


def test_a_captured_graph_outlives_the_tables_of_others() -> None:
    """Two modalities: the kernels of the graph read a table of weights on the device."""
    case = gpu_case([768, 512], [30, 20], torch.bfloat16)
    out = poisoned(case)
    graph, _plan = captured(case, out)
    alive = []  # so that no address is used again
    for seed in range(200):
        other = gpu_case([64, 64], [1, 1], torch.bfloat16, hidden=64, columns=64, seed=seed)
        other.run("triton")
        alive.append(other)
    backend = backend_in_use()
    assert any(table.captured for table in backend._weights._tables.values())
    zeros = [torch.zeros(64, dtype=torch.int64, device="cuda") for _ in range(1000)]
    out.fill_(NAN)
    graph.replay()
    torch.cuda.synchronize()
    check_against_torch(case, out)
    assert not any(zero.any() for zero in zeros)


def test_streams_do_not_share_scratch() -> None:
    cases = [gpu_case([768], [500], torch.bfloat16, seed=seed) for seed in range(4)]
    wants = [case.run("triton") for case in cases]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(10):
        outs = []
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                outs.append(case.run("triton"))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(outs, wants, strict=True))


def test_under_torch_compile_the_op_is_a_graph_break() -> None:
    case = gpu_case([768, 512], [60, 45], torch.bfloat16)
    plan = plan_of(case)

    def step(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return fuse_embeddings(ids + 0, table, plan, case.projectors, backend="triton") * 2

    with torch.no_grad():
        compiled = torch.compile(step)
        assert torch.equal(compiled(case.input_ids, case.table), case.run("triton") * 2)


SANITIZED = """
import torch
from fusion_cases import make_case
for widths, counts in (([768], [3]), ([768, 770], [70, 9]), ([512, 64], [300, 1])):
    case = make_case(widths, counts, torch.bfloat16, hidden=512, columns=512, device="cuda")
    case.run("triton")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip(
            "needs compute-sanitizer, a part of the CUDA toolkit, on PATH or in /usr/local/cuda"
        )
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1] / "kernels")]),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        env=env,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
