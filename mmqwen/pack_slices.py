"""Where the rows of packs' slices lie: in their packs, or in banks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from mmqwen.packs import (
    BANK_CODE,
    BEGIN_MASK,
    DTYPE_AT,
    DTYPE_CODES,
    HEADER_WORDS,
    MAGIC,
    MAX_MODALITY,
    MAX_WIDTH,
    MODALITY_AT,
    WIDTH_AT,
    WIDTH_BITS,
    PackError,
    kind_of,
)
from mmqwen_kernels import HostRows, native

ON_DEVICE, PROJECTED = 1, 2
"""Where a bank's rows lie, for the native helper; 0: on the host."""


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
        inside = low <= begin <= end - 8 * HEADER_WORDS
        if not inside or ctypes.c_int64.from_address(begin).value != MAGIC:
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
    named = entries >> DTYPE_AT == BANK_CODE
    if not named.any():
        return _find_in_packs(entries, first, last, widths, dtype)
    if banks is None:
        raise PackError("a pack names rows of a bank, and there are no banks")
    of_banks = banks.find(
        entries[named] >> WIDTH_AT & MAX_WIDTH,
        entries[named] & BEGIN_MASK,
        entries[named] >> MODALITY_AT & MAX_MODALITY,
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
    kind = entries >> WIDTH_AT  # width, modality and dtype
    modality = (kind >> WIDTH_BITS) & MAX_MODALITY
    expected = np.array([kind_of(width, m, code) for m, width in enumerate(widths)])
    if (kind != expected.take(modality, mode="clip")).any():
        if (kind >> (DTYPE_AT - WIDTH_AT) != code).any():
            raise PackError(f"a pack holds rows of another dtype than {dtype}")
        _refuse_rows(kind & MAX_WIDTH, modality, widths)
    address = (entries & BEGIN_MASK) + begin
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
