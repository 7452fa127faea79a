"""The kernels under Triton's interpreter. Run by `test_interpreter.py` with TRITON_INTERPRET=1.

float16 and float32 only: the interpreter's `tl.dot` on bfloat16 returns garbage.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from fusion_cases import (
    EVERY_SPEC,
    Case,
    beside_projected,
    in_whole_numbers,
    make_case,
    make_projector,
    rows_that_stay,
    shard,
    spec_name,
)
from rounding import assert_within, projected_bounds

from mmqwen_kernels import (
    ACTIVATIONS,
    HostRows,
    LaunchConfig,
    RowPlan,
    TileConfig,
    fuse_embeddings,
    plan_rows,
    project_rows,
    select_backend,
)

NAN = float("nan")
DTYPES = (torch.float16, torch.float32)
SMALL = LaunchConfig(
    TileConfig(16, 32, 32, 4, 2), TileConfig(16, 32, 32, 4, 2, group_r=2), block_t=16, block_d=64
)
SWAPPED = LaunchConfig(
    TileConfig(16, 64, 64, 4, 2, swap=True),
    TileConfig(16, 64, 32, 4, 2, swap=True),
    block_t=16,
    block_d=64,
)


def poisoned(case: Case) -> torch.Tensor:
    return torch.full((len(case.input_ids), case.columns), NAN, dtype=case.table.dtype)


def check(case: Case, **more: object) -> None:
    out = poisoned(case)
    assert case.run("triton", out=out, **more) is out
    case.check(out)


def plan_of(case: Case) -> RowPlan:
    return plan_rows(
        case.items,
        case.slots,
        len(case.input_ids),
        [p.width for p in case.projectors],
        dtype=case.table.dtype,
        device="cpu",
    )


def test_it_is_the_kernels_that_run() -> None:
    assert select_backend("cpu", torch.float16, "triton").name == "triton"
    with pytest.raises(ValueError, match="bfloat16 wrongly"):
        select_backend("cpu", torch.bfloat16, "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 63, 64, 65])
def test_rows_one_modality(rows: int, dtype: torch.dtype) -> None:
    check(make_case([48], [rows], dtype, item_rows=64))


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 63, 64, 65])
@pytest.mark.parametrize("launch", [SMALL, SWAPPED])
def test_rows_with_several_tiles(rows: int, launch: LaunchConfig) -> None:
    """Tiles smaller than the case, so that every edge is crossed; items found by address."""
    case = make_case([48, 32], [rows, 19], torch.float16, item_rows=5)
    assert plan_of(case).addresses_at >= 0
    check(case, launch=launch)
    alone = make_case([48], [rows], torch.float16, item_rows=5)  # one entry: no tables
    check(alone, launch=launch)


# 77 and 385: what 770 and 385 are to a tile, widths that no 16-byte copy can serve.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 16, 24, 33, 64, 77, 100, 128])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(make_case([width], [9], dtype), launch=SMALL)
    check(make_case([width], [9], dtype), launch=SWAPPED)


@pytest.mark.parametrize("hidden", [1, 17, 96, 130])
@pytest.mark.parametrize("columns", [1, 50, 80, 129])
def test_hidden_sizes_and_columns(hidden: int, columns: int) -> None:
    check(make_case([24], [9], torch.float32, hidden=hidden, columns=columns), launch=SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("widths", "counts"),
    [
        ([24, 40], [1, 30]),
        ([24, 40, 64], [17, 0, 3]),
        ([24, 40, 64, 33], [2, 40, 1, 9]),
        ([24, 40, 64, 32], [0, 0, 0, 5]),
        ([16] * 9, [1, 2, 0, 1, 3, 0, 1, 1, 2]),
    ],
)
def test_modalities_with_unequal_loads(
    widths: list[int], counts: list[int], dtype: torch.dtype
) -> None:
    check(make_case(widths, counts, dtype))
    check(make_case(widths, counts, dtype), launch=SMALL)


def test_modalities_of_different_hidden_sizes() -> None:
    check(make_case([24, 40], [9, 20], torch.float16, hidden=[96, 33]), launch=SMALL)


@pytest.mark.parametrize("item_rows", [1, 4, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_items(item_rows: int, dtype: torch.dtype) -> None:
    """What lies between the rows is NaN: reading past a row's end would show."""
    check(make_case([40, 33], [6, 9], dtype, strided=True, item_rows=item_rows))


