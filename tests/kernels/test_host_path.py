"""The host's part of a step on a GPU, as far as a CPU can show it.

The staging buffer is made without pinning and some rows are declared to lie "on the device"; the
compiled kernels are stubs that record how they are launched.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from fusion_cases import make_case

from mmqwen_kernels import RowPlan, directory, pack_rows
from mmqwen_kernels import plan as plan_module
from mmqwen_kernels.plan import RowSource

WIDTHS = [8, 33, 24]


class Device:
    """Stands for a CUDA device in `plan_rows`; its memory is the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resident: set[int] = set()
        monkeypatch.setattr(plan_module, "_on_host", lambda p: p.data_ptr() not in self.resident)
        self.staged: list[int] = []

        def staging(nbytes: int) -> torch.Tensor:
            self.staged.append(nbytes)
            return torch.full((nbytes,), 255, dtype=torch.uint8)

        monkeypatch.setattr(plan_module, "_staging", staging)

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        self.resident.add(rows.data_ptr())
        return rows

    def plan(self, sources: list[RowSource], slots: Any, tokens: int) -> RowPlan:
        positions = plan_module.slots_of_mask(slots)
        parts, of_rows, counts = plan_module._sort_sources(sources, WIDTHS)
        order = slice(None) if of_rows is None else of_rows.argsort(kind="stable")
        positions = positions[order].astype("int32")
        table = torch.full((tokens,), -1, dtype=torch.int32).numpy()
        table[positions] = range(len(positions))
        return plan_module._finish_on_device(
            parts, counts, positions, table, WIDTHS, torch.float32, torch.device("cpu")
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def read_back(plan: RowPlan) -> list[torch.Tensor]:
    """Every row, in the order of the entries, by the addresses that the kernels get."""
    import ctypes

    entries, addresses, align = plan.tables
    rows = []
    for modality, first, count, base, stride, *_ in entries.tolist():
        for r in range(count):
            where = base + r * stride * 4 if addresses is None else int(addresses[first + r])
            assert where % align == 0
            rows.append(torch.tensor((ctypes.c_float * WIDTHS[modality]).from_address(where)))
    return rows


@pytest.mark.parametrize("resident", ["none", "all", "odd", "one modality"])
@pytest.mark.parametrize("counts", [[5, 0, 0], [3, 4, 0], [7, 2, 6]])
def test_rows_wherever_they_lie(device: Device, counts: list[int], resident: str) -> None:
    case = make_case(WIDTHS, counts, torch.float32, item_rows=2)
    for at, (m, rows) in enumerate(case.items):  # type: ignore[misc]
        if (
            resident == "all"
            or (resident == "odd" and at % 2)
            or (resident == "one modality" and m == 0)
        ):
            device.put(rows)
    made = device.plan(case.items, case.slots, len(case.input_ids))
    want = [x for m in range(3) for index, item in case.items if index == m for x in item]  # type: ignore[misc]
    got = read_back(made)
    assert len(got) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert len(device.staged) == 1, "one copy"
    twin = plan_module.plan_rows(
        case.items, case.slots, len(case.input_ids), WIDTHS, dtype=torch.float32, device="cpu"
    )
    assert torch.equal(made.slot_table, twin.slot_table)
    assert torch.equal(made.all_slots, twin.all_slots)
    for a, b in zip(made.rows, twin.rows, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    everything_staged = resident == "none"
    assert (made.tables.row_addresses is None) or not everything_staged


def test_packs_are_staged_contiguously_and_aligned(device: Device) -> None:
    case = make_case(WIDTHS, [7, 0, 6], torch.float32, item_rows=2)
    pack = directory(pack_rows(case.items))  # type: ignore[arg-type]
    made = device.plan([pack[:4], pack[4:]], case.slots, len(case.input_ids))
    assert made.tables.row_addresses is None
    assert made.tables.entries[:, 4].tolist() == [8, 24]
    for part in made.parts:
        assert len(part) <= 1
        assert all(p.is_contiguous() for p in part)


def test_rows_are_converted_while_they_are_staged(device: Device) -> None:
    rows = torch.randn(3, 8).half()
    made = device.plan([(0, rows)], [2, 0, 1], 4)
    assert torch.equal(made.rows[0], rows.float())  # type: ignore[arg-type]


def test_rows_too_far_apart_are_found_by_address() -> None:
    """In-tile offsets are int32: a huge row stride may not reach them."""
    spans = [[(4096, plan_module._MAX_ROW_STRIDE, 2)]]
    entries, addresses, _ = plan_module._tables_of_spans(spans, [2], [8], 4)
    assert addresses is not None
    assert addresses[1] - addresses[0] == plan_module._MAX_ROW_STRIDE * 4
    assert entries[0, 2] == 2


# -- launches ------------------------------------------------------------------------------------


class StubKernel:
    """Compiles at the first launch of a variant, as Triton does."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.compilations: list[dict[str, Any]] = []
        self.launches: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: Any, **options: Any) -> Any:
            assert len(args) == len(self.names), "every parameter by position"
            self.compilations.append(options)
            self.launches.append((grid, dict(zip(self.names, args, strict=True))))
            return _Compiled(self)

        return first


class _Compiled:
    def __init__(self, kernel: StubKernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert len(grid) == 3, "CompiledKernel takes a 3-tuple"

        def again(*args: Any) -> None:
            assert len(args) == len(self.kernel.names)
            named = dict(zip(self.kernel.names, args, strict=True))
            self.kernel.launches.append((grid, named))

        return again


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A backend for an H100 whose kernels are stubs and whose memory is the host's."""
    pytest.importorskip("triton")
    from mmqwen_kernels import triton_backend as module

    backend = module.TritonBackend(torch.device("cpu"))
    backend.capability, backend.num_sms, backend._interpret = (9, 0), 132, False
    monkeypatch.setattr(backend, "_on_device", lambda: module._NOTHING)
    for name in ("_up", "_down", "_text", "_scatter"):
        launcher = getattr(backend, name)
        launcher._kernel = StubKernel(list(launcher._kernel.arg_names))
    return backend


def run(backend: Any, case: Any, **more: Any) -> None:
    plan = plan_module.plan_rows(
        case.items,
        case.slots,
        len(case.input_ids),
        [p.w1.shape[1] for p in case.projectors],
        dtype=case.table.dtype,
        device="cpu",
    )
    backend.fuse(
        case.input_ids,
        case.table,
        plan.slot_table,
        plan.all_slots,
        plan.tables,
        plan.counts,
        case.projectors,
        **more,
    )


def bf16_case(counts: list[int], **more: Any) -> Any:
    return make_case([64] * len(counts), counts, torch.bfloat16, hidden=128, columns=64, **more)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the JIT's names")
class TestLaunches:
    @pytest.mark.parametrize("counts", [[1], [40], [500], [3, 70, 1, 9]])
    def test_two_launches_and_no_more(self, stubbed: Any, counts: list[int]) -> None:
        run(stubbed, bf16_case(counts))
        assert len(stubbed._up._kernel.launches) == len(stubbed._down._kernel.launches) == 1
        assert not stubbed._text._kernel.launches

    def test_grids_cover_tiles_and_text(self, stubbed: Any) -> None:
        run(stubbed, bf16_case([40, 70], text=90))
        (grid, up), (grid_down, down) = (
            stubbed._up._kernel.launches[0],
            stubbed._down._kernel.launches[0],
        )
        tiles = lambda n: -(-40 // up["BLOCK_R"]) * n + -(-70 // up["BLOCK_R"]) * n  # noqa: E731
        assert grid == (tiles(-(-128 // up["BLOCK_N"])), 1, 1)
        text = -(-200 // down["BLOCK_T"]) * -(-64 // down["BLOCK_D"])
        assert grid_down == (tiles(-(-64 // down["BLOCK_N"])) + text, 1, 1)
        assert down["num_tokens"] == 200
        assert down["HAS_TEXT"]

    def test_no_rows_is_one_light_launch_and_no_text_none_of_its_tiles(self, stubbed: Any) -> None:
        run(stubbed, bf16_case([0]))
        assert len(stubbed._text._kernel.launches) == 1
        assert not stubbed._up._kernel.launches
        run(stubbed, bf16_case([9], text=0))
        assert not stubbed._down._kernel.launches[0][1]["HAS_TEXT"]

    def test_new_counts_reuse_the_compiled_kernel(self, stubbed: Any) -> None:
        for count in range(33, 60):
            run(stubbed, bf16_case([count]))
        assert len(stubbed._up._kernel.compilations) == 1
        assert len(stubbed._down._kernel.compilations) == 1
        assert len(stubbed._up._kernel.launches) == 27

    def test_options_reach_the_compiler(self, stubbed: Any) -> None:
        run(stubbed, bf16_case([5]))
        up, down = stubbed._up._kernel.compilations[0], stubbed._down._kernel.compilations[0]
        assert up == {"num_warps": 4, "num_stages": 6}
        assert down == {"num_warps": 4, "num_stages": 4, "launch_pdl": True}
        launched = stubbed._up._kernel.launches[0][1]
        assert (launched["ALIGN"], launched["SWAP"], launched["DEPENDENT"]) == (8, True, True)

    def test_unaligned_rows_go_through_tritons_own_launch(self, stubbed: Any) -> None:
        case = make_case([33], [5], torch.bfloat16, hidden=128, columns=64)
        run(stubbed, case)
        run(stubbed, case)
        assert len(stubbed._up._kernel.compilations) == 2
        launched = stubbed._up._kernel.launches[0][1]
        assert launched["ALIGN"] == 1
        assert not launched["EVEN_K"]

    def test_weights_are_tabled_once(self, stubbed: Any) -> None:
        case = bf16_case([5])
        for _ in range(3):
            run(stubbed, case)
        tables = {id(n["weights_ptr"]) for _, n in stubbed._up._kernel.launches}
        assert len(tables) == 1
        assert stubbed._up._kernel.launches[0][1]["weights_ptr"][0, 4:6].tolist() == [64, 128]
