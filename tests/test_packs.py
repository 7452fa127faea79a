"""Packs: what goes in comes out, and what is not a pack is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmqwen.pack_slices import find_rows
from mmqwen.packs import PackError, allocate_pack, blank_directory, directory, pack_rows
from mmqwen_kernels import plan_rows

WIDTHS = (3, 8, 5)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

items_of_pack = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=12)


def make_items(shape: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[int, torch.Tensor]]:
    at, items = 0, []
    for modality, rows in shape:
        n = rows * WIDTHS[modality]
        items.append((modality, torch.arange(at, at + n).view(rows, -1).to(dtype)))
        at += n
    return items


def rows_of(parts: list[torch.Tensor], dtype: torch.dtype) -> list[tuple[int, torch.Tensor]]:
    """Modality and values of each row that slices lead to, read by a plan."""
    found = find_rows(parts, WIDTHS, dtype)
    total = len(found.modality)
    plan = plan_rows(found, range(total), total, WIDTHS, dtype=dtype, device="cpu")
    by_slot: dict[int, tuple[int, torch.Tensor]] = {}
    for m, (rows, slots) in enumerate(zip(plan.rows, plan.slots, strict=True)):
        if rows is not None and slots is not None:
            by_slot |= {s: (m, row) for s, row in zip(slots.tolist(), rows, strict=True)}
    return [by_slot[slot] for slot in range(total)]


@settings(max_examples=60, deadline=None)
@given(shape=items_of_pack, dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_slice_of_a_directory_leads_to_its_rows(
    shape: list[tuple[int, int]], dtype: torch.dtype, data: st.DataObject
) -> None:
    items = make_items(shape, dtype)
    part = directory(pack_rows(items))
    expected = [(m, row) for m, rows in items for row in rows]
    lo = 0
    for _ in range(data.draw(st.integers(0, 3))):  # slices of slices
        n = part.shape[0]
        a = data.draw(st.integers(0, n - 1))
        b = data.draw(st.integers(a + 1, n))
        part, lo = part[a:b], lo + a
    want = expected[lo : lo + part.shape[0]]
    found = rows_of([part], dtype)
    assert [m for m, _ in found] == [m for m, _ in want]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, want, strict=True))


def test_groups_are_16_byte_aligned_views() -> None:
    pack = pack_rows(make_items([(0, 3), (1, 2), (2, 1), (0, 1)], torch.bfloat16))
    found = find_rows([directory(pack)], WIDTHS, torch.bfloat16)
    begin, end = pack.data_ptr(), pack.data_ptr() + 8 * pack.numel()
    assert begin % 16 == 0
    for m in range(3):
        first = int(found.address[found.modality == m][0])
        assert begin < first < end
        assert (first - begin) % 16 == 0


def test_equal_rows_make_equal_bytes() -> None:
    """Padding is zeros: packs are hashed whole."""
    for shape in ([(0, 1)], [(0, 3), (1, 2), (2, 1), (0, 2)], [(2, 1), (0, 1)]):
        items = make_items(shape, torch.bfloat16)
        want = pack_rows(items)
        poison = [torch.full((want.numel(),), -1, dtype=torch.int64) for _ in range(20)]
        del poison
        assert torch.equal(pack_rows(items), want)
        data = sum(rows.numel() * 2 for _, rows in items)
        used = 8 * (4 + 4 * len({m for m, _ in shape}) + 2 * sum(n for _, n in shape)) + data
        assert 8 * want.numel() - used < 16 * (1 + len({m for m, _ in shape}))


def test_a_pack_inside_a_larger_buffer_works() -> None:
    pack = pack_rows(make_items([(0, 3), (1, 2)], torch.float32))
    batch = torch.zeros(2, pack.numel(), dtype=torch.int64)
    batch[1] = pack
    found = rows_of([directory(batch[1])[1:4]], torch.float32)
    assert torch.equal(found[0][1], make_items([(0, 3)], torch.float32)[0][1][1])
    assert [m for m, _ in found] == [0, 0, 1]


def test_many_slices_of_many_packs_in_one_plan() -> None:
    items = make_items([(0, 3), (1, 2), (2, 1)], torch.float32)
    pack, other = directory(pack_rows(items)), directory(pack_rows(items[:1]))
    found = rows_of([pack[4:], other[:0], other[1:], pack[:2]], torch.float32)
    rows = [(m, row) for m, item in items for row in item]
    want = [*rows[4:], *rows[1:3], *rows[:2]]
    assert [m for m, _ in found] == [m for m, _ in want]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_blank_directory_is_zeros_however_it_is_cut(dtype: torch.dtype) -> None:
    blank = blank_directory(9, WIDTHS[0], dtype)
    assert blank.shape == (9, 2)
    for part in (blank, blank[:1], blank[8:], blank[3:7]):
        found = rows_of([part], dtype)
        assert [m for m, _ in found] == [0] * len(part)
        assert not any(row.any() for _, row in found)


@pytest.mark.parametrize(
    "items",
    [
        [],
        [(0, torch.zeros(2, 3, dtype=torch.float64))],
        [(0, torch.zeros(3))],
        [(0, torch.zeros(1, 3)), (0, torch.zeros(1, 4))],
        [(0, torch.zeros(1, 3)), (1, torch.zeros(1, 4, dtype=torch.float16))],
    ],
)
def test_pack_rows_refuses(items: list[tuple[int, torch.Tensor]]) -> None:
    with pytest.raises(PackError):
        pack_rows(items)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p[:3],
        lambda p: p.float(),
        lambda p: p.view(1, -1),
        lambda p: torch.zeros_like(p),
        lambda p: p[:-1],
        lambda p: p.index_fill(0, torch.tensor([3]), 99),
        lambda p: p.index_fill(0, torch.tensor([1]), 10**6),
        lambda p: p.index_fill(0, torch.tensor([7]), 10**6),
    ],
)
def test_directory_refuses_what_is_no_pack(damage: object) -> None:
    pack = pack_rows(make_items([(0, 3), (1, 2)], torch.float32))
    with pytest.raises(PackError):
        directory(damage(pack))  # type: ignore[operator]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.clone(),
        lambda d: d[1:].clone(),
        lambda d: d[::2],
        lambda d: d.flip(0),
        lambda d: d[:, :1],
        lambda d: d.int(),
        lambda d: torch.zeros(4, 2, dtype=torch.int64),
        lambda d: torch.tensor(np.full((4, 2), 2**60)),
    ],
)
def test_find_rows_refuses_what_lost_its_pack(damage: object) -> None:
    rows = directory(pack_rows(make_items([(0, 3), (1, 2)], torch.float32)))
    with pytest.raises(PackError):
        find_rows([damage(rows)], WIDTHS, torch.float32)  # type: ignore[operator]


@pytest.mark.parametrize("position", [-(1 << 44), -(1 << 20), 1 << 44])
def test_find_rows_never_reads_outside_the_storage(position: int) -> None:
    part = directory(pack_rows([(0, torch.zeros(3, 3))]))
    part[1, 0] = position
    with pytest.raises(PackError, match="lost the pack"):
        find_rows([part[1:]], WIDTHS, torch.float32)


def test_find_rows_refuses_entries_that_lead_elsewhere() -> None:
    part = directory(pack_rows([(0, torch.zeros(3, 3))]))
    own = int(part[1, 1])
    for entry, error, message in (
        (own | 0xFFFFFFFF, PackError, "past the rows"),
        (own ^ (1 << 33), ValueError, "wide, expected"),
        (own | 200 << 52, ValueError, "modality index 200, expected 0 to 2"),
    ):
        part[1, 1] = entry
        with pytest.raises(error, match=message):
            find_rows([part], WIDTHS, torch.float32)
    part[1, 1] = own
    with pytest.raises(PackError, match=r"another dtype than torch\.float16"):
        find_rows([part], WIDTHS, torch.float16)
    assert len(find_rows([part, part[:0]], WIDTHS, torch.float32).address) == 3


def test_two_runs_of_one_modality_are_not_taken_for_two_modalities() -> None:
    with pytest.raises(PackError, match="places"):
        allocate_pack([0, 0], [2, 2], {0: (2, 3), 1: (2, 8)}, torch.float32)
