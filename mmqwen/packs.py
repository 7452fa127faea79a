"""Many rows of several modalities and widths in one flat tensor, without padding.

A *pack* is a 1-D int64 tensor on the CPU, so that it travels like any tensor:

    word 0                  magic number
    word 1                  rows R in the pack
    word 2                  modalities G in the pack
    word 3                  dtype code
    words 4 .. 4 + 4 G      per modality: index, width, rows, first data word
    then 2 R words          the directory: one [position, entry] a row; an entry holds, from its low
                            bits, where the row begins (32 bits, bytes from the pack's beginning),
                            its width (20), modality (8) and dtype code (2)
    then, 16-byte aligned   each modality's rows, contiguous, at their own width

Rows of a bank are a group of their own, whose index is the modality's plus `bank_group`'s share for
the bank's number. An entry then holds the row's id (32 bits), the bank's number (20), the modality
(8) and `BANK_CODE` (2); what stands in the place of the rows is the bank's version, 32 bytes.

`directory()` returns the `[R, 2]` view of the pack's directory. It shares the pack's storage and
each of its rows knows its own position in the pack, so any non-empty slice of rows leads back to
the data: that is what lets an engine that only slices 2-D tensors by rows carry ragged rows. An
entry needs nothing else to be read: the rows of many packs are found by a few array operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from mmqwen.modalities import ROW_DTYPES

MAGIC = 0x6D6D7177656E3032  # "mmqwen02"
HEADER_WORDS = 4
_GROUP_WORDS = 4
_ALIGN_WORDS = 2  # 16 bytes, for 16-byte loads
_BEGIN_BITS, WIDTH_BITS, _MODALITY_BITS = 32, 20, 8
WIDTH_AT = _BEGIN_BITS
MODALITY_AT = WIDTH_AT + WIDTH_BITS
DTYPE_AT = MODALITY_AT + _MODALITY_BITS
BEGIN_MASK = (1 << _BEGIN_BITS) - 1
MAX_WIDTH = (1 << WIDTH_BITS) - 1
MAX_MODALITY = (1 << _MODALITY_BITS) - 1
_DTYPES = tuple(getattr(torch, name) for name in ROW_DTYPES)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
BANK_CODE = 3
"""In the place of a dtype's: the row lies in a bank."""
VERSION_BYTES = 32


class PackError(ValueError):
    """A tensor is not a pack, or not a slice of a pack's directory."""


class Group(NamedTuple):
    """What a pack's header says of one group of its rows.

    Attributes:
        modality: its index.
        width: of its rows.
        bank: the number of the bank that they lie in; None: they lie in the pack.
        version: that bank's, in hex, or "".
    """

    modality: int
    width: int
    bank: int | None
    version: str


def bank_group(modality: int, bank: int) -> int:
    """How `allocate_pack` is told of rows of a bank, in the place of a modality's index."""
    return modality | (bank + 1) << _MODALITY_BITS


def _bank_of(group: int) -> tuple[int, int | None]:
    """A group's modality, and the number of its bank or None."""
    bank = group >> _MODALITY_BITS
    return group & MAX_MODALITY, bank - 1 if bank else None


