"""Banks of a worker, without a worker: for tests of packs and of the native helper."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mmqwen.packs import PackError, allocate_pack, bank_group, write_ids
from mmqwen_kernels import HostRows

VERSION = "ab" * 32


class Tables:
    """Banks, numbered from 0, as `mmqwen.pack_slices.Banks`.

    Args:
        banks: of each its modality's index, its rows `[N, d]`, and whether these count as the
            device's.
    """

    def __init__(self, banks: Sequence[tuple[int, torch.Tensor, bool]]) -> None:
        self.banks = list(banks)

    def find(self, bank: np.ndarray, ids: np.ndarray, modality: np.ndarray) -> HostRows:
        address, resident = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        for at, (number, row, m) in enumerate(zip(bank, ids, modality, strict=True)):
            if number >= len(self.banks) or self.banks[number][0] != m:
                raise PackError("no such bank")
            _, rows, resident[at] = self.banks[number]
            if row >= len(rows):
                raise PackError("no such row")
            address[at] = rows[row].data_ptr()
        return HostRows(modality, address, resident if resident.any() else None, self.held())

    def table(self) -> np.ndarray:
        return np.array(
            [
                (rows.data_ptr(), len(rows), rows[0].nbytes, m, resident, 0, len(rows))
                for m, rows, resident in self.banks
            ],
            dtype=np.int64,
        ).reshape(-1)

    def held(self) -> tuple[torch.Tensor, ...]:
        return tuple(rows for _, rows, resident in self.banks if resident)

    def projections(self) -> tuple[torch.Tensor, ...]:
        return ()


def pack_named(
    runs: Sequence[tuple[int, int | None, Sequence[int]]], widths: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """A pack of runs (modality, bank or None, ids of the bank or as many rows of noise)."""
    order = [m if bank is None else bank_group(m, bank) for m, bank, _ in runs]
    members: dict[int, list[int]] = {}
    for group, (_, _, ids) in zip(order, runs, strict=True):
        members.setdefault(group, []).extend(ids)
    shapes = {group: (len(ids), widths[group & 255]) for group, ids in members.items()}
    pack, views = allocate_pack(order, [len(ids) for _, _, ids in runs], shapes, dtype)
    for view in views.values():
        view.copy_(torch.randn(view.shape))
    for group, ids in members.items():
        if group not in views:
            write_ids(pack, group, np.array(ids), VERSION)
    return pack
