"""How the kernels find rows: an entry a modality, and an address a row where that is not enough."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

ALIGN_BYTES = 16
ENTRY_FIELDS = 8
ENTRY_BYTES = 8 * ENTRY_FIELDS
NUM_TEXT_FIELD = 5  # of the first entry: text slots, in steps with rows projected before
_MAX_ROW_STRIDE = 1 << 23  # elements: 256 rows of a tile times this fit in int32

Span = tuple[int, int, int]
"""Address, row stride in elements, and number of rows that lie one stride apart."""


def num_entries(modalities: int) -> int:
    """A power of two with room for all modalities: one value an engine, so one set of kernels."""
    return 1 << max(modalities - 1, 0).bit_length()


def span_of(rows: torch.Tensor, width: int) -> Span:
    """Of rows `[n, d]` whose elements are adjacent."""
    count = rows.shape[0]
    return rows.data_ptr(), rows.stride(0) if count > 1 else width, count


def is_far(rows: torch.Tensor) -> bool:
    """Whether a tile's offsets within these rows would not fit in int32."""
    return rows.shape[0] > 1 and rows.stride(0) >= _MAX_ROW_STRIDE


def tables_of(
    spans: Sequence[Sequence[Span]],
    counts: Sequence[int],
    widths: Sequence[int],
    itemsize: int,
    by_address: bool,
    addresses: np.ndarray | None = None,
) -> tuple[list[int], np.ndarray | None, int]:
    """The entries `[A, 8]` (see `triton_kernels.py`), flat; the row addresses `[R]` if wanted,
    those of the spans unless given; and the alignment in bytes."""
    table: list[int] = []
    first, align = 0, ALIGN_BYTES
    for m, (count, width) in enumerate(zip(counts, widths, strict=True)):
        if not count:
            continue
        address, stride, _ = spans[m][0] if spans[m] else (0, width, 0)
        table += (m, first, count, address, stride, 0, 0, 0)
        first += count
        align = math.gcd(align, width * itemsize)
        if not by_address:
            align = math.gcd(align, address, stride * itemsize)
    table += [0] * (ENTRY_FIELDS * num_entries(len(counts)) - len(table))
    if not by_address:
        return table, None, align
    if addresses is not None:
        return table, addresses, math.gcd(align, int(np.bitwise_or.reduce(addresses)))
    flat = [span for of, count in zip(spans, counts, strict=True) if count for span in of]
    bases, steps, rows = np.array(flat, dtype=np.int64).T
    steps = steps * itemsize
    # Row r of the step lies r steps behind where row 0 would, if its part began there.
    origins = bases - (rows.cumsum() - rows) * steps
    addresses = np.arange(first, dtype=np.int64) * steps.repeat(rows)
    addresses += origins.repeat(rows)
    return table, addresses, math.gcd(align, *bases.tolist(), *steps.tolist())


def aligned(at: int) -> int:
    """The next offset in bytes at which rows may begin."""
    return -(-at // ALIGN_BYTES) * ALIGN_BYTES


def copy_rows(target: np.ndarray, begin: int, addresses: np.ndarray, nbytes: int) -> None:
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


class Staying(NamedTuple):
    """Rows by address, by modality, some of which lie on the device.

    Attributes:
        address: int64 `[R]`.
        resident: bool `[R]`, which do.
        held: the tensors in which those lie.
        travelling: per modality, how many rows do not.
    """

    address: np.ndarray
    resident: np.ndarray
    held: tuple[torch.Tensor, ...]
    travelling: list[int]

    def addresses(
        self,
        base: int,
        counts: Sequence[int],
        rows_at: Sequence[int],
        widths: Sequence[int],
        itemsize: int,
    ) -> np.ndarray:
        """int64 `[R]`: where the rows lie once the buffer lies at `base`."""
        found = np.where(self.resident, self.address, 0)
        first = 0
        for count, at, width in zip(counts, rows_at, widths, strict=True):
            moved = (~self.resident[first : first + count]).nonzero()[0] + first
            found[moved] = base + at + np.arange(len(moved)) * (width * itemsize)
            first += count
        return found