def _align(words: int) -> int:
    return -(-words // _ALIGN_WORDS) * _ALIGN_WORDS


def pack_rows(items: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Pack items, in the order of the slots that they will fill.

    Args:
        items: (modality index, `[n, d]` CPU tensor) each; one width per modality, one dtype of
            float32, float16 or bfloat16 in all, every n >= 1.

    Returns:
        The pack: 1-D int64.

    Raises:
        PackError: no items, or items that differ in dtype, or in width within a modality, or that
            are more than an entry of the directory can say.
    """
    dtypes = {rows.dtype for _, rows in items}
    if len(dtypes) != 1:
        raise PackError(f"expected rows of one dtype, got {sorted(map(str, dtypes))}")
    members: dict[int, list[torch.Tensor]] = {}
    for modality, rows in items:
        if rows.ndim != 2:
            raise PackError(f"modality {modality}: expected [n, d] rows, got {tuple(rows.shape)}")
        members.setdefault(modality, []).append(rows)
    for modality, parts in members.items():
        if len({part.shape[1] for part in parts}) > 1:
            raise PackError(f"modality {modality}: rows of more than one width in a pack")
    pack, places = allocate_pack(
        [modality for modality, _ in items],
        [rows.shape[0] for _, rows in items],
        {m: (sum(map(len, parts)), parts[0].shape[1]) for m, parts in members.items()},
        dtypes.pop(),
    )
    for modality, parts in members.items():
        torch.cat(parts, out=places[modality])
    return pack


class _Layout(NamedTuple):
    """Where everything stands in the packs of some runs.

    Attributes:
        size: words.
        head: header and directory, int64.
        gaps: words (begin, end) that hold no row, or only the end of one.
        places: per modality its index, rows, width and first element.
    """

    size: int
    head: np.ndarray
    gaps: list[tuple[int, int]]
    places: list[tuple[int, int, int, int]]


def allocate_pack(
    order: Sequence[int],
    counts: Sequence[int],
    shapes: Mapping[int, tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """A pack that is complete but for its rows, so that they can be converted straight into it.

    Args:
        order: the modality index of each item, or of each run of items, in the order of the slots;
            of rows of a bank its `bank_group`.
        counts: the rows of each.
        shapes: per modality, or group, (R_m, d_m).
        dtype: float32, float16 or bfloat16.

    Returns:
        The pack, 1-D int64, and per modality the view `[R_m, d_m]` to fill; `write_ids` fills the
        groups of banks.

    Raises:
        PackError: another dtype, no rows, or shapes that do not hold as many rows as their items.
    """
    lay_out = _layout if len(order) <= _RUNS_KEPT and sum(counts) <= _ROWS_KEPT else _lay_out
    found = lay_out(tuple(order), tuple(counts), tuple(shapes.items()), dtype)
    pack = torch.empty(found.size, dtype=torch.int64)
    words = pack.numpy()
    words[: len(found.head)] = found.head
    for begin, end in found.gaps:
        words[begin:end] = 0  # is hashed, so it is defined
    data = pack.view(dtype)
    return pack, {
        modality: data.as_strided((count, width), (width, 1), first)
        for modality, count, width, first in found.places
    }


def _lay_out(
    order: tuple[int, ...],
    counts: tuple[int, ...],
    shapes: tuple[tuple[int, tuple[int, int]], ...],
    dtype: torch.dtype,
) -> _Layout:
    if dtype not in _DTYPES:
        raise PackError(f"expected rows of one of {[str(d) for d in _DTYPES]}, got {dtype}")
    total = sum(counts)
    if total < 1:
        raise PackError("no rows")
    itemsize = dtype.itemsize
    directory_at = HEADER_WORDS + _GROUP_WORDS * len(shapes)
    filled = directory_at + 2 * total
    at = _align(filled)
    code = DTYPE_CODES[dtype]
    header = [MAGIC, total, len(shapes), code]
    first_entries: dict[int, int] = {}
    gaps: list[tuple[int, int]] = []
    places: list[tuple[int, int, int, int]] = []
    for group, (count, width) in shapes:
        modality, bank = _bank_of(group)
        words = -(-count * width * itemsize // 8) if bank is None else VERSION_BYTES // 8
        if count < 1 or group < 0 or not 0 < width <= MAX_WIDTH or (bank or 0) > MAX_WIDTH:
            raise PackError(
                f"modality {group}: {count} rows of width {width}; expected a modality up to "
                f"{MAX_MODALITY} and a width up to {MAX_WIDTH}"
            )
        if bank is None:
            first_entries[group] = kind_of(width, modality, code) << WIDTH_AT | 8 * at
            places.append((group, count, width, at * 8 // itemsize))
        else:
            first_entries[group] = kind_of(bank, modality, BANK_CODE) << WIDTH_AT
        header += [group, width, count, at]
        gaps += [(filled, at), (at + words - 1, at + words)]
        filled = at + words
        at = _align(filled)
    gaps.append((filled, at))
    if sum(count for _, (count, _) in shapes) != total:
        raise PackError(f"{ {m: n for m, (n, _) in shapes} } rows for {total} places")
    if 8 * at > BEGIN_MASK:
        raise PackError(f"a pack of {8 * at} bytes, expected at most {BEGIN_MASK}")

    head = np.empty(directory_at + 2 * total, dtype=np.int64)
    head[:directory_at] = header
    head[directory_at::2] = np.arange(directory_at, len(head), 2)
    entries = head[directory_at + 1 :: 2]
    found: list[Any]
    sizes: Sequence[int]
    if order == tuple(modality for modality, _ in shapes):  # one run a modality
        found, sizes = (
            [slice(end - n, end) for end, n in zip(accumulate(counts), counts, strict=True)],
            counts,
        )
    else:
        per_row = np.repeat(np.asarray(order, dtype=np.int64), counts)
        found = [np.flatnonzero(per_row == modality) for modality, _ in shapes]
        sizes = [len(rows) for rows in found]
    for rows, size, (group, (count, width)) in zip(found, sizes, shapes, strict=True):
        if size != count:
            raise PackError(f"modality {group}: {count} rows for {size} places")
        step = width * itemsize if _bank_of(group)[1] is None else 0
        entries[rows] = np.arange(count) * step + first_entries[group]
    head.flags.writeable = False
    return _Layout(at, head, [gap for gap in gaps if gap[0] < gap[1]], places)


def kind_of(width: int, modality: int, code: int) -> int:
    """All of an entry but its low half."""
    return width | modality << WIDTH_BITS | code << (DTYPE_AT - WIDTH_AT)


def write_ids(pack: torch.Tensor, group: int, ids: np.ndarray, version: str) -> None:
    """Fill a group of a pack that `allocate_pack` made with rows of a bank.

    Args:
        pack: the pack.
        group: the `bank_group`.
        ids: int64 `[R]` of its rows, in the order of their slots, each below 2**32.
        version: of the bank, `VERSION_BYTES` in hex.
    """
    words = pack.numpy()
    begin = HEADER_WORDS + _GROUP_WORDS * int(words[2])
    table = words[HEADER_WORDS:begin].reshape(-1, _GROUP_WORDS)
    at = int(table[table[:, 0] == group, 3][0])
    words[at : at + VERSION_BYTES // 8] = np.frombuffer(bytes.fromhex(version), np.int64)
    entries = words[begin + 1 : begin + 2 * int(words[1]) : 2]
    modality, bank = _bank_of(group)
    entries[entries >> WIDTH_AT == kind_of(bank or 0, modality, BANK_CODE)] |= ids


_RUNS_KEPT, _ROWS_KEPT = 256, 1024
"""Runs and rows up to which a layout is kept, which takes up to 20 KB."""
_layout = lru_cache(maxsize=512)(_lay_out)


def directory(pack: torch.Tensor) -> torch.Tensor:
    """The pack's directory: an int64 `[R, 2]` view that shares the pack's storage.

    Raises:
        PackError: `pack` is not a pack.
    """
    return open_pack(pack)[0]


def blank_directory(count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A directory whose `count` rows of modality 0 are one and the same row of zeros."""
    pack, places = allocate_pack([0], [1], {0: (1, width)}, dtype)
    places[0].zero_()
    head = HEADER_WORDS + _GROUP_WORDS
    words = torch.empty(2 * count + len(pack), dtype=torch.int64)
    words[2 * count :] = pack
    entries = words[: 2 * count].view(count, 2)
    # The header stands behind the directory here: positions count from it, so they are negative.
    entries[:, 0] = torch.arange(-2 * count, 0, 2)
    entries[:, 1] = pack[head + 1]
    return entries


def open_pack(pack: torch.Tensor) -> tuple[torch.Tensor, list[Group]]:
    """Check a pack's header; 4 us, whatever the pack holds. `find_rows` looks at the directory.

    Returns:
        Its directory, as `directory` returns it, and its groups.

    Raises:
        PackError: `pack` is not a pack.
    """
    if pack.ndim != 1 or pack.dtype != torch.int64 or not pack.is_cpu:
        raise PackError(
            f"expected a 1-D int64 CPU tensor, got {pack.ndim}-D {pack.dtype} on {pack.device}"
        )
    size = pack.numel()
    if size < HEADER_WORDS or not pack.is_contiguous():
        raise PackError("the tensor is too short, or not contiguous, to be a pack")
    words = pack.detach().numpy() if pack.requires_grad else pack.numpy()
    magic, total, groups, code = words[:HEADER_WORDS].tolist()
    if magic != MAGIC or total < 1 or groups < 1 or not 0 <= code < len(_DTYPES):
        raise PackError("the tensor is not a pack of mmqwen rows")
    begin = HEADER_WORDS + _GROUP_WORDS * groups
    if size < begin + 2 * total:
        raise PackError("the pack is shorter than its header says")
    if words[begin] != begin:
        raise PackError("the pack's directory does not know its own place")
    table = words[HEADER_WORDS:begin].tolist()
    itemsize = _DTYPES[code].itemsize
    kinds: list[Group] = []
    rows = 0
    for at in range(0, len(table), _GROUP_WORDS):
        group, width, count, first = table[at : at + _GROUP_WORDS]
        modality, bank = _bank_of(group)
        words_of = -(-count * width * itemsize // 8) if bank is None else VERSION_BYTES // 8
        if width < 1 or count < 1 or first < 0 or first + words_of > size:
            raise PackError("a modality's rows reach past the end of the pack")
        version = "" if bank is None else words[first : first + words_of].tobytes().hex()
        kinds.append(Group(modality, width, bank, version))
        rows += count
    if rows != total:
        raise PackError(f"the modalities hold {rows} rows, the directory {total}")
    return pack.as_strided((total, 2), (2, 1), pack.storage_offset() + begin), kinds