@pytest.mark.parametrize("width", [9, 16])
def test_rows_by_address(width: int) -> None:
    case = in_whole_numbers(make_case([width, 24], [5, 4], torch.float32))
    want = case.run("triton")
    rows = [(m, row.clone()) for m, item in case.items for row in item]
    modality, address = zip(*((m, row.data_ptr()) for m, row in rows), strict=True)
    case.items = HostRows(np.array(modality), np.array(address))  # type: ignore[assignment]
    assert torch.equal(case.run("triton"), want)


@pytest.mark.parametrize("stays", [(True, False), (True, True)])
@pytest.mark.parametrize("width", [9, 16])
def test_rows_by_address_that_stay(width: int, stays: tuple[bool, bool]) -> None:
    """Rows of one modality lie here and there: in a table of the device, and on the host."""
    case = in_whole_numbers(make_case([width, 24], [5, 4], torch.float32))
    want = case.run("triton")
    case.items = rows_that_stay(case.items, stays)  # type: ignore[assignment]
    assert torch.equal(case.run("triton"), want)


@pytest.mark.parametrize(
    ("widths", "counts", "columns", "stays", "launch"),
    [
        ([24], [0], 80, (False,), None),
        ([24, 33], [0, 0], 49, (False,), SMALL),
        ([24], [9], 80, (False,), SMALL),
        ([24, 33], [5, 9], 130, (True, False), SWAPPED),
        ([24, 40, 16], [0, 7, 0], 64, (True,), None),
    ],
)
def test_rows_projected_before(
    widths: list[int],
    counts: list[int],
    columns: int,
    stays: tuple[bool, ...],
    launch: LaunchConfig | None,
) -> None:
    """They are gathered as text rows are, beside text and rows that K2 multiplies, or without."""
    dtype = torch.float16 if launch is SWAPPED else torch.float32
    case = make_case(widths, counts, dtype, columns=columns, text=23)
    for count in (1, 17):
        beside = beside_projected(case, count, stays)
        out = poisoned(case)
        fuse_embeddings(
            case.input_ids, case.table, beside.sources, case.projectors,
            slots=beside.slots, out=out, backend="triton", launch=launch,
        )  # fmt: skip
        beside.check(case, out)


def test_rows_projected_before_are_added_once_over_ranks() -> None:
    case = make_case([24, 33], [3, 4], torch.float32, text=40)
    parts = []
    for rank in range(2):
        mine, beside = shard(case, rank, 2), beside_projected(case, 21, rank=rank, ranks=2)
        got = fuse_embeddings(
            mine.input_ids, mine.table, beside.sources, mine.projectors,
            slots=beside.slots, vocab_start=mine.vocab_start, backend="triton",
        )  # fmt: skip
        beside.check(mine, got, rank, 2)
        parts.append(got)
    beside.check(case, parts[0] + parts[1])


def test_expanded_items() -> None:
    case = make_case([40], [0], torch.float32)
    case.items = [(0, torch.randn(1, 40).expand(4, 40))]
    case.slots = [4, 1, 0, 2]
    check(case)


def test_poison_behind_the_rows_does_not_leak() -> None:
    """Rows, weights and biases each end where NaN begins."""
    case = make_case([33], [5], torch.float32, item_rows=5)

    def at_the_brink(tensor: torch.Tensor) -> torch.Tensor:
        flat = torch.full((tensor.numel() + 64,), NAN)
        flat[: tensor.numel()] = tensor.flatten()
        return flat[: tensor.numel()].view(tensor.shape)

    case.items = [(m, at_the_brink(x)) for m, x in case.items]  # type: ignore[misc]
    case.projectors = [p.map(at_the_brink) for p in case.projectors]
    check(case, launch=SMALL)
    check(case, launch=SWAPPED)


@pytest.mark.parametrize("launch", [SMALL, SWAPPED])
def test_neighbours_are_untouched(launch: LaunchConfig) -> None:
    """`out` is a window of rows and columns of a larger poisoned buffer."""
    case = make_case([24, 40], [7, 20], torch.float16)
    tokens = len(case.input_ids)
    buffer = torch.full((tokens + 6, case.columns + 24), NAN, dtype=torch.float16)
    out = buffer[3:-3, 8 : 8 + case.columns]
    case.run("triton", out=out, launch=launch)
    case.check(out)
    buffer[3:-3, 8 : 8 + case.columns] = NAN
    assert buffer.isnan().all()


