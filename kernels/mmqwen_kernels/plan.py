"""Which row goes to which slot: the host's part of the op.

No device-to-host sync and one host-to-device copy, whatever the number of items: rows that lie on
the host are gathered, modality by modality, into one pinned buffer that also holds the order of the
step's tokens and the tables by which the kernels find rows. Rows that lie on the device stay where
they are. Of tensors, a modality's rows travel or stay, never both; of rows by address, each does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from mmqwen_kernels import native
from mmqwen_kernels.row_tables import (
    ALIGN_BYTES,
    ENTRY_BYTES,
    NUM_TEXT_FIELD,
    Span,
    Staying,
    aligned,
    copy_rows,
    is_far,
    num_entries,
    span_of,
    tables_of,
)
from mmqwen_kernels.sources import HostRows, RowSource, collect_rows, split_tokens
from mmqwen_kernels.upload import uploader

MAX_MODALITIES = 256  # numpy sorts bytes by counting them


@dataclass(frozen=True, eq=False)
class RowPlan:
    """The rows of one step on the device, grouped by modality, and how the kernels find them.

    A plan refers to the rows of its sources that lie on the device already: they must not change
    before the op has run. It is for the stream on which it was made. A CUDA graph that was captured
    with it reads its buffer: keep the plan as long as the graph.

    Attributes:
        counts: per modality R_m.
        widths: per modality d_m.
        num_tokens: T.
        dtype: of the rows.
        parts: per modality the tensors `[n, d_m]` that stayed where they were; empty for rows that
            travelled, which lie in `buffer`, or were given by address.
        buffer: uint8 on the device: entries (int64 `[A, 8]`, see `triton_kernels.py`), addresses,
            order, rows. Empty where the kernels need none of them.
        addresses_at: where in it the address of each row begins, in bytes; -1 where each
            modality's rows lie one stride apart.
        order_at: where the order of the tokens begins.
        rows_at: per modality where its rows begin, or -1.
        align_bytes: 1 to 16; every address, row stride and row length is a multiple of it.
        address: of the first modality's first row.
        stride: of the first modality's rows, in elements.
        held: tensors on the device in which rows lie that were given by address.
        num_projected: P, rows projected before; their addresses stand right before the order.
        tables: `[n, D]`, in which those lie.
    """

    counts: tuple[int, ...]
    widths: tuple[int, ...]
    num_tokens: int
    dtype: torch.dtype
    parts: tuple[tuple[torch.Tensor, ...], ...]
    buffer: torch.Tensor
    addresses_at: int
    order_at: int
    rows_at: tuple[int, ...]
    align_bytes: int
    address: int
    stride: int
    held: tuple[torch.Tensor, ...] = ()
    num_projected: int = 0
    tables: tuple[torch.Tensor, ...] = ()

    @cached_property
    def num_rows(self) -> int:
        """R, of all modalities, without those that were projected before."""
        return sum(self.counts)

    @cached_property
    def order(self) -> torch.Tensor:
        """int64 `[T]` on the device: text slots, those of projected rows, the rows' by modality."""
        return self._words(self.order_at, self.num_tokens)

    @property
    def all_slots(self) -> torch.Tensor:
        """int64 `[P + R]` on the device: all but the text slots."""
        return self.order[self.num_tokens - self.num_rows - self.num_projected :]

    @cached_property
    def projected(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows that were projected before, `[P, D]`, and their slots; None without any."""
        if not self.num_projected:
            return None
        address = self._words(self.order_at - 8 * self.num_projected, self.num_projected)
        return self._gather(address, self.tables), self.all_slots[: self.num_projected]

    def _words(self, begin: int, count: int) -> torch.Tensor:
        return self.buffer[begin : begin + 8 * count].view(torch.int64)

    @cached_property
    def rows(self) -> tuple[torch.Tensor | None, ...]:
        """Per modality `[R_m, d_m]`, or None where it has no rows; concatenated on first use."""
        return tuple(self._rows_of(m) for m in range(len(self.counts)))

    def _rows_of(self, m: int) -> torch.Tensor | None:
        if not self.counts[m]:
            return None
        if self.parts[m]:
            return self.parts[m][0] if len(self.parts[m]) == 1 else torch.cat(self.parts[m])
        width, row_bytes = self.widths[m], self.widths[m] * self.dtype.itemsize
        places = [rows for rows in self.held if rows.shape[1] == width]
        if self.rows_at[m] >= 0:
            rest = self.buffer[self.rows_at[m] :]
            count = len(rest) // row_bytes if self.addresses_at >= 0 else self.counts[m]
            places.append(rest[: count * row_bytes].view(self.dtype).view(count, width))
        if self.addresses_at < 0:
            return places[-1]
        first = self.addresses_at + 8 * sum(self.counts[:m])
        return self._gather(self._words(first, self.counts[m]), places)

    def _gather(self, address: torch.Tensor, places: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows that lie here and there, each found by its address, else zeros; no sync."""
        row_bytes = places[0].shape[1] * self.dtype.itemsize
        found = torch.zeros((), dtype=self.dtype, device=self.buffer.device)
        for rows in places:
            at = address - rows.data_ptr()
            picked = rows.index_select(0, (at // row_bytes).clamp(0, len(rows) - 1))
            inside = ((at >= 0) & (at < len(rows) * row_bytes)).unsqueeze(1)
            found = torch.where(inside, picked, found)
        return found

    @cached_property
    def slots(self) -> tuple[torch.Tensor | None, ...]:
        """Per modality int64 `[R_m]`, or None where it has no rows."""
        parts = self.all_slots[self.num_projected :].split(self.counts)
        return tuple(
            part if count else None for part, count in zip(parts, self.counts, strict=True)
        )


def plan_rows(
    sources: HostRows | Sequence[RowSource],
    slots: torch.Tensor | np.ndarray | Sequence[int],
    num_tokens: int,
    widths: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> RowPlan:
    """Assign the rows of `sources` to `slots`, in order, and bring them to `device`.

    Args:
        sources: rows by address, or (modality, `[n, d]`) items, in the order of the slots.
        slots: a CPU bool mask `[T]`, or the positions themselves, integers, distinct.
        num_tokens: T.
        widths: d of each modality.
        dtype: dtype of the rows on the device.
        device: where the rows shall lie.

    Raises:
        ValueError: the number of rows is not the number of slots, a source is no pair, a row has
            the wrong width, a slot is no integer, is taken twice or lies outside the step, slots
            lie on a device, or a modality index is unknown.
        RuntimeError: the device's current stream is being captured.
    """
    if type(device) is not torch.device:
        device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # rows know theirs, and are compared by it
        device = torch.device("cuda", torch.cuda.current_device())
    if len(widths) > MAX_MODALITIES:
        raise ValueError(f"{len(widths)} modalities, expected {MAX_MODALITIES} at most")
    if isinstance(sources, HostRows) and sources.resident is sources.projected is None:
        made = _plan_natively(sources, slots, num_tokens, widths, dtype, device)
        if made is not None:
            return made
    text, positions = split_tokens(slots, num_tokens)
    parts: list[list[torch.Tensor]] = [[] for _ in widths]
    if not isinstance(sources, HostRows):
        sources = collect_rows(sources, widths, dtype, device, parts)
    total = len(sources.address)
    if total != len(positions):
        raise ValueError(f"{total} rows for {len(positions)} slots; sources follow their slots")
    done, done_address, tables = positions[:0], positions[:0], sources.tables
    if sources.projected is not None:
        sources, positions, done, done_address = sources.split(sources.projected, positions)
    modality, address, resident, held = sources[:4]
    counts = np.bincount(modality, minlength=len(widths)).tolist()
    if len(counts) > len(widths):
        raise ValueError(f"modality index {len(counts) - 1}, expected 0 to {len(widths) - 1}")
    if max(counts, default=0) < len(positions):  # several modalities
        by_modality = modality.astype(np.uint8).argsort(kind="stable")
        positions, address = positions[by_modality], address[by_modality]
        if resident is not None:
            modality, resident = modality[by_modality], resident[by_modality]
    stay = None
    if resident is not None:
        travelling = np.bincount(modality[~resident], minlength=len(widths)).tolist()
        on_device = tuple(rows for rows in held if rows.device == device)
        stay = Staying(address, resident, on_device, travelling)

    def write(raw: np.ndarray, order_at: int, rows_at: list[int]) -> None:
        """`positions` and `address` are grouped by modality."""
        order = raw[order_at : order_at + 8 * num_tokens].view(np.int64)
        raw[order_at - done_address.nbytes : order_at].view(np.int64)[:] = done_address
        order[:] = np.concatenate([text, done, positions])
        first = 0
        for m, count in enumerate(counts):
            if rows_at[m] >= 0:
                moving = address[first : first + count]
                if resident is not None:
                    moving = moving[~resident[first : first + count]]
                copy_rows(raw, rows_at[m], moving, widths[m] * dtype.itemsize)
            first += count

    gathered = (len(text), done_address, tables) if len(done) else None
    return _lay_out(parts, counts, num_tokens, widths, dtype, device, write, stay, gathered)


def _plan_natively(
    rows: HostRows,
    slots: torch.Tensor | np.ndarray | Sequence[int],
    num_tokens: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> RowPlan | None:
    """The plan of rows by address and a mask; None: look at it in Python, which may refuse it."""
    if native.helper is None:
        return None
    modality, address = rows.modality, rows.address
    counts = native.helper.count_rows(address, modality, slots, num_tokens, len(widths))
    if counts is None:
        return None
    row_bytes = tuple([width * dtype.itemsize for width in widths])

    def write(raw: np.ndarray, order_at: int, rows_at: list[int]) -> None:
        native.helper.write_rows(
            address, modality, slots, raw, counts, row_bytes, order_at, rows_at
        )

    return _lay_out([[]] * len(widths), counts, num_tokens, widths, dtype, device, write)


def plan_of_rows(rows: torch.Tensor) -> RowPlan:
    """A plan of rows `[R, d]` of one modality that go to `out[r]` each: no slots, nothing moves."""
    if (rows.shape[1] > 1 and rows.stride(1) != 1) or is_far(rows):
        rows = rows.contiguous()
    count, width = rows.shape
    address, stride, _ = span_of(rows, width)
    itemsize = rows.dtype.itemsize
    return RowPlan(
        counts=(count,),
        widths=(width,),
        num_tokens=count,
        dtype=rows.dtype,
        parts=((rows,),),
        buffer=torch.empty(0, dtype=torch.uint8, device=rows.device),
        addresses_at=-1,
        order_at=0,
        rows_at=(-1,),
        align_bytes=math.gcd(ALIGN_BYTES, address, stride * itemsize, width * itemsize),
        address=address,
        stride=stride,
    )


def _lay_out(
    parts: Sequence[Sequence[torch.Tensor]],
    counts: Sequence[int],
    num_tokens: int,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    write: Callable[[np.ndarray, int, list[int]], None],
    stay: Staying | None = None,
    gathered: tuple[int, np.ndarray, tuple[torch.Tensor, ...]] | None = None,
) -> RowPlan:
    """One buffer: [entries][row addresses][projected rows' addresses][order][modality 0's rows] ...

    `write(raw, order_at, rows_at)` writes the order of the tokens and the rows that travel.
    """
    itemsize, total = dtype.itemsize, sum(counts)
    by_address = stay is not None or any(len(part) > 1 or is_far(part[0]) for part in parts if part)
    moving = counts if stay is None else stay.travelling
    entries_here = num_entries(len(counts))
    addresses_at = entries_here * ENTRY_BYTES
    num_text, projected, tables = gathered or (0, np.empty(0, np.int64), ())
    order_at = addresses_at + (aligned(8 * total) if by_address else 0) + projected.nbytes
    rows_at, size = [-1] * len(widths), order_at + 8 * num_tokens
    for m in range(len(counts)):
        if moving[m] and not parts[m]:
            size = rows_at[m] = aligned(size)
            size += moving[m] * widths[m] * itemsize
    size = aligned(size)

    if device.type == "cpu":
        moved = torch.empty(size, dtype=torch.uint8)
        raw = moved.numpy()
    else:
        up = uploader(device)
        staging = up.lend(size)
        raw = staging.bytes
    write(raw, order_at, rows_at)

    spans: list[list[Span]] = []
    align = ALIGN_BYTES

    def complete(base: int) -> None:
        """Write what depends on where the buffer lies on the device."""
        nonlocal align
        for part, width, at, count in zip(parts, widths, rows_at, counts, strict=True):
            here = [(base + at, width, count)] if at >= 0 else []
            spans.append([span_of(rows, width) for rows in part] if part else here)
        found = None if stay is None else stay.addresses(base, counts, rows_at, widths, itemsize)
        entries, addresses, align = tables_of(spans, counts, widths, itemsize, by_address, found)
        if gathered is not None:
            entries[NUM_TEXT_FIELD] = num_text
            align = math.gcd(align, int(np.bitwise_or.reduce(projected)))
        struct.pack_into(f"{len(entries)}q", raw.data, 0, *entries)
        if addresses is not None:
            raw[addresses_at : addresses_at + 8 * total].view(np.int64)[:] = addresses

    if device.type == "cpu":
        complete(moved.data_ptr())
    else:
        moved = up.upload(staging, size, complete)
    first_span = next((of[0] for of in spans if of), (0, 0, 0))
    return RowPlan(
        counts=tuple(counts),
        widths=tuple(widths),
        num_tokens=num_tokens,
        dtype=dtype,
        parts=tuple(map(tuple, parts)),
        buffer=moved,
        addresses_at=addresses_at if by_address else -1,
        order_at=order_at,
        rows_at=tuple(rows_at),
        align_bytes=align,
        address=first_span[0],
        stride=first_span[1],
        held=() if stay is None else stay.held,
        num_projected=len(projected),
        tables=tables,
    )
