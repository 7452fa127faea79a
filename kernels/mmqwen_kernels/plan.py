"""Which row goes to which slot: the host's part of the op.

No device-to-host sync and one host-to-device copy, whatever the number of items: rows that lie on
the CPU are gathered, modality by modality, into one pinned buffer that also holds the order of the
step's tokens and the tables by which the kernels find rows. Rows that lie on the device stay where
they are.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from mmqwen_kernels.packing import HostRows, find_rows, resolve_slice
from mmqwen_kernels.staging import uploader

ALIGN_BYTES = 16
ENTRY_FIELDS = 8
ENTRY_BYTES = 8 * ENTRY_FIELDS
MAX_MODALITIES = 256  # numpy sorts bytes by counting them
_MAX_ROW_STRIDE = 1 << 23  # elements: 256 rows of a tile times this fit in int32
_FEW_RUNS = 32
"""Up to here slots are grouped by slices, which cost 1 us each; a sort costs 30 (slow CPU)."""

_SLOT_DTYPES = (torch.bool, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

RowSource = torch.Tensor | tuple[int, torch.Tensor]
"""Either a slice of a pack's directory (int64 `[n, 2]`) or (modality index, rows `[n, d]`)."""


class RowTables(NamedTuple):
    """How the kernels find rows and tokens: parts of one buffer, given by their offset in bytes.

    Attributes:
        buffer: uint8 `[N]` on the device.
        entries_at: int64 `[A, 8]`, see `triton_kernels.py`.
        num_entries: A, a power of two.
        addresses_at: int64 `[R]`, the address of each row; -1 where each modality is one tensor.
        align_bytes: 1 to 16; every address, row stride and row length is a multiple of it.
        address: of the first modality's first row.
        stride: of the first modality's rows, in elements.
    """

    buffer: torch.Tensor
    entries_at: int
    num_entries: int
    addresses_at: int
    align_bytes: int
    address: int
    stride: int


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one step on the device, grouped by modality.

    A plan refers to the rows of its sources that lie on the device already: they must not change
    before the op has run. It is for the stream on which it was made. A CUDA graph that was captured
    with it reads its buffer: keep the plan as long as the graph.

    Attributes:
        parts: per modality its rows in order, tensors `[n, d_m]` on the device; empty for rows
            that came from packs, which `rows` has.
        counts: per modality R_m.
        num_tokens: T.
        widths: per modality d_m.
        dtype: of the rows.
        buffer: uint8 on the device, which holds the order and, for CUDA, rows and tables.
        order_at: where in `buffer` the order begins, in bytes.
        rows_at: per modality where in `buffer` its rows begin, or -1.
        ready_tables: for CUDA.
    """

    parts: tuple[tuple[torch.Tensor, ...], ...]
    counts: tuple[int, ...]
    num_tokens: int
    widths: tuple[int, ...]
    dtype: torch.dtype
    buffer: torch.Tensor
    order_at: int
    rows_at: tuple[int, ...]
    ready_tables: RowTables | None = None
    # What properties have made. Not functools.cached_property: Python 3.11's takes a lock, through
    # which torch.compile cannot see.
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def num_rows(self) -> int:
        """R, of all modalities."""
        return sum(self.counts)

    @property
    def order(self) -> torch.Tensor:
        """int64 `[T]` on the device: the text slots, ascending, then the rows' by modality."""
        if "order" not in self._made:
            end = self.order_at + 8 * self.num_tokens
            self._made["order"] = self.buffer[self.order_at : end].view(torch.int64)
        return cast(torch.Tensor, self._made["order"])

    @property
    def all_slots(self) -> torch.Tensor:
        """int64 `[R]` on the device, the concatenation of `slots`."""
        return self.order[self.num_tokens - self.num_rows :]

    @property
    def rows(self) -> tuple[torch.Tensor | None, ...]:
        """Per modality `[R_m, d_m]`, or None where it has no rows; concatenated on first use."""
        if "rows" not in self._made:
            self._made["rows"] = tuple(self._rows_of(m) for m in range(len(self.counts)))
        return cast("tuple[torch.Tensor | None, ...]", self._made["rows"])

    def _rows_of(self, m: int) -> torch.Tensor | None:
        if not self.counts[m]:
            return None
        if self.parts[m]:
            return self.parts[m][0] if len(self.parts[m]) == 1 else torch.cat(self.parts[m])
        begin, nbytes = self.rows_at[m], self.counts[m] * self.widths[m] * self.dtype.itemsize
        flat = self.buffer[begin : begin + nbytes].view(self.dtype)
        return flat.view(self.counts[m], self.widths[m])

    def _whole(self, m: int) -> tuple[torch.Tensor, ...]:
        rows = self.rows[m]
        return () if rows is None else (rows,)

    @property
    def slots(self) -> tuple[torch.Tensor | None, ...]:
        """Per modality int64 `[R_m]`, or None where it has no rows."""
        if "slots" not in self._made:
            parts = self.all_slots.split(self.counts)
            self._made["slots"] = tuple(
                part if count else None for part, count in zip(parts, self.counts, strict=True)
            )
        return cast("tuple[torch.Tensor | None, ...]", self._made["slots"])

    @property
    def tables(self) -> RowTables:
        """How the kernels find rows: made with the plan for CUDA, on first use elsewhere."""
        if self.ready_tables is not None:
            return self.ready_tables
        if "tables" not in self._made:
            parts = [part or self._whole(m) for m, part in enumerate(self.parts)]
            self._made["tables"] = tables_of(
                parts, self.counts, self.widths, self.dtype, self.buffer.device
            )
        return cast(RowTables, self._made["tables"])


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
            slot is no integer, is taken twice or lies outside the step, slots lie on a device, or a
            modality index is unknown.
        PackError: a pack slice has lost its pack.
        RuntimeError: the device's current stream is being captured.
    """
    if type(device) is not torch.device:
        device = torch.device(device)
    if len(widths) > MAX_MODALITIES:
        raise ValueError(f"{len(widths)} modalities, expected {MAX_MODALITIES} at most")
    text, positions = _split_tokens(slots, num_tokens)
    packed = None
    if sources and not any(isinstance(source, tuple) for source in sources):
        packed = find_rows(cast("Sequence[torch.Tensor]", sources), widths, dtype)
    if packed is not None:
        parts: list[list[torch.Tensor]] = [[] for _ in widths]
        runs: list[Any] = [packed.modality]
        counts = np.bincount(packed.modality, minlength=len(widths)).tolist()
    else:
        parts, runs, counts = _collect(sources, widths)
    total = sum(counts)
    if total != len(positions):
        raise ValueError(f"{total} rows for {len(positions)} slots")
    if total and max(counts) < total:  # several modalities
        if packed is not None or len(runs) > _FEW_RUNS or any(type(r) is not tuple for r in runs):
            by_modality = _modality_of_rows(runs).argsort(kind="stable")
            positions = positions[by_modality]
            if packed is not None:
                packed = HostRows(packed.modality[by_modality], packed.address[by_modality])
        else:
            positions = _grouped_positions(positions, runs, len(widths))
    if device.type == "cpu":
        return _plan_on_cpu(parts, packed, counts, text, positions, widths, dtype)
    return _plan_on_device(parts, packed, counts, text, positions, widths, dtype, device)


# -- slots ---------------------------------------------------------------------------------------


def _split_tokens(
    slots: torch.Tensor | np.ndarray | Sequence[int], num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Text slots, ascending, and the rows' slots in their order; int64."""
    if isinstance(slots, torch.Tensor):
        if not slots.is_cpu:
            raise ValueError(f"slots lie on {slots.device}, expected the CPU: plans are made there")
        if slots.dtype not in _SLOT_DTYPES and len(slots):  # an empty list is float to torch
            raise ValueError(f"slots are {slots.dtype}, expected a bool mask or integer positions")
        array = slots.numpy()
    else:
        array = np.asarray(slots)
        if array.dtype.kind not in "bui" and array.size:
            raise ValueError(f"slots are {array.dtype}, expected a bool mask or integer positions")
    if array.ndim != 1:
        raise ValueError(f"slots have shape {array.shape}, expected one dimension")
    if array.dtype == np.bool_:
        if len(array) != num_tokens:
            raise ValueError(f"a mask of {len(array)} slots for the {num_tokens} tokens of a step")
        return (~array).nonzero()[0], array.nonzero()[0]
    positions = array.astype(np.int64)
    if len(positions) and (positions.min() < 0 or positions.max() >= num_tokens):
        raise ValueError(f"a slot lies outside the {num_tokens} tokens of the step")
    is_text = np.ones(num_tokens, dtype=np.bool_)
    is_text[positions] = False
    text = is_text.nonzero()[0]
    if len(text) + len(positions) != num_tokens:
        raise ValueError("a slot is given to more than one row")
    return text, positions


