"""The host's part of a step on a GPU, as far as a CPU can show it.

The staging buffer is made without pinning and some rows are declared to lie "on the device"; the
compiled kernels are stubs that record how they are launched.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fusion_cases import beside_projected, make_case

from mmqwen_kernels import HostRows, RowPlan, upload
from mmqwen_kernels import plan as plan_module
from mmqwen_kernels import sources as source_module
from mmqwen_kernels.plan import RowSource, plan_of_rows
from mmqwen_kernels.row_tables import _MAX_ROW_STRIDE, tables_of

WIDTHS = [8, 33, 24]


class Device:
    """Stands for a CUDA device in `plan_rows`; its memory is the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resident: set[int] = set()
        self.copies: list[int] = []
        monkeypatch.setattr(
            source_module, "_lies_on", lambda rows, device: rows.data_ptr() in self.resident
        )
        monkeypatch.setattr(plan_module, "uploader", lambda device: self)

    def lend(self, nbytes: int) -> SimpleNamespace:
        return SimpleNamespace(bytes=np.full(nbytes + 100, 255, dtype=np.uint8))

    def upload(self, staging: Any, nbytes: int, complete: Any) -> torch.Tensor:
        moved = torch.empty(nbytes, dtype=torch.uint8)
        complete(moved.data_ptr())
        moved.copy_(torch.from_numpy(staging.bytes[:nbytes]))
        self.copies.append(nbytes)
        return moved

    def put(self, rows: torch.Tensor) -> torch.Tensor:
        self.resident.add(rows.data_ptr())
        return rows

    def plan(self, sources: list[RowSource] | HostRows, slots: Any, tokens: int) -> RowPlan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source_module, "_settle", lambda rows, dtype, device: rows)
            return plan_module.plan_rows(
                sources, slots, tokens, WIDTHS, dtype=torch.float32, device="cuda:0"
            )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def entries_of(plan: RowPlan) -> list[list[int]]:
    return plan.buffer[: 64 * 4].view(torch.int64).view(-1, 8).tolist()