def test_a_nan_row_stays_in_its_slot() -> None:
    case = make_case([24], [9], torch.float32, item_rows=1)
    case.items[4][1].fill_(NAN)  # type: ignore[index]
    out = case.run("triton")
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [case.slots[4]]
    assert out[case.slots[4]].isnan().all(), "NaN goes through ReLU, as in torch"


def test_no_text_at_all() -> None:
    check(make_case([24], [9], torch.float32, text=0))


def test_nothing_at_all() -> None:
    case = make_case([24], [0], torch.float32, text=0)
    assert case.run("triton").shape == (0, case.columns)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_long_text(ids_dtype: torch.dtype) -> None:
    check(make_case([24], [3], torch.float32, text=70, ids_dtype=ids_dtype))
    tiny = dataclasses.replace(SMALL, block_t=4, block_d=32)
    check(make_case([24], [3], torch.float32, text=70, ids_dtype=ids_dtype), launch=tiny)


def test_ids_at_slots_of_rows_do_not_matter() -> None:
    case = make_case([24], [9], torch.float32)
    case.input_ids[case.slots] = 10**6
    out = case.run("triton")
    assert not out.isnan().any()


@pytest.mark.parametrize("rows", [0, 12])
def test_vocabulary_and_projector_shards_sum_to_the_whole(rows: int) -> None:
    case = make_case([24, 33], [rows, rows], torch.float32, text=40)
    parts = [shard(case, rank, 2) for rank in range(2)]
    total = parts[0].run("triton") + parts[1].run("triton")
    case.check(total)  # one more order of the same sums
    for part in parts:
        part.check(part.run("triton"))


def test_no_bias_anywhere() -> None:
    check(make_case([24, 33], [3, 4], torch.float32, bias=False))


# -- kinds of projectors -------------------------------------------------------------------------

SPREAD = [EVERY_SPEC[at] for at in (6, 9, 13, 19, 22, 26, 32, 34, 35)]


@pytest.mark.parametrize("spec", SPREAD, ids=spec_name)
@pytest.mark.parametrize("launch", [SMALL, SWAPPED], ids=["small", "swapped"])
def test_kinds_of_projectors(spec: dict[str, Any], launch: LaunchConfig) -> None:
    """Widths on and off a multiple of every block; the rest of the kinds is for test_gpu.py."""
    dtype = torch.float16 if launch is SWAPPED else torch.float32
    check(make_case([64], [5], dtype, specs=[spec]), launch=launch)
    check(make_case([33], [5], dtype, hidden=70, strided=True, specs=[spec]), launch=launch)


