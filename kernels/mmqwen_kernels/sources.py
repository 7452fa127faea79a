"""What a plan is made of: rows, loose or by address, and the slots that they go to; checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

RowSource = tuple[int, torch.Tensor]
"""(modality index, rows `[n, d]`)."""

_NO_SOURCES = "sources are no list of (modality index, tensor [n, d]), in the order of their slots"


class HostRows(NamedTuple):
    """Rows by their addresses in host memory, which must outlive the call of `plan_rows`.

    Attributes:
        modality: integers `[R]`, the modality index of each row.
        address: int64 `[R]`, where each row begins: d adjacent elements of the plan's dtype.
        resident: bool `[R]`, of which rows that is an address on the device, inside one of `held`,
            where they stay; None: of none.
        held: tensors `[n, d]` of the plan's dtype that hold rows.
        projected: bool `[R]`, which rows were projected before: their addresses are of rows of D
            elements inside one of `tables`, or 0, which gives zeros (the row is another rank's).
        tables: tensors `[n, D]` of the plan's dtype on the device.
    """

    modality: np.ndarray
    address: np.ndarray
    resident: np.ndarray | None = None
    held: tuple[torch.Tensor, ...] = ()
    projected: np.ndarray | None = None
    tables: tuple[torch.Tensor, ...] = ()

    def split(self, done: np.ndarray, positions: np.ndarray) -> tuple[HostRows, Any, Any, Any]:
        """The rows not `done` and their positions; positions and addresses of those `projected`."""
        rest, resident = ~done, self.resident
        if resident is not None:
            resident = resident[rest] if resident[rest].any() else None
        others = HostRows(self.modality[rest], self.address[rest], resident, self.held)
        return others, positions[rest], positions[done], self.address[done]


def split_tokens(
    slots: torch.Tensor | np.ndarray | Sequence[int], num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Text slots, ascending, and the rows' slots in their order; int64."""
    if isinstance(slots, torch.Tensor) and not slots.is_cpu:
        raise ValueError(f"slots lie on {slots.device}, expected the CPU: plans are made there")
    if isinstance(slots, torch.Tensor) and slots.numel() and slots.is_floating_point():
        raise ValueError(f"slots are {slots.dtype}, expected a bool mask or integer positions")
    array = slots.numpy() if isinstance(slots, torch.Tensor) else np.asarray(slots)
    if array.ndim != 1:
        raise ValueError(f"slots have shape {array.shape}, expected one dimension: flatten() them")
    if array.dtype == np.bool_:
        if len(array) != num_tokens:
            raise ValueError(f"a mask of {len(array)} slots for the {num_tokens} tokens of a step")
        return (~array).nonzero()[0], array.nonzero()[0]
    if len(array) and array.dtype.kind not in "iu":  # no slots at all are float64 to numpy
        raise ValueError(f"slots are {array.dtype}, expected a bool mask or integer positions")
    positions = array.astype(np.int64)
    if len(positions) and (positions.min() < 0 or positions.max() >= num_tokens):
        raise ValueError(f"a slot lies outside the {num_tokens} tokens of the step")
    is_text = np.ones(num_tokens, dtype=np.bool_)
    is_text[positions] = False
    text = is_text.nonzero()[0]
    if len(text) + len(positions) != num_tokens:
        raise ValueError("a slot is given to more than one row")
    return text, positions


def collect_rows(
    sources: Sequence[RowSource],
    widths: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    parts: list[list[torch.Tensor]],
) -> HostRows:
    """Loose tensors as rows by address.

    A modality stays where one of its tensors lies on the device: it goes into `parts` instead, and
    its rows have the address 0.
    """
    try:
        stays = {m for m, rows in sources if _lies_on(rows, device)}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(_NO_SOURCES) from error
    modality: list[int] = []
    lengths: list[int] = []
    held: list[torch.Tensor] = []
    address = [np.empty(0, dtype=np.int64)]
    for m, rows in sources:
        if rows.ndim != 2 or not 0 <= m < len(widths) or rows.shape[1] != widths[m]:
            _refuse(m, rows, widths)
        count = rows.shape[0]
        if not count:
            continue
        modality.append(m)
        lengths.append(count)
        if m in stays:
            parts[m].append(_settle(rows, dtype, device))
            address.append(np.zeros(count, dtype=np.int64))
            continue
        if rows.requires_grad:
            raise ValueError(
                f"modality index {m}: rows that need gradients lie on {rows.device}, expected "
                f"{device}; move them there first"
            )
        rows = rows.to("cpu", dtype).contiguous()
        held.append(rows)
        begin, step = rows.data_ptr(), rows.shape[1] * dtype.itemsize
        address.append(np.arange(begin, begin + count * step, step, dtype=np.int64))
    each = np.array(modality, dtype=np.int64).repeat(np.array(lengths, dtype=np.int64))
    return HostRows(each, np.concatenate(address), held=tuple(held))


def _lies_on(rows: torch.Tensor, device: torch.device) -> bool:
    return rows.device == device


def _settle(rows: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows on the device, in `dtype`, each row's elements adjacent; a view where they are so."""
    rows = rows.to(device, dtype, non_blocking=True)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _refuse(modality: int, rows: torch.Tensor, widths: Sequence[int]) -> None:
    if isinstance(modality, torch.Tensor):  # [2, d] rows unpack, too
        raise ValueError(_NO_SOURCES)
    if not 0 <= modality < len(widths):
        raise ValueError(f"modality index {modality}, expected 0 to {len(widths) - 1}")
    raise ValueError(
        f"modality index {modality}: rows are {tuple(rows.shape)}, expected [n, {widths[modality]}]"
    )
