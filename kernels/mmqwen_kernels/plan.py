"""Which row goes to which slot: the host's part of the op.

No device-to-host sync and one host-to-device copy, whatever the number of items: rows that lie on
the CPU are gathered, modality by modality, into one pinned buffer that also holds the slot table
and the tables by which the kernels find rows. Rows that lie on the device stay where they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from mmqwen_kernels.packing import resolve_slice

_ALIGN_BYTES = 16
_MAX_ROW_STRIDE = 1 << 23  # elements: 256 rows of a tile times this fit in int32
ENTRY_FIELDS = 8

RowSource = torch.Tensor | tuple[int, torch.Tensor]
"""Either a slice of a pack's directory (int64 `[n, 2]`) or (modality index, rows `[n, d]`)."""


class RowTables(NamedTuple):
    """How the kernels find rows; layouts in `triton_kernels.py`.

    Attributes:
        entries: int64 `[A, 8]` on the device, one row per modality with rows, A a power of two.
        row_addresses: int64 `[R]` on the device, or None where every modality is one tensor.
        align_bytes: 1 to 16; every address, row stride and row length is a multiple of it.
    """

    entries: torch.Tensor
    row_addresses: torch.Tensor | None
    align_bytes: int


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one step on the device, grouped by modality.

    A plan refers to the rows of its sources that lie on the device already: they must not change
    before the op has run.

    Attributes:
        parts: per modality its rows in order, tensors `[n, d_m]` on the device.
        counts: per modality R_m.
        slot_table: int32 `[T]` on the device: -1 for a text slot, else the row's index in the
            concatenation of all modalities.
        all_slots: int32 `[R]` on the device, the concatenation of `slots`.
        widths: per modality d_m.
        dtype: of the rows.
    """

    parts: tuple[tuple[torch.Tensor, ...], ...]
    counts: tuple[int, ...]
    slot_table: torch.Tensor
    all_slots: torch.Tensor
    widths: tuple[int, ...]
    dtype: torch.dtype
    ready_tables: RowTables | None = None
    # What properties have made. Not functools.cached_property: Python 3.11's takes a lock, through
    # which torch.compile cannot see.
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> tuple[torch.Tensor | None, ...]:
        """Per modality `[R_m, d_m]`, or None where it has no rows; concatenated on first use."""
        if "rows" not in self._made:
            self._made["rows"] = tuple(
                (part[0] if len(part) == 1 else torch.cat(part)) if part else None
                for part in self.parts
            )
        rows: tuple[torch.Tensor | None, ...] = self._made["rows"]
        return rows

    @property
    def slots(self) -> tuple[torch.Tensor | None, ...]:
        """Per modality int32 `[R_m]`, or None where it has no rows."""
        if "slots" not in self._made:
            parts = self.all_slots.split(self.counts)
            self._made["slots"] = tuple(
                part if count else None for part, count in zip(parts, self.counts, strict=True)
            )
        slots: tuple[torch.Tensor | None, ...] = self._made["slots"]
        return slots

    @property
    def tables(self) -> RowTables:
        """How the kernels find rows: made with the plan for CUDA, on first use elsewhere."""
        if self.ready_tables is not None:
            return self.ready_tables
        if "tables" not in self._made:
            entries, addresses, align = _tables(self.parts, self.counts, self.widths, self.dtype)
            self._made["tables"] = RowTables(
                torch.from_numpy(entries),
                None if addresses is None else torch.from_numpy(addresses),
                align,
            )
        tables: RowTables = self._made["tables"]
        return tables


def slots_of_mask(mask: torch.Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    """Positions as int64: of the True entries of a CPU bool mask, or the positions given."""
    array = mask.numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    return np.flatnonzero(array) if array.dtype == np.bool_ else array.astype(np.int64)


def plan_rows(
    sources: Sequence[RowSource],
    slots: torch.Tensor | np.ndarray | Sequence[int],
    num_tokens: int,
    widths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> RowPlan:
    """Assign the concatenated rows of `sources` to `slots`, in order, and bring them to `device`.

    Args:
        sources: pack slices, or (modality, `[n, d]`) items, in the order of the slots.
        slots: a CPU bool mask `[T]`, or the positions themselves, distinct.
        num_tokens: T.
        widths: d of each modality.
        dtype: dtype of the rows on the device.
        device: where the rows shall lie.

    Raises:
        ValueError: the number of rows is not the number of slots, a row has the wrong width, a
            slot is taken twice or lies outside the step, or a modality index is unknown.
        PackError: a pack slice has lost its pack.
    """
    device = torch.device(device)
    positions = slots_of_mask(slots)
    if positions.ndim != 1:
        raise ValueError(f"slots have shape {positions.shape}, expected one dimension")
    parts, of_rows, counts = _sort_sources(sources, widths)
    total = sum(counts)
    if total != len(positions):
        raise ValueError(f"{total} rows for {len(positions)} slots")
    if total:
        if positions.min() < 0 or positions.max() >= num_tokens:
            raise ValueError(f"a slot lies outside the {num_tokens} tokens of the step")
        if of_rows is not None:
            positions = positions[np.argsort(of_rows, kind="stable")]
    positions = positions.astype(np.int32)
    table = np.full(num_tokens, -1, dtype=np.int32)
    table[positions] = np.arange(total, dtype=np.int32)
    if np.count_nonzero(table >= 0) != total:
        raise ValueError("a slot is given to more than one row")
    if device.type == "cpu":
        on_cpu = tuple(tuple(_settle(p, dtype, device) for p in part) for part in parts)
        return RowPlan(
            on_cpu,
            counts,
            torch.from_numpy(table),
            torch.from_numpy(positions),
            tuple(widths),
            dtype,
        )
    return _finish_on_device(parts, counts, positions, table, widths, dtype, device)


def _sort_sources(
    sources: Sequence[RowSource], widths: Sequence[int]
) -> tuple[list[list[torch.Tensor]], np.ndarray | None, tuple[int, ...]]:
    """Rows per modality, modality of each row (None where there is but one), counts."""
    parts: list[list[torch.Tensor]] = [[] for _ in widths]
    counts = [0] * len(widths)
    runs: list[int] = []  # modality and length of each item, until a mixed slice breaks the run
    lengths: list[int] = []
    of_rows: list[np.ndarray] = []
    for source in sources:
        if isinstance(source, tuple):
            modality, rows = source
            shape = rows.shape
            if len(shape) != 2 or not 0 <= modality < len(widths) or shape[1] != widths[modality]:
                _refuse(modality, rows, widths)
            if shape[0]:
                parts[modality].append(rows)
                counts[modality] += shape[0]
                runs.append(modality)
                lengths.append(shape[0])
            continue
        if source.shape[0] == 0:
            continue
        modality_of, groups = resolve_slice(source)
        for modality, rows in groups:
            shape = rows.shape
            if not 0 <= modality < len(widths) or shape[1] != widths[modality]:
                _refuse(modality, rows, widths)
            parts[modality].append(rows)
            counts[modality] += shape[0]
        if modality_of is None:
            runs.append(groups[0].modality)
            lengths.append(source.shape[0])
        else:
            if runs:
                of_rows.append(np.repeat(np.array(runs), lengths))
                runs, lengths = [], []
            of_rows.append(modality_of)
    if sum(count > 0 for count in counts) <= 1:
        return parts, None, tuple(counts)
    if runs:
        of_rows.append(np.repeat(np.array(runs), lengths))
    return parts, np.concatenate(of_rows), tuple(counts)


def _refuse(modality: int, rows: torch.Tensor, widths: Sequence[int]) -> None:
    if not 0 <= modality < len(widths):
        raise ValueError(f"modality index {modality}, expected 0 to {len(widths) - 1}")
    raise ValueError(
        f"modality index {modality}: rows are {tuple(rows.shape)}, expected [n, {widths[modality]}]"
    )


def _settle(rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows on the device, in `dtype`, each row's elements adjacent; a view where they are so."""
    if rows.device != device or rows.dtype != dtype:
        rows = rows.to(device, dtype, non_blocking=True)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _tables(
    parts: Sequence[Sequence[torch.Tensor]],
    counts: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype,
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The entries, the row addresses if there must be any, and the alignment in bytes."""
    spans = [
        [(p.data_ptr(), p.stride(0) if p.shape[0] > 1 else p.shape[1], p.shape[0]) for p in part]
        for part in parts
    ]
    return _tables_of_spans(spans, counts, widths, dtype.itemsize)


def _tables_of_spans(
    spans: Sequence[Sequence[tuple[int, int, int]]],
    counts: Sequence[int],
    widths: Sequence[int],
    itemsize: int,
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Like `_tables`, of (address, row stride in elements, rows) per part."""
    active = [m for m, count in enumerate(counts) if count]
    entries = np.zeros((1 << max(len(active) - 1, 0).bit_length(), ENTRY_FIELDS), dtype=np.int64)
    by_address = any(len(spans[m]) > 1 or spans[m][0][1] >= _MAX_ROW_STRIDE for m in active)
    first, align = 0, _ALIGN_BYTES
    for a, m in enumerate(active):
        address, stride, _ = spans[m][0]
        entries[a, :5] = (m, first, counts[m], address, stride)
        first += counts[m]
        align = math.gcd(align, widths[m] * itemsize)
        if not by_address:
            align = math.gcd(align, address, stride * itemsize)
    if not by_address:
        return entries, None, align
    flat = np.array([span for m in active for span in spans[m]], dtype=np.int64)
    bases, steps, rows = flat[:, 0], flat[:, 1] * itemsize, flat[:, 2]
    ends = np.cumsum(rows)
    within = np.arange(first, dtype=np.int64) - np.repeat(ends - rows, rows)
    addresses = np.repeat(bases, rows) + within * np.repeat(steps, rows)
    lowest = int(np.bitwise_or.reduce(bases) | np.bitwise_or.reduce(steps))
    return entries, addresses, math.gcd(align, lowest)


def _on_host(rows: torch.Tensor) -> bool:
    return rows.device.type == "cpu"


def _staging(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _finish_on_device(
    parts: list[list[torch.Tensor]],
    counts: tuple[int, ...],
    positions: np.ndarray,
    table: np.ndarray,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> RowPlan:
    """One pinned buffer: [entries][row addresses][slot table][slots][rows of modality 0] ..."""
    itemsize = dtype.itemsize
    host = [[p for p in part if _on_host(p)] for part in parts]
    total, active = sum(counts), sum(count > 0 for count in counts)
    at = 0

    def reserve(nbytes: int) -> int:
        nonlocal at
        begin = at
        at = -(-(at + nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES
        return begin

    entries_at = reserve((1 << max(active - 1, 0).bit_length()) * ENTRY_FIELDS * 8)
    addresses_at = reserve(
        total * 8
        if any(len(p) > 1 and len(h) < len(p) for p, h in zip(parts, host, strict=True))
        else 0
    )
    table_at, slots_at = reserve(table.nbytes), reserve(positions.nbytes)
    rows_at = [
        reserve(sum(p.shape[0] for p in part) * width * itemsize)
        for part, width in zip(host, widths, strict=True)
    ]
    # The caching host allocator keeps the block until the copy that reads it has run.
    staging = _staging(at)
    moved = torch.empty(at, dtype=torch.uint8, device=device)
    base = moved.data_ptr()
    moved_parts: list[tuple[torch.Tensor, ...]] = []
    spans: list[list[tuple[int, int, int]]] = []
    for part, on_host, begin, width in zip(parts, host, rows_at, widths, strict=True):
        of_part: list[torch.Tensor] = []
        if on_host:
            count = sum(p.shape[0] for p in on_host)
            end = begin + count * width * itemsize
            target = staging[begin:end].view(dtype).view(count, width)
            same = all(p.dtype == dtype for p in on_host)
            torch.cat(on_host if same else [p.to(dtype) for p in on_host], out=target)
            there = moved[begin:end].view(dtype).view(count, width)
            if len(on_host) == len(part):
                moved_parts.append((there,))
                spans.append([(base + begin, width, count)])
                continue
            of_part = list(there.split([p.shape[0] for p in on_host]))
        # In their order: rows on the device as they lie, rows from the host from the copy.
        from_host = iter(of_part)
        settled = tuple(next(from_host) if _on_host(p) else _settle(p, dtype, device) for p in part)
        moved_parts.append(settled)
        spans.append(
            [(p.data_ptr(), p.stride(0) if p.shape[0] > 1 else width, p.shape[0]) for p in settled]
        )
    entries, addresses, align = _tables_of_spans(spans, counts, widths, itemsize)
    staged = staging.numpy()

    def put(begin: int, array: np.ndarray) -> torch.Tensor:
        staged[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        kind = torch.int64 if array.dtype == np.int64 else torch.int32
        return moved[begin : begin + array.nbytes].view(kind)

    row_addresses = None
    if addresses is not None:
        if addresses_at == table_at:  # a single tensor whose rows lie too far apart
            row_addresses = torch.from_numpy(addresses).pin_memory().to(device, non_blocking=True)
        else:
            row_addresses = put(addresses_at, addresses)
    entries_there = put(entries_at, entries).view(-1, ENTRY_FIELDS)
    slot_table, all_slots = put(table_at, table), put(slots_at, positions)
    moved.copy_(staging, non_blocking=True)
    return RowPlan(
        tuple(moved_parts),
        counts,
        slot_table,
        all_slots,
        tuple(widths),
        dtype,
        RowTables(entries_there, row_addresses, align),
    )
