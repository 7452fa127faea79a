"""Which row goes to which slot: the host's part of the op.

No device-to-host sync and one host-to-device copy, whatever the number of items: rows that lie on
the CPU are gathered, modality by modality, into one pinned buffer that also holds the slot table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmqwen_kernels.packing import read_slice

_ALIGN_BYTES = 16

RowSource = torch.Tensor | tuple[int, torch.Tensor]
"""Either a slice of a pack's directory (int64 `[n, 2]`) or (modality index, rows `[n, d]`)."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of one step on the device, grouped by modality.

    Attributes:
        rows: per modality `[R_m, d_m]` contiguous, or None where it has no rows.
        slots: per modality int32 `[R_m]`, or None.
        counts: per modality R_m.
        slot_table: int32 `[T]` on the device: -1 for a text slot, else the row's index in the
            concatenation of all modalities.
        all_slots: int32 `[R]` on the device, the concatenation of `slots`.
    """

    rows: tuple[torch.Tensor | None, ...]
    slots: tuple[torch.Tensor | None, ...]
    counts: tuple[int, ...]
    slot_table: torch.Tensor
    all_slots: torch.Tensor


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
        slots: a CPU bool mask `[T]`, or the positions themselves.
        num_tokens: T.
        widths: d of each modality.
        dtype: dtype of the rows on the device.
        device: where the rows shall lie.

    Raises:
        ValueError: the number of rows is not the number of slots, a row has the wrong width, or
            a modality index is unknown.
        PackError: a pack slice has lost its pack.
    """
    device = torch.device(device)
    positions = slots_of_mask(slots)
    parts: list[list[torch.Tensor]] = [[] for _ in widths]
    modality_of: list[np.ndarray] = []
    for source in sources:
        if isinstance(source, tuple):
            modality, rows = source
            if rows.shape[0] == 0:
                continue
            _check(modality, rows, widths)
            parts[modality].append(rows)
            modality_of.append(np.full(rows.shape[0], modality, dtype=np.int64))
            continue
        if source.shape[0] == 0:
            continue
        of_row, groups = read_slice(source)
        for modality, rows in groups:
            _check(modality, rows, widths)
            parts[modality].append(rows)
        modality_of.append(of_row)
    of_rows = np.concatenate(modality_of) if modality_of else np.empty(0, dtype=np.int64)
    if len(of_rows) != len(positions):
        raise ValueError(f"{len(of_rows)} rows for {len(positions)} slots")
    counts = tuple(np.bincount(of_rows, minlength=len(widths)).tolist())
    order = np.argsort(of_rows, kind="stable") if sum(c > 0 for c in counts) > 1 else slice(None)
    positions = positions[order].astype(np.int32)
    if len(positions) and (positions.min() < 0 or positions.max() >= num_tokens):
        raise ValueError(f"a slot lies outside the {num_tokens} tokens of the step")
    table = np.full(num_tokens, -1, dtype=np.int32)
    table[positions] = np.arange(len(positions), dtype=np.int32)
    if device.type == "cpu":
        return _finish_on_cpu(parts, counts, positions, table, dtype)
    return _finish_on_device(parts, counts, positions, table, widths, dtype, device)


def _check(modality: int, rows: torch.Tensor, widths: Sequence[int]) -> None:
    if not 0 <= modality < len(widths):
        raise ValueError(f"modality index {modality}, expected 0 to {len(widths) - 1}")
    if rows.ndim != 2 or rows.shape[1] != widths[modality]:
        raise ValueError(
            f"modality index {modality}: rows are {tuple(rows.shape)}, expected "
            f"[n, {widths[modality]}]"
        )


def _split(all_slots: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor | None, ...]:
    return tuple(
        part if count else None
        for part, count in zip(all_slots.split(list(counts)), counts, strict=True)
    )


def _finish_on_cpu(
    parts: list[list[torch.Tensor]],
    counts: tuple[int, ...],
    positions: np.ndarray,
    table: np.ndarray,
    dtype: torch.dtype,
) -> RowPlan:
    rows = tuple(torch.cat(part).to(device="cpu", dtype=dtype) if part else None for part in parts)
    all_slots = torch.from_numpy(positions)
    return RowPlan(rows, _split(all_slots, counts), counts, torch.from_numpy(table), all_slots)


def _finish_on_device(
    parts: list[list[torch.Tensor]],
    counts: tuple[int, ...],
    positions: np.ndarray,
    table: np.ndarray,
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> RowPlan:
    """One pinned buffer: [slot table][slots][rows of modality 0][rows of modality 1] ..."""
    spans: list[tuple[int, int]] = []
    at = 0

    def reserve(nbytes: int) -> None:
        nonlocal at
        spans.append((at, nbytes))
        at = -(-(at + nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES

    reserve(table.nbytes)
    reserve(positions.nbytes)
    on_host = [all(p.device.type == "cpu" for p in part) for part in parts]
    for part, host, count, width in zip(parts, on_host, counts, widths, strict=True):
        reserve(count * width * dtype.itemsize if part and host else 0)
    # The caching host allocator keeps the block until the copy that reads it has run.
    staging = torch.empty(at, dtype=torch.uint8, pin_memory=True)
    staging_np = staging.numpy()
    staging_np[: table.nbytes] = table.view(np.uint8)
    begin, nbytes = spans[1]
    staging_np[begin : begin + nbytes] = positions.view(np.uint8)
    for (begin, nbytes), part, width in zip(spans[2:], parts, widths, strict=True):
        if nbytes:
            target = staging[begin : begin + nbytes].view(dtype).view(-1, width)
            if all(p.dtype == dtype for p in part):
                torch.cat(part, out=target)
            else:
                torch.cat([p.to(dtype) for p in part], out=target)
    moved = staging.to(device, non_blocking=True)
    slot_table = moved[: table.nbytes].view(torch.int32)
    begin, nbytes = spans[1]
    all_slots = moved[begin : begin + nbytes].view(torch.int32)
    rows: list[torch.Tensor | None] = []
    for (begin, nbytes), part, width in zip(spans[2:], parts, widths, strict=True):
        if nbytes:
            rows.append(moved[begin : begin + nbytes].view(dtype).view(-1, width))
        elif part:
            rows.append(torch.cat([p.to(device, dtype, non_blocking=True) for p in part]))
        else:
            rows.append(None)
    return RowPlan(tuple(rows), _split(all_slots, counts), counts, slot_table, all_slots)
