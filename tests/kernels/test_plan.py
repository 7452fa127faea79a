"""Plans: every row reaches its slot, whatever the sources; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmqwen_kernels import HostRows, RowPlan, plan_rows
from mmqwen_kernels.plan import RowSource

WIDTHS = (3, 8, 5)
DTYPE = torch.float32


def plan(sources: list[RowSource] | HostRows, slots: object, tokens: int) -> RowPlan:
    return plan_rows(sources, slots, tokens, WIDTHS, dtype=DTYPE, device="cpu")  # type: ignore[arg-type]


def by_address(rows: list[tuple[int, torch.Tensor]]) -> HostRows:
    """Rows, each a tensor of its own, as `HostRows`."""
    modality = np.array([m for m, _ in rows], dtype=np.int64)
    return HostRows(modality, np.array([row.data_ptr() for _, row in rows], dtype=np.int64))


@settings(max_examples=80, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), max_size=9),
    addressed=st.booleans(),
    gaps=st.integers(0, 7),
    as_mask=st.booleans(),
    seed=st.integers(0, 99),
)
def test_plan_equals_the_naive_assignment(
    shape: list, addressed: bool, gaps: int, as_mask: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    items = [(m, torch.randn(n, WIDTHS[m], generator=g)) for m, n in shape]
    expected = [(m, row) for m, item in items for row in item]
    sources: list[RowSource] | HostRows = by_address(expected) if addressed else items
    total = len(expected)
    tokens = total + gaps
    positions = torch.randperm(tokens, generator=g)[:total]
    if as_mask:
        positions = positions.sort().values
        mask = torch.zeros(tokens, dtype=torch.bool)
        mask[positions] = True
        made = plan(sources, mask, tokens)
    else:
        made = plan(sources, positions.tolist(), tokens)
    seen: dict[int, torch.Tensor] = {}
    for m in range(len(WIDTHS)):
        rows_m, slots_m = made.rows[m], made.slots[m]
        assert made.counts[m] == sum(index == m for index, _ in expected)
        if rows_m is None or slots_m is None:
            assert made.counts[m] == 0
            continue
        assert rows_m.shape == (made.counts[m], WIDTHS[m])
        seen.update(zip(slots_m.tolist(), rows_m, strict=True))
    assert sorted(seen) == sorted(positions.tolist())
    for slot, (_, row) in zip(positions.tolist(), expected, strict=True):
        assert torch.equal(seen[slot], row)
    order = made.order.tolist()
    assert order[: tokens - total] == sorted(set(range(tokens)) - set(positions.tolist()))
    assert order[tokens - total :] == made.all_slots.tolist()
    assert [slot for part in made.slots if part is not None for slot in part.tolist()] == order[
        tokens - total :
    ]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    pieces=st.integers(1, 3),
    strided=st.booleans(),
)
def test_tables_lead_the_kernels_to_every_row(
    counts: list[int], pieces: int, strided: bool
) -> None:
    """Read the rows back by the addresses in the tables, as the kernels do."""
    import ctypes

    items: list[RowSource] = []
    for m, count in enumerate(counts):
        for part in torch.randn(count, WIDTHS[m]).chunk(pieces) if count else ():
            if strided:
                wide = torch.zeros(2 * len(part), WIDTHS[m] + 1)
                wide[::2, 1:] = part
                part = wide[::2, 1:]
            items.append((m, part))
    made = plan(items, range(sum(counts)), sum(counts))
    entries = made.buffer[: 64 * 4].view(torch.int64).view(-1, 8)  # room for three modalities
    if sum(counts):
        assert [made.address, made.stride] == entries[0, 3:5].tolist()
    addresses = None
    if made.addresses_at >= 0:
        words = made.buffer[made.addresses_at : made.order_at].view(torch.int64)
        addresses = words[: sum(counts)].tolist()
    at = 0
    for modality, first, count, base, stride, *_ in entries.tolist():
        if count == 0:
            continue
        assert first == at
        assert count == counts[modality]
        rows = made.rows[modality]
        assert rows is not None
        for r in range(count):
            where = base + r * stride * 4 if addresses is None else addresses[first + r]
            assert where % made.align_bytes == 0
            raw = (ctypes.c_float * WIDTHS[modality]).from_address(where)
            assert np.array_equal(np.array(raw), rows[r].numpy())
        at += count
    assert at == sum(counts)


def test_rows_are_converted() -> None:
    rows = torch.randn(2, 3).half()
    assert torch.equal(plan([(0, rows)], [1, 0], 2).rows[0], rows.float())


def test_a_single_item_is_not_copied() -> None:
    rows = torch.randn(2, 3)
    made = plan([(0, rows)], [1, 0], 2)
    assert made.rows[0] is not None
    assert made.rows[0].data_ptr() == rows.data_ptr()


def test_rows_by_address_lie_together_and_aligned() -> None:
    rows = [(m, torch.randn(WIDTHS[m])) for m in (0, 2, 0, 0, 2)]
    made = plan(by_address(rows), range(5), 5)
    assert made.parts == ((), (), ())
    for m in (0, 2):
        found = made.rows[m]
        assert found is not None
        assert (found.data_ptr() - made.buffer.data_ptr()) % 16 == 0
        assert found.is_contiguous()
        assert torch.equal(found, torch.stack([row for index, row in rows if index == m]))


def test_rows_that_need_gradients_stay_where_they_are_or_are_refused() -> None:
    rows = torch.randn(2, 3, requires_grad=True)
    assert plan([(0, rows)], [1, 0], 2).rows[0] is rows
    with pytest.raises(ValueError, match="need gradients lie on cpu, expected meta"):
        plan_rows([(0, rows)], [1, 0], 2, WIDTHS, dtype=DTYPE, device="meta")


def test_columns_that_are_not_adjacent_are_made_so() -> None:
    rows = torch.randn(3, 2).t()
    made = plan([(0, rows)], [1, 0], 2)
    assert made.parts[0][0].stride(1) == 1
    assert torch.equal(made.rows[0], rows)


def test_no_rows() -> None:
    made = plan([], torch.zeros(4, dtype=torch.bool), 4)
    assert made.counts == (0, 0, 0)
    assert made.rows == (None, None, None)
    assert made.order.tolist() == [0, 1, 2, 3]
    assert made.all_slots.numel() == 0


@pytest.mark.parametrize(
    "slots",
    [[2], (2,), np.array([2], np.int16), np.array([2], np.uint8), torch.tensor([2]).int()],
    ids=str,
)
def test_slots_of_any_integer_type(slots: object) -> None:
    assert plan([(0, torch.zeros(1, 3))], slots, 4).all_slots.tolist() == [2]


@pytest.mark.parametrize("slots", [[], np.array([]), torch.tensor([])], ids=["list", "np", "torch"])
def test_no_slots_at_all(slots: object) -> None:
    assert plan([], slots, 4).order.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sources", "slots", "tokens", "message"),
    [
        ([(0, torch.zeros(2, 3))], [0], 4, "2 rows for 1 slots"),
        ([(0, torch.zeros(2, 4))], [0, 1], 4, "expected \\[n, 3\\]"),
        ([(0, torch.zeros(3))], [0], 4, "expected \\[n, 3\\]"),
        ([(3, torch.zeros(1, 3))], [0], 4, "modality index 3, expected 0 to 2"),
        ([(-1, torch.zeros(1, 3))], [0], 4, "modality index -1"),
        ([(0, torch.zeros(1, 3))], [4], 4, "outside the 4 tokens"),
        ([(0, torch.zeros(1, 3))], [-1], 4, "outside the 4 tokens"),
        ([(0, torch.zeros(2, 3))], [1, 1], 4, "more than one row"),
        ([(0, torch.zeros(1, 3))], torch.tensor([True, False]), 4, "a mask of 2 slots for the 4"),
        ([(0, torch.zeros(1, 3))], [1.7], 4, "slots are float64, expected a bool mask or integer"),
        ([(0, torch.zeros(1, 3))], np.array([1.0]), 4, "slots are float64"),
        ([(0, torch.zeros(1, 3))], torch.tensor([1.7]), 4, "slots are torch.float32"),
        ([(0, torch.zeros(1, 3))], torch.ones(1, dtype=torch.bfloat16), 4, "slots are torch.bf"),
        ([(0, torch.zeros(1, 3))], ["1"], 4, "slots are <U1"),
        ([(0, torch.zeros(1, 3))], torch.zeros(1, device="meta"), 4, "slots lie on meta"),
        ([(0, torch.zeros(1, 3))], [[0]], 4, "expected one dimension"),
        (HostRows(np.array([3]), np.array([64])), [0], 4, "modality index 3, expected 0 to 2"),
    ],
)
def test_plan_refuses(sources: list, slots: object, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(sources, slots, tokens)


def test_more_modalities_than_a_byte_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match="300 modalities, expected 256 at most"):
        plan_rows([], [], 4, [3] * 300, dtype=DTYPE, device="cpu")