def _modality_of_rows(runs: Sequence[Any]) -> np.ndarray:
    """The modality of each row as uint8, which numpy sorts by counting."""
    if len(runs) == 1 and type(runs[0]) is not tuple:
        return runs[0].astype(np.uint8)
    if all(type(run) is tuple for run in runs):
        pairs = np.array(runs)
        return np.repeat(pairs[:, 0].astype(np.uint8), pairs[:, 1])
    return np.concatenate(
        [np.full(r[1], r[0], np.uint8) if type(r) is tuple else r.astype(np.uint8) for r in runs]
    )


def _grouped_positions(
    positions: np.ndarray, runs: Sequence[tuple[int, int]], modalities: int
) -> np.ndarray:
    pieces: list[list[np.ndarray]] = [[] for _ in range(modalities)]
    at = 0
    for modality, length in runs:
        pieces[modality].append(positions[at : at + length])
        at += length
    return np.concatenate([piece for of_modality in pieces for piece in of_modality])


# -- rows ----------------------------------------------------------------------------------------


def _collect(
    sources: Sequence[RowSource], widths: Sequence[int]
) -> tuple[list[list[torch.Tensor]], list[Any], list[int]]:
    """Rows per modality; runs, each (modality, length) or the modality of each row; counts."""
    parts: list[list[torch.Tensor]] = [[] for _ in widths]
    counts = [0] * len(widths)
    runs: list[Any] = []
    for source in sources:
        if isinstance(source, tuple):
            modality, rows = source
            shape = rows.shape
            if len(shape) != 2 or not 0 <= modality < len(widths) or shape[1] != widths[modality]:
                _refuse(modality, rows, widths)
            if shape[0]:
                parts[modality].append(rows)
                counts[modality] += shape[0]
                runs.append((modality, shape[0]))
            continue
        if source.shape[0] == 0:
            continue
        modality_of, groups = resolve_slice(source)
        for modality, rows in groups:
            if not 0 <= modality < len(widths) or rows.shape[1] != widths[modality]:
                _refuse(modality, rows, widths)
            parts[modality].append(rows)
            counts[modality] += rows.shape[0]
        runs.append((groups[0].modality, source.shape[0]) if modality_of is None else modality_of)
    return parts, runs, counts