@pytest.mark.parametrize(("launch", "dtype"), [(SMALL, torch.float32), (SWAPPED, torch.float16)])
def test_modalities_of_different_kinds(launch: LaunchConfig, dtype: torch.dtype) -> None:
    """One launch, each group with its own activation, norm and layers."""
    specs = [{"activation": name, "bias": name != "gelu"} for name in ACTIVATIONS]
    specs += [{"norm": "rms", "layers": 1}, {"norm": "layer", "activation": "gelu"}, {"layers": 1}]
    widths = [24, 33, 40, 24, 16, 70, 48, 24]
    counts = [3, 2, 0, 17, 1, 2, 4, 3]
    check(make_case(widths, counts, dtype, hidden=40, specs=specs), launch=launch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_rows_far_from_zero(dtype: torch.dtype) -> None:
    """The variance is of the differences: that of E[x^2] - E[x]^2 would be lost here."""
    case = make_case([96], [3], dtype, specs=[{"norm": "layer"}])
    case.items = [(m, x + 100) for m, x in case.items]  # type: ignore[misc]
    check(case)


def test_shards_of_every_kind_sum_to_the_whole() -> None:
    specs = [{"layers": 1, "norm": "layer"}, {"activation": "gelu", "norm": "rms"}, {"bias": False}]
    case = make_case([24, 33, 16], [6, 5, 4], torch.float32, specs=specs)
    parts = [shard(case, rank, 2) for rank in range(2)]
    case.check(parts[0].run("triton") + parts[1].run("triton"))


def test_every_activation_lets_nan_and_infinity_through_as_torch_does() -> None:
    for name in ACTIVATIONS:
        case = make_case([24], [3], torch.float32, item_rows=1, specs=[{"activation": name}])
        case.items[0][1][0, 0] = NAN  # type: ignore[index]
        case.items[1][1][0, 0] = float("inf")  # type: ignore[index]
        torch.testing.assert_close(case.run("triton"), case.run("torch"), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_rows(dtype: torch.dtype) -> None:
    projector = make_projector(40, 96, 80, dtype)
    rows = torch.randn(19, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = project_rows(rows, projector, backend="triton")
    assert_within(got, projected_bounds(rows, projector))
    assert project_rows(rows[:0], projector, backend="triton").shape == (0, 80)
    with pytest.raises(ValueError, match=r"expected \[R, 40\]"):
        project_rows(rows[:, :39], projector, backend="triton")


def test_runs_are_bit_identical_and_do_not_depend_on_the_batch() -> None:
    """A row alone, and the same row among 40 others with other tiles: the same bits.

    The interpreter multiplies tiles by numpy's BLAS, which may sum a row of a tile in an order of
    its own: whole numbers have one sum. That rounding follows no batch either is for test_gpu.py.
    """
    case = in_whole_numbers(make_case([24], [41], torch.float32, item_rows=1))
    whole = case.run("triton")
    assert torch.equal(whole.double(), case.exact())
    assert torch.equal(whole, case.run("triton"))
    alone = Case(case.input_ids[:1], case.table, case.items[7:8], [0], case.projectors)
    assert torch.equal(alone.run("triton")[0], whole[case.slots[7]])


# -- errors --------------------------------------------------------------------------------------


def test_refusals() -> None:
    case = make_case([24], [3], torch.float32)
    with pytest.raises(ValueError, match="out is"):
        case.run("triton", out=torch.empty(3, 3))
    with pytest.raises(ValueError, match="token ids for a plan"):
        fuse_embeddings(
            case.input_ids[1:], case.table, plan_of(case), case.projectors, backend="triton"
        )
    good = case.projectors[0]
    for bad, message in (
        (good._replace(w2=good.w2.t().contiguous().t()), "is transposed"),
        (good.map(torch.Tensor.half), r"expected 2-D torch\.float32"),
        (good._replace(b1=good.b1[1:]), "do not fit together"),
        (good._replace(w1=good.w1[:0], b1=good.b1[:0], w2=good.w2[:, :0]), "are empty"),
    ):
        with pytest.raises(ValueError, match=message):
            fuse_embeddings(case.input_ids, case.table, plan_of(case), [bad], backend="triton")
    wide = make_case([24, 24], [3, 3], torch.float32)
    wide.projectors[1] = make_projector(24, 96, 32, torch.float32)
    with pytest.raises(ValueError, match="gives 32 columns, expected those of the first, 80"):
        wide.run("triton")
    with pytest.raises(ValueError, match="projectors for"):
        fuse_embeddings(
            case.input_ids, case.table, plan_of(case), case.projectors * 2, backend="triton"
        )


def test_gradients_are_refused_not_dropped() -> None:
    case = make_case([24], [3], torch.float32)
    case.projectors[0].w1.requires_grad_()
    with pytest.raises(ValueError, match="give no gradients"):
        case.run("triton")
    with torch.no_grad():
        case.run("triton")


def test_weights_that_move_are_followed() -> None:
    """The address table is keyed by what it holds: new weights never meet an old table."""
    case = make_case([24], [3], torch.float32)
    case.run("triton")
    for seed in range(3):
        case.projectors = [make_projector(24, 96, case.columns, torch.float32, seed=seed + 10)]
        check(case)


# -- torch.compile -------------------------------------------------------------------------------


def test_under_torch_compile_the_op_runs_between_two_graphs() -> None:
    torch._dynamo.reset()
    case = in_whole_numbers(make_case([24, 33], [5, 3], torch.float32))
    rows = torch.randn(3, 24)

    def step(ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        fused = fuse_embeddings(
            ids + 0, table, case.items, case.projectors, slots=case.slots, out=out, backend="triton"
        )
        return fused * 2 + project_rows(rows, case.projectors[0], backend="triton").sum()

    compiled = torch.compile(step, backend="eager")
    with torch.no_grad():
        out = poisoned(case)
        want = step(case.input_ids, case.table, poisoned(case))
        assert torch.equal(compiled(case.input_ids, case.table, out), want)
        assert torch.equal(out, case.run("triton"))
