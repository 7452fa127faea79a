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

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from mmqwen.modalities import ROW_DTYPES
from mmqwen_kernels import HostRows, native

_MAGIC = 0x6D6D7177656E3032  # "mmqwen02"
_HEADER_WORDS = 4
_GROUP_WORDS = 4
_ALIGN_WORDS = 2  # 16 bytes, for 16-byte loads
_BEGIN_BITS, _WIDTH_BITS, _MODALITY_BITS = 32, 20, 8
_WIDTH_AT = _BEGIN_BITS
_MODALITY_AT = _WIDTH_AT + _WIDTH_BITS
_DTYPE_AT = _MODALITY_AT + _MODALITY_BITS
_BEGIN_MASK = (1 << _BEGIN_BITS) - 1
MAX_WIDTH = (1 << _WIDTH_BITS) - 1
MAX_MODALITY = (1 << _MODALITY_BITS) - 1
_DTYPES = tuple(getattr(torch, name) for name in ROW_DTYPES)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
BANK_CODE = 3
"""In the place of a dtype's: the row lies in a bank."""
VERSION_BYTES = 32
ON_DEVICE, PROJECTED = 1, 2
"""Where a bank's rows lie, for the native helper; 0: on the host."""


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


class Banks(Protocol):
    """Finds rows of banks; `mmqwen.vllm_plugin.banks` has them."""

    def find(self, bank: np.ndarray, ids: np.ndarray, modality: np.ndarray) -> HostRows:
        """The rows `[R]` of these numbers, ids and modalities.

        Raises:
            PackError: there is no such bank of that modality, or no such row in it.
        """

    def table(self) -> np.ndarray | None:
        """The banks as the native helper is told of them, int64 `[7 n]`; None without banks.

        Of each address, rows, bytes of a row, modality, place (0, `ON_DEVICE` or `PROJECTED`), and
        the first and the end of the rows that lie at the address.
        """

    def held(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the device that hold rows."""

    def projections(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the device that hold rows that were projected before."""


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
    directory_at = _HEADER_WORDS + _GROUP_WORDS * len(shapes)
    filled = directory_at + 2 * total
    at = _align(filled)
    code = DTYPE_CODES[dtype]
    header = [_MAGIC, total, len(shapes), code]
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
            first_entries[group] = _kind(width, modality, code) << _WIDTH_AT | 8 * at
            places.append((group, count, width, at * 8 // itemsize))
        else:
            first_entries[group] = _kind(bank, modality, BANK_CODE) << _WIDTH_AT
        header += [group, width, count, at]
        gaps += [(filled, at), (at + words - 1, at + words)]
        filled = at + words
        at = _align(filled)
    gaps.append((filled, at))
    if sum(count for _, (count, _) in shapes) != total:
        raise PackError(f"{ {m: n for m, (n, _) in shapes} } rows for {total} places")
    if 8 * at > _BEGIN_MASK:
        raise PackError(f"a pack of {8 * at} bytes, expected at most {_BEGIN_MASK}")

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


def _kind(width: int, modality: int, code: int) -> int:
    """All of an entry but its low half."""
    return width | modality << _WIDTH_BITS | code << (_DTYPE_AT - _WIDTH_AT)


def write_ids(pack: torch.Tensor, group: int, ids: np.ndarray, version: str) -> None:
    """Fill a group of a pack that `allocate_pack` made with rows of a bank.

    Args:
        pack: the pack.
        group: the `bank_group`.
        ids: int64 `[R]` of its rows, in the order of their slots, each below 2**32.
        version: of the bank, `VERSION_BYTES` in hex.
    """
    words = pack.numpy()
    begin = _HEADER_WORDS + _GROUP_WORDS * int(words[2])
    table = words[_HEADER_WORDS:begin].reshape(-1, _GROUP_WORDS)
    at = int(table[table[:, 0] == group, 3][0])
    words[at : at + VERSION_BYTES // 8] = np.frombuffer(bytes.fromhex(version), np.int64)
    entries = words[begin + 1 : begin + 2 * int(words[1]) : 2]
    modality, bank = _bank_of(group)
    entries[entries >> _WIDTH_AT == _kind(bank or 0, modality, BANK_CODE)] |= ids


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
    head = _HEADER_WORDS + _GROUP_WORDS
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
    if size < _HEADER_WORDS or not pack.is_contiguous():
        raise PackError("the tensor is too short, or not contiguous, to be a pack")
    words = pack.detach().numpy() if pack.requires_grad else pack.numpy()
    magic, total, groups, code = words[:_HEADER_WORDS].tolist()
    if magic != _MAGIC or total < 1 or groups < 1 or not 0 <= code < len(_DTYPES):
        raise PackError("the tensor is not a pack of mmqwen rows")
    begin = _HEADER_WORDS + _GROUP_WORDS * groups
    if size < begin + 2 * total:
        raise PackError("the pack is shorter than its header says")
    if words[begin] != begin:
        raise PackError("the pack's directory does not know its own place")
    table = words[_HEADER_WORDS:begin].tolist()
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


def find_rows(
    parts: Sequence[torch.Tensor],
    widths: Sequence[int],
    dtype: torch.dtype,
    banks: Banks | None = None,
) -> HostRows:
    """The addresses of all rows of many slices: by the native helper, or a few array operations.

    Args:
        parts: slices of directories, int64 `[n, 2]`, consecutive rows.
        widths: the width that each modality must have.
        dtype: the dtype that all rows must have.
        banks: where rows of banks are found.

    Returns:
        The rows in their order; valid as long as the slices and the banks are.

    Raises:
        PackError: a part is no such slice (for instance a copy that left the data behind), reaches
            past its pack, or holds rows of another dtype, or of no bank.
        ValueError: a modality index is unknown, or rows have another width.
    """
    if native.helper is not None:
        table = None if banks is None else banks.table()
        code = DTYPE_CODES.get(dtype, -1)
        found = native.helper.find_rows(list(parts), tuple(widths), code, table)
        if found is not None:
            rows = len(found) // (16 if table is None else 17)
            words = np.frombuffer(found, np.int64, 2 * rows)
            address, modality = words[:rows], words[rows:]
            if table is not None and banks is not None:
                place = np.frombuffer(found, np.int8, rows, 16 * rows)
                resident, projected = place == ON_DEVICE, place == PROJECTED
                if place.any():
                    return HostRows(
                        modality,
                        address,
                        resident if resident.any() else None,
                        banks.held(),
                        projected if projected.any() else None,
                        banks.projections(),
                    )
            return HostRows(modality, address)
    tables, counts, begins, ends = [], [], [], []
    for part in parts:
        if part.dtype != torch.int64 or part.ndim != 2 or part.shape[1] != 2 or not part.is_cpu:
            raise PackError(
                f"expected an int64 [n, 2] slice of a directory on the CPU, got "
                f"{tuple(part.shape)} of {part.dtype} on {part.device}"
            )
        if part.stride() != (2, 1):
            raise PackError("the rows of the slice are not consecutive")
        table = part.numpy()
        if not len(table):
            continue
        storage = part.untyped_storage()
        low = storage.data_ptr()
        begin = part.data_ptr() - 8 * int(table[0, 0])
        end = low + storage.nbytes()
        inside = low <= begin <= end - 8 * _HEADER_WORDS
        if not inside or ctypes.c_int64.from_address(begin).value != _MAGIC:
            raise PackError("the slice has lost the pack that it was taken from")
        tables.append(table)
        counts.append(len(table))
        begins.append(begin)
        ends.append(end)
    if not tables:
        nothing = np.empty(0, dtype=np.int64)
        return HostRows(nothing, nothing)
    first: Any  # of each row's pack, the address
    last: Any  # of its storage, where it ends
    if len(tables) == 1:
        entries, first, last = tables[0][:, 1], begins[0], ends[0]
    else:
        entries = np.concatenate([table[:, 1] for table in tables])
        first, last = np.repeat(np.array([begins, ends]), counts, axis=1)
    named = entries >> _DTYPE_AT == BANK_CODE
    if not named.any():
        return _find_in_packs(entries, first, last, widths, dtype)
    if banks is None:
        raise PackError("a pack names rows of a bank, and there are no banks")
    of_banks = banks.find(
        entries[named] >> _WIDTH_AT & MAX_WIDTH,
        entries[named] & _BEGIN_MASK,
        entries[named] >> _MODALITY_AT & MAX_MODALITY,
    )
    if named.all():
        return of_banks
    if len(tables) > 1:
        first, last = first[~named], last[~named]
    return _merge(named, _find_in_packs(entries[~named], first, last, widths, dtype), of_banks)


def _merge(named: np.ndarray, packed: HostRows, of_banks: HostRows) -> HostRows:
    """Rows of packs, and of banks where `named` says so, in one order."""
    modality, address = np.empty(len(named), np.int64), np.empty(len(named), np.int64)
    for where, found in ((~named, packed), (named, of_banks)):
        modality[where], address[where] = found.modality, found.address
    masks: list[np.ndarray | None] = []
    for mask in (of_banks.resident, of_banks.projected):
        masks.append(None if mask is None else np.zeros(len(named), np.bool_))
        if mask is not None:
            masks[-1][named] = mask  # type: ignore[index]
    resident, projected = masks
    return HostRows(modality, address, resident, of_banks.held, projected, of_banks.tables)


def _find_in_packs(
    entries: np.ndarray, begin: Any, end: Any, widths: Sequence[int], dtype: torch.dtype
) -> HostRows:
    """Rows by the entries of packs that reach from address `begin` to `end`."""
    code = DTYPE_CODES[dtype]
    kind = entries >> _WIDTH_AT  # width, modality and dtype
    modality = (kind >> _WIDTH_BITS) & MAX_MODALITY
    expected = np.array([_kind(width, m, code) for m, width in enumerate(widths)])
    if (kind != expected.take(modality, mode="clip")).any():
        if (kind >> (_DTYPE_AT - _WIDTH_AT) != code).any():
            raise PackError(f"a pack holds rows of another dtype than {dtype}")
        _refuse_rows(kind & MAX_WIDTH, modality, widths)
    address = (entries & _BEGIN_MASK) + begin
    row_bytes = np.array(widths).take(modality) * dtype.itemsize
    if (address + row_bytes > end).any():
        raise PackError("a slice reaches past the rows of its pack")
    return HostRows(modality, address)


def _refuse_rows(width: np.ndarray, modality: np.ndarray, widths: Sequence[int]) -> None:
    if modality.max() >= len(widths):
        raise ValueError(f"modality index {modality.max()}, expected 0 to {len(widths) - 1}")
    at = int((width != np.asarray(widths)[modality]).argmax())
    m = int(modality[at])
    raise ValueError(f"modality index {m}: rows are {width[at]} wide, expected [n, {widths[m]}]")