def _refuse(modality: int, rows: torch.Tensor, widths: Sequence[int]) -> None:
    if not 0 <= modality < len(widths):
        raise ValueError(f"modality index {modality}, expected 0 to {len(widths) - 1}")
    raise ValueError(
        f"modality index {modality}: rows are {tuple(rows.shape)}, expected [n, {widths[modality]}]"
    )


def _settle(rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows on the device, in `dtype`, each row's elements adjacent; a view where they are so."""
    if rows.dtype is not dtype or rows.device != device:
        rows = rows.to(device, dtype, non_blocking=True)
    return rows if rows.stride()[1] == 1 or rows.shape[1] == 1 else rows.contiguous()


def _copy_rows(target: np.ndarray, begin: int, addresses: np.ndarray, nbytes: int) -> None:
    """Copy rows of `nbytes` bytes each from host addresses to `target[begin:]`.

    Rows that follow each other in memory are copied at once. By this thread: torch's copy would
    wake its thread pool, which took 10 ms on a 16-core virtual machine.
    """
    breaks = (addresses[1:] - addresses[:-1] != nbytes).nonzero()[0].tolist()
    at = target.ctypes.data + begin
    first = 0
    for last in (*breaks, len(addresses) - 1):
        size = (last + 1 - first) * nbytes
        ctypes.memmove(at, int(addresses[first]), size)
        at += size
        first = last + 1


# -- on the CPU ----------------------------------------------------------------------------------


def _plan_on_cpu(
    parts: list[list[torch.Tensor]],
    packed: HostRows | None,
    counts: Sequence[int],
    text: np.ndarray,
    positions: np.ndarray,
    widths: Sequence[int],
    dtype: torch.dtype,
) -> RowPlan:
    gathered = counts if packed is not None else [0] * len(widths)
    rows_at, at = _lay_rows(8 * (len(text) + len(positions)), gathered, widths, dtype.itemsize)
    buffer = torch.empty(_aligned(at), dtype=torch.uint8)
    raw = buffer.numpy()
    _write_order(raw, 0, text, positions)
    if packed is not None:
        _write_packed(raw, rows_at, packed, counts, widths, dtype.itemsize)
    cpu = torch.device("cpu")
    return RowPlan(
        tuple(tuple(_settle(p, dtype, cpu) for p in part) for part in parts),
        tuple(counts),
        len(text) + len(positions),
        tuple(widths),
        dtype,
        buffer,
        0,
        tuple(rows_at),
    )


def _aligned(at: int) -> int:
    return -(-at // ALIGN_BYTES) * ALIGN_BYTES


def _lay_rows(
    at: int, counts: Sequence[int], widths: Sequence[int], itemsize: int
) -> tuple[list[int], int]:
    """Where each modality's rows begin in a buffer that is full up to `at`, or -1; and its end."""
    rows_at = [-1] * len(widths)
    for m, count in enumerate(counts):
        if count:
            at = rows_at[m] = _aligned(at)
            at += count * widths[m] * itemsize
    return rows_at, at


def _write_order(raw: np.ndarray, at: int, text: np.ndarray, positions: np.ndarray) -> None:
    order = raw[at : at + 8 * (len(text) + len(positions))].view(np.int64)
    order[: len(text)] = text
    order[len(text) :] = positions


def _write_packed(
    raw: np.ndarray,
    rows_at: Sequence[int],
    packed: HostRows,
    counts: Sequence[int],
    widths: Sequence[int],
    itemsize: int,
) -> None:
    first = 0
    for m, count in enumerate(counts):
        if count:
            addresses = packed.address[first : first + count]
            _copy_rows(raw, rows_at[m], addresses, widths[m] * itemsize)
            first += count


# -- on the device -------------------------------------------------------------------------------


def _on_host(rows: torch.Tensor) -> bool:
    return rows.is_cpu


_Span = tuple[int, int, int]
"""Address, row stride in elements, and number of rows that lie one stride apart."""


def _plan_on_device(
    parts: list[list[torch.Tensor]],
    packed: HostRows | None,
    counts: Sequence[int],
    text: np.ndarray,
    positions: np.ndarray,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> RowPlan:
    """One pinned buffer: [entries][row addresses][order][rows of modality 0] ..."""
    itemsize, total = dtype.itemsize, len(positions)
    num_tokens = len(text) + total
    # Of each modality the rows that have to travel, and None in their places in `stay`.
    travel: list[list[torch.Tensor]] = []
    stay: list[list[torch.Tensor | None]] = []
    by_address = False
    for part in parts:
        of_host = [p for p in part if _on_host(p)]
        there: list[torch.Tensor | None] = [None] * len(part)
        if len(of_host) < len(part):
            there = [None if of_host and _on_host(p) else _settle(p, dtype, device) for p in part]
            by_address = by_address or len(there) > 1 or _is_far(there[0])
        travel.append(of_host)
        stay.append(there)
    entries_here = num_entries(len(counts))
    addresses_at = entries_here * ENTRY_BYTES
    order_at = addresses_at + (_aligned(8 * total) if by_address else 0)
    moving = counts
    if packed is None:
        moving = [sum(p.shape[0] for p in of_host) for of_host in travel]
    rows_at, at = _lay_rows(order_at + 8 * num_tokens, moving, widths, itemsize)

    up = uploader(device)
    staging = up.lend(at)
    raw = staging.bytes
    _write_order(raw, order_at, text, positions)
    if packed is not None:
        _write_packed(raw, rows_at, packed, counts, widths, itemsize)
    else:
        for m, of_host in enumerate(travel):
            if of_host:
                _write_tensors(raw, rows_at[m], of_host, dtype)

    spans: list[list[_Span]] = []
    align = ALIGN_BYTES

    def complete(base: int) -> None:
        nonlocal align
        for m, count in enumerate(counts):
            spans.append(_spans_of(stay[m], travel[m], base + rows_at[m], widths[m], itemsize))
            if packed is not None and count:
                spans[m] = [(base + rows_at[m], widths[m], count)]
        entries, addresses, align = _tables_of_spans(spans, counts, widths, itemsize, by_address)
        raw[:addresses_at].view(np.int64)[:] = entries.reshape(-1)
        if addresses is not None:
            raw[addresses_at : addresses_at + 8 * total].view(np.int64)[:] = addresses

    moved = up.upload(staging, at, complete)
    settled: list[tuple[torch.Tensor, ...]] = []
    for m, placed in enumerate(stay):
        if len(travel[m]) == len(placed):  # `RowPlan.rows` finds them in the buffer
            settled.append(())
        elif not travel[m]:
            settled.append(tuple(cast("list[torch.Tensor]", placed)))
        else:
            settled.append(_in_order(placed, travel[m], moved, rows_at[m], widths[m], dtype))
    first = next((m for m, count in enumerate(counts) if count), None)
    address, stride = (0, 0) if first is None else spans[first][0][:2]
    return RowPlan(
        tuple(settled),
        tuple(counts),
        num_tokens,
        tuple(widths),
        dtype,
        moved,
        order_at,
        tuple(rows_at),
        RowTables(
            moved, 0, entries_here, addresses_at if by_address else -1, align, address, stride
        ),
    )


def num_entries(modalities: int) -> int:
    """A power of two with room for all modalities: one value an engine, so one set of kernels."""
    return 1 << max(modalities - 1, 0).bit_length()


def _is_far(rows: torch.Tensor | None) -> bool:
    """Whether a tile's offsets within these rows would not fit in int32."""
    return rows is not None and rows.shape[0] > 1 and rows.stride(0) >= _MAX_ROW_STRIDE


def _write_tensors(
    raw: np.ndarray, begin: int, parts: Sequence[torch.Tensor], dtype: torch.dtype
) -> None:
    for rows in parts:
        if rows.dtype != dtype or not rows.is_contiguous():
            rows = rows.to(dtype).contiguous()
        flat = rows.view(torch.uint8).numpy().reshape(-1)
        raw[begin : begin + flat.size] = flat
        begin += flat.size


def _spans_of(
    stay: Sequence[torch.Tensor | None],
    travel: Sequence[torch.Tensor],
    address: int,
    width: int,
    itemsize: int,
) -> list[_Span]:
    """The parts of one modality in their order; those that travel lie from `address` on."""
    if stay and len(travel) == len(stay):
        return [(address, width, sum(rows.shape[0] for rows in travel))]
    if not travel:
        return [_span_of(rows, width) for rows in cast("list[torch.Tensor]", stay)]
    from_host = iter(travel)
    spans: list[_Span] = []
    for rows in stay:
        if rows is None:
            count = next(from_host).shape[0]
            spans.append((address, width, count))
            address += count * width * itemsize
        else:
            spans.append(_span_of(rows, width))
    return spans


def _span_of(rows: torch.Tensor, width: int) -> _Span:
    count = rows.shape[0]
    return rows.data_ptr(), rows.stride()[0] if count > 1 else width, count


def _in_order(
    stay: Sequence[torch.Tensor | None],
    travel: Sequence[torch.Tensor],
    moved: torch.Tensor,
    begin: int,
    width: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """The parts of one modality on the device, those that travelled among them."""
    from_host = iter(travel)
    found = []
    for rows in stay:
        if rows is None:
            count = next(from_host).shape[0]
            end = begin + count * width * dtype.itemsize
            rows = moved[begin:end].view(dtype).view(count, width)
            begin = end
        found.append(rows)
    return tuple(found)


# -- tables --------------------------------------------------------------------------------------


def tables_of(
    parts: Sequence[Sequence[torch.Tensor]],
    counts: Sequence[int],
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> RowTables:
    """Tables of rows that lie on `device` already.

    Args:
        parts: per modality tensors `[n, d_m]`, each row's elements adjacent.
        counts: per modality R_m, the rows of its parts.
        widths: per modality d_m.
        dtype: of the rows.
        device: theirs, and the tables'.
    """
    spans = [
        _spans_of(part, (), 0, width, dtype.itemsize)
        for part, width in zip(parts, widths, strict=True)
    ]
    by_address = any(len(part) > 1 or any(_is_far(p) for p in part) for part in parts)
    entries, addresses, align = _tables_of_spans(spans, counts, widths, dtype.itemsize, by_address)
    host = entries.reshape(-1)
    if addresses is not None:
        host = np.concatenate([host, addresses])
    if device.type == "cpu":
        buffer = torch.from_numpy(host).view(torch.uint8)
    elif not any(counts) or (len(counts) == 1 and not by_address):  # none, or as arguments
        buffer = torch.empty(0, dtype=torch.uint8, device=device)
    else:
        up = uploader(device)
        staging = up.lend(host.nbytes)
        staging.bytes[: host.nbytes] = host.view(np.uint8)
        buffer = up.upload(staging, host.nbytes, lambda address: None)
    first = next((span[0] for span in spans if span), (0, 0, 0))
    at = entries.nbytes if by_address else -1
    return RowTables(buffer, 0, len(entries), at, align, first[0], first[1])


def _tables_of_spans(
    spans: Sequence[Sequence[_Span]],
    counts: Sequence[int],
    widths: Sequence[int],
    itemsize: int,
    by_address: bool,
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The entries `[A, 8]`, the row addresses `[R]` if wanted, and the alignment in bytes."""
    active = [m for m, count in enumerate(counts) if count]
    table: list[tuple[int, ...]] = []
    first, align = 0, ALIGN_BYTES
    for m in active:
        address, stride, _ = spans[m][0]
        table.append((m, first, counts[m], address, stride, 0, 0, 0))
        first += counts[m]
        align = math.gcd(align, widths[m] * itemsize)
        if not by_address:
            align = math.gcd(align, address, stride * itemsize)
    table += [(0,) * ENTRY_FIELDS] * (num_entries(len(counts)) - len(table))
    entries = np.array(table, dtype=np.int64)
    if not by_address:
        return entries, None, align
    flat = [span for m in active for span in spans[m]]
    bases, steps, rows = np.array(flat, dtype=np.int64).T
    steps = steps * itemsize
    # Row r of the step lies r steps behind where row 0 would, if its part began there.
    origins = bases - (rows.cumsum() - rows) * steps
    addresses = np.arange(first, dtype=np.int64) * steps.repeat(rows)
    addresses += origins.repeat(rows)
    return entries, addresses, math.gcd(align, *bases.tolist(), *steps.tolist())