def read_back(plan: RowPlan) -> list[torch.Tensor]:
    """Every row, in the order of the entries, by the addresses that the kernels get."""
    import ctypes

    addresses = None
    if plan.addresses_at >= 0:
        end = plan.addresses_at + 8 * plan.num_rows
        addresses = plan.buffer[plan.addresses_at : end].view(torch.int64).tolist()
    rows = []
    for modality, first, count, base, stride, *_ in entries_of(plan):
        for r in range(count):
            where = base + r * stride * 4 if addresses is None else addresses[first + r]
            assert where % plan.align_bytes == 0
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
    assert len(device.copies) == 1, "one copy"
    twin = plan_module.plan_rows(
        case.items, case.slots, len(case.input_ids), WIDTHS, dtype=torch.float32, device="cpu"
    )
    assert torch.equal(made.order, twin.order)
    for a, b in zip(made.rows, twin.rows, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    assert (made.addresses_at < 0) or resident != "none"
    assert [made.address, made.stride] == entries_of(made)[0][3:5]


def test_rows_by_address_are_staged_contiguously_and_aligned(device: Device) -> None:
    case = make_case(WIDTHS, [7, 0, 6], torch.float32, item_rows=2)
    rows = [(m, row.clone()) for m, item in case.items for row in item]
    modality, address = zip(*((m, row.data_ptr()) for m, row in rows), strict=True)
    made = device.plan(
        HostRows(np.array(modality), np.array(address)), case.slots, len(case.input_ids)
    )
    assert made.addresses_at < 0
    assert [entry[4] for entry in entries_of(made)] == [8, 24, 0, 0]
    assert made.align_bytes == 16
    assert len(device.copies) == 1
    want = [x for m in (0, 2) for index, item in case.items if index == m for x in item]  # type: ignore[misc]
    assert all(torch.equal(a, b) for a, b in zip(read_back(made), want, strict=True))


def test_rows_are_converted_while_they_are_staged(device: Device) -> None:
    rows = torch.randn(3, 8).half()
    made = device.plan([(0, rows)], [2, 0, 1], 4)
    assert torch.equal(made.rows[0], rows.float())  # type: ignore[arg-type]


class Stream:
    """Stands for a CUDA stream; notes what it is told."""

    def __init__(self, name: str, idle: bool, log: list[tuple[str, ...]]) -> None:
        self.name, self.idle, self.log = name, idle, log

    def query(self) -> bool:
        return self.idle

    def wait_event(self, event: Any) -> None:
        self.log.append(("wait", self.name))


@pytest.mark.parametrize("busy", [True, False])
def test_a_copy_goes_beside_a_busy_stream_and_into_an_idle_one(
    monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    log: list[tuple[str, ...]] = []
    current, own = Stream("current", not busy, log), Stream("own", True, log)
    up = upload.Uploader.__new__(upload.Uploader)
    up.__dict__.update(_device=torch.device("cpu"), _stream=own, _idle={64: deque()})
    on = ["current"]

    def set_stream(stream: Stream) -> None:
        on[0] = stream.name

    def note(what: str, original: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            log.append((what, on[0]))
            return original(*args, **kwargs)

        return noted

    monkeypatch.setattr(up, "_current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch, "empty", note("allocated on", torch.empty))
    monkeypatch.setattr(torch.Tensor, "copy_", note("copied on", torch.Tensor.copy_))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log.append(("keep for", stream.name))
    )
    event = SimpleNamespace(record=lambda stream: log.append(("recorded on", stream.name)))
    pinned = torch.arange(64, dtype=torch.uint8)
    lent: Any = SimpleNamespace(pinned=pinned, nbytes=64, copied=event)

    def complete(address: int) -> None:
        pinned[0] = 7

    moved = up.upload(lent, 64, complete)
    assert moved.tolist() == [7, *range(1, 64)], "what depends on the address travels too"
    where = "own" if busy else "current"
    steps = [("allocated on", where), ("copied on", where), ("recorded on", where)]
    assert log == steps + ([("wait", "current"), ("keep for", "current")] if busy else [])
    assert on == ["current"]
    assert list(up._idle[64]) == [lent], "to be lent again"


def test_a_buffer_is_lent_again_once_its_copy_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    up = upload.Uploader.__new__(upload.Uploader)
    size = upload.SMALLEST_BYTES
    ran = [False]
    used: Any = SimpleNamespace(copied=SimpleNamespace(query=lambda: ran[0]))
    up.__dict__.update(_idle={size: deque([used])})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(upload, "Staging", lambda nbytes: f"new, {nbytes}")
    assert up.lend(100) == f"new, {size}"
    ran[0] = True
    assert up.lend(100) is used
    assert up.lend(100) == f"new, {size}"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before capturing"):
        up.lend(100)


def test_rows_too_far_apart_are_found_by_address() -> None:
    """In-tile offsets are int32: a huge row stride may not reach them."""
    memory = torch.empty(_MAX_ROW_STRIDE + 8, dtype=torch.bfloat16)  # never touched
    far = memory.as_strided((2, 8), (_MAX_ROW_STRIDE, 1))
    made = plan_module.plan_rows(
        [(0, far)], [0, 1], 2, [8], dtype=torch.bfloat16, device=far.device
    )
    assert made.addresses_at >= 0
    assert plan_of_rows(far).stride == 8, "copied, where there is no table for addresses"
    entries, addresses, _ = tables_of([[(4096, _MAX_ROW_STRIDE, 2)]], [2], [8], 4, True)
    assert addresses is not None
    assert addresses[1] - addresses[0] == _MAX_ROW_STRIDE * 4
    assert entries[2] == 2


# -- launches ------------------------------------------------------------------------------------


class Variant:
    """A compiled kernel that remembers how it was made and launched."""

    def __init__(self, source: Any, options: dict[str, Any], constants: Any) -> None:
        names = source.fn.arg_names
        self.name = source.fn.__name__
        self.constants = dict(zip([n for n in names if n.isupper()], constants, strict=True))
        self.arguments = [n for n in names if not n.isupper()]
        self.options = options
        self.launches: list[tuple[int, dict[str, Any]]] = []

    def __call__(self, programs: int, stream: int, *args: Any) -> None:
        assert all(type(a) is int for a in args), "addresses and numbers alone"
        self.launches.append((programs, dict(zip(self.arguments, args, strict=True))))


class Stubbed:
    """A backend for an H100 whose kernels are stubs and whose memory is the host's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mmqwen_kernels import launcher, weights
        from mmqwen_kernels import triton_backend as module

        self.variants: list[Variant] = []
        self.alive: list[Any] = []  # so that no address is used again

        def make(*args: Any) -> Variant:
            self.variants.append(Variant(*args))
            return self.variants[-1]

        monkeypatch.setattr(launcher, "Compiled", make)
        self.stream, self.capturing = 0, False
        for where in (module, weights):
            monkeypatch.setattr(where, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(weights, "capturing", lambda device: self.capturing)
        self.backend = module.TritonBackend(torch.device("cpu"))
        self.backend.capability, self.backend.num_sms = (9, 0), 132
        self.backend._interpret = self.backend.kernels._dispatch = False
        monkeypatch.setattr(self.backend, "_on_device", lambda: module._NOTHING)

    @property
    def tables(self) -> Any:
        return self.backend._weights._tables

    def of(self, name: str) -> list[Variant]:
        return [v for v in self.variants if v.name == f"_{name}_kernel"]

    def launches(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        return [launch for v in self.of(name) for launch in v.launches]


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Stubbed:
    pytest.importorskip("triton")
    return Stubbed(monkeypatch)


def run(stubbed: Stubbed, case: Any, **more: Any) -> None:
    plan = plan_module.plan_rows(
        case.items,
        case.slots,
        len(case.input_ids),
        [p.width for p in case.projectors],
        dtype=case.table.dtype,
        device="cpu",
    )
    stubbed.backend.fuse(
        case.input_ids,
        case.table,
        plan,
        case.projectors,
        **more,
    )


def bf16_case(counts: list[int], **more: Any) -> Any:
    return make_case([64] * len(counts), counts, torch.bfloat16, hidden=128, columns=64, **more)


class TestLaunches:
    @pytest.mark.parametrize("counts", [[1], [40], [500], [3, 70, 1, 9]])
    def test_two_launches_and_no_more(self, stubbed: Stubbed, counts: list[int]) -> None:
        run(stubbed, bf16_case(counts))
        assert [v.name for v in stubbed.variants] == ["_project_up_kernel", "_project_down_kernel"]
        assert [len(v.launches) for v in stubbed.variants] == [1, 1]

    def test_grids_cover_tiles_and_text(self, stubbed: Stubbed) -> None:
        run(stubbed, bf16_case([40, 70], text=90))
        up, down = stubbed.variants
        programs, named = down.launches[0]

        def tiles(v: Variant, width: int) -> int:
            per_row_tile = -(-width // v.constants["BLOCK_N"])
            return sum(-(-n // v.constants["BLOCK_R"]) for n in (40, 70)) * per_row_tile

        assert up.launches[0][0] == tiles(up, 128)
        text = -(-90 // down.constants["BLOCK_T"]) * -(-64 // down.constants["BLOCK_D"])
        assert programs == tiles(down, 64) + text
        assert named["num_text"] == 90
        assert named["slots_ptr"] == named["text_ptr"] + 8 * 90

    def test_one_modality_needs_no_tables(self, stubbed: Stubbed) -> None:
        case = bf16_case([9], item_rows=9)
        run(stubbed, case)
        up, down = stubbed.variants
        assert up.constants["NUM_ENTRIES"] == down.constants["NUM_ENTRIES"] == 1
        named = up.launches[0][1]
        assert named["w_address"] == case.projectors[0].w1.data_ptr()
        assert named["x_address"] == case.items[0][1].data_ptr()
        assert (named["count"], named["width"], named["units"]) == (9, 64, 128)
        assert down.launches[0][1]["w_address"] == case.projectors[0].w2.data_ptr()
        run(stubbed, bf16_case([0, 9, 0]))
        assert stubbed.variants[-1].constants["NUM_ENTRIES"] == 4, "room for all modalities"

    def test_no_rows_is_one_light_launch(self, stubbed: Stubbed) -> None:
        run(stubbed, bf16_case([0]))
        assert [v.name for v in stubbed.variants] == ["_gather_text_kernel"]
        run(stubbed, bf16_case([9], text=0))
        assert stubbed.launches("project_down")[0][1]["num_text"] == 0

    @pytest.mark.parametrize("counts", [[0, 0], [5, 9]])
    def test_rows_projected_before_cost_no_launch_of_their_own(
        self, stubbed: Stubbed, counts: list[int]
    ) -> None:
        case = bf16_case(counts, text=20, ids_dtype=torch.int32)
        stubbed.backend.warm_up(case.projectors, projected=True)
        made = len(stubbed.variants)
        for count in (3, 11):
            beside = beside_projected(case, count)
            case.items, case.slots = beside.sources, beside.slots  # type: ignore[assignment]
            run(stubbed, case)
            case = bf16_case(counts, text=20, ids_dtype=torch.int32)
        assert len(stubbed.variants) == made, "nothing was left to compile"
        ups, downs = stubbed.launches("project_up"), stubbed.launches("project_down")
        assert (len(ups), len(downs)) == (2 if any(counts) else 0, 2)
        used = [v for v in stubbed.of("project_down") if v.launches]
        assert all(v.constants["PROJECTED"] for v in used)
        assert [v.constants["DEPENDENT"] for v in used] == [any(counts)]
        assert [v.options.get("launch_pdl", False) for v in used] == [any(counts)]
        assert downs[-1][1]["num_text"] == 20, "text and rows projected before"

    def test_new_counts_reuse_the_compiled_kernel(self, stubbed: Stubbed) -> None:
        for count in range(33, 60):
            run(stubbed, bf16_case([count]))
        assert len(stubbed.of("project_up")) == len(stubbed.of("project_down")) == 1
        assert len(stubbed.launches("project_up")) == 27

    @pytest.mark.parametrize("counts", [[1, 0], [3, 40], [0, 128], [70, 200], [600, 9], [2000, 1]])
    def test_warm_up_leaves_nothing_to_compile(self, stubbed: Stubbed, counts: list[int]) -> None:
        case = make_case(
            [64, 64], counts, torch.bfloat16, hidden=2048, columns=1024, text=9, item_rows=4000,
            ids_dtype=torch.int32,
        )  # fmt: skip
        made = stubbed.backend.warm_up(case.projectors)
        assert made == len(stubbed.variants) > 0
        assert not any(v.launches for v in stubbed.variants)
        run(stubbed, case)
        assert len(stubbed.variants) == made
        assert stubbed.backend.warm_up(case.projectors) == 0

    def test_options_reach_the_compiler(self, stubbed: Stubbed) -> None:
        run(stubbed, bf16_case([5]))
        up, down = stubbed.variants
        pinned = {"enable_fp_fusion": True}
        assert up.options == {"num_warps": 4, "num_stages": 6, **pinned}
        assert down.options == {"num_warps": 4, "num_stages": 8, "launch_pdl": True, **pinned}
        assert up.constants["ALIGN"] == 8
        assert up.constants["SWAP"]
        assert up.constants["DEPENDENT"]

    def test_unaligned_rows_are_said_to_be_so(self, stubbed: Stubbed) -> None:
        run(stubbed, make_case([33], [5], torch.bfloat16, hidden=128, columns=64))
        up, down = stubbed.variants
        assert up.constants["ALIGN"] == down.constants["ALIGN"] == 1
        assert not up.constants["EVEN_K"]

    def test_weights_are_tabled_once(self, stubbed: Stubbed) -> None:
        case = bf16_case([5, 3])
        for _ in range(3):
            run(stubbed, case)
        tables = {named["weights_ptr"] for _, named in stubbed.launches("project_up")}
        assert len(tables) == 1
        (weights,) = stubbed.tables.values()
        assert weights.table[0, 4:6].tolist() == [64, 128]
        assert weights.table[1, 0] == case.projectors[1].w1.data_ptr()


class TestWeightTables:
    """What is kept of weights, by what, and for how long."""

    @staticmethod
    def others(stubbed: Stubbed, count: int, modalities: int = 2) -> Any:
        """Run `count` steps, each with projectors of its own; the last step's case."""
        for seed in range(count):
            case = bf16_case([3] * modalities, text=1, seed=seed)
            run(stubbed, case)
            stubbed.alive.append(case)
        return case

    @pytest.mark.parametrize("modalities", [1, 2])
    @pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2"])
    def test_what_is_checked_once_is_checked_again_where_it_changed(
        self, stubbed: Stubbed, name: str, modalities: int
    ) -> None:
        """Each differs from what has been seen in one thing, at the same address."""
        case = bf16_case([3] * modalities)
        own = case.projectors[-1]
        tensor = getattr(own, name)
        base = torch.zeros(tensor.numel() * 2, dtype=tensor.dtype)
        shape = tensor.shape
        case.projectors[-1] = own._replace(**{name: base[: tensor.numel()].view(shape)})
        run(stubbed, case)
        strides = [2] if tensor.ndim == 1 else [2 * shape[1], 2]
        wrong = [
            ("transposed", base.as_strided(shape, strides)),
            ("torch.float16", base[: tensor.numel()].view(shape).view(torch.float16)),
            ("do not fit together", base[: tensor.numel()].view(shape)[:-8]),
        ]
        for message, other in wrong:
            assert other.data_ptr() == base.data_ptr()
            case.projectors[-1] = own._replace(**{name: other})
            with pytest.raises(ValueError, match=message):
                run(stubbed, case)

    def test_the_least_recently_used_goes_first(self, stubbed: Stubbed) -> None:
        case = self.others(stubbed, 1)
        (table,) = stubbed.tables.values()
        for _ in range(3):
            self.others(stubbed, 40)
            run(stubbed, case)
        assert table in stubbed.tables.values(), "used all along"
        assert len(stubbed.tables) == 64
        gone = weakref.ref(table)
        del table
        self.others(stubbed, 64)
        gc.collect()
        assert gone() is None

    def test_a_table_that_a_graph_reads_stays(self, stubbed: Stubbed) -> None:
        case = self.others(stubbed, 1)
        stubbed.capturing = True
        run(stubbed, case)
        stubbed.capturing = False
        captured = stubbed.launches("project_down")[-1][1]["weights_ptr"]
        self.others(stubbed, 200)
        kept = [w for w in stubbed.tables.values() if w.address == captured]
        assert [w.captured for w in kept] == [True]
        assert kept[0].table.data_ptr() == captured
        assert kept[0].table[0, 0] == case.projectors[0].w1.data_ptr()
        assert len(stubbed.tables) == 65, "and the least recently used of 64 others"

    def test_a_table_outlives_what_other_streams_have_queued(
        self, stubbed: Stubbed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[tuple[int, Any]] = []
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stubbed.stream)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda t, stream: told.append((t.data_ptr(), stream))
        )
        case = self.others(stubbed, 1)
        for stream in (0, 7, 7, 0, 9):
            stubbed.stream = stream
            run(stubbed, case)
        (table,) = stubbed.tables.values()
        assert told == [(table.address, 7), (table.address, 9)], "made on stream 0; once a stream"
