"""Banks inside vLLM: which there are, in any process, and their rows in a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from mmqwen.banks import BankCatalog, BankError, parse_banks
from mmqwen.banks.catalog import ServedBank
from mmqwen.modalities import ModalitySpec
from mmqwen.packs import Group, PackError
from mmqwen.vllm_plugin import compat
from mmqwen_kernels import HostRows

if TYPE_CHECKING:
    from vllm.config import ModelConfig


def bank_catalog(model_config: ModelConfig, specs: Mapping[str, ModalitySpec]) -> BankCatalog:
    """The banks that a served model's config names; none where it names none.

    Raises:
        BankError: as `parse_banks` and `BankCatalog`.
    """
    raw = getattr(model_config.hf_config, "banks", None)
    banks = parse_banks(raw, model_config.model)
    return BankCatalog(banks, specs, cast(torch.dtype, model_config.dtype))


class ResidentBanks:
    """The rows of a worker's banks, found by a pack's bank numbers and ids.

    A bank placed on the device lies there whole, in the model's dtype. One placed on the host stays
    in its file, mapped; a step reads the rows that it places.

    Args:
        catalog: the model's banks.
        modalities: names of the model's modalities, in the order of their indices.
        dtype: the model's.
        hold: keeps a bank's rows on the device, or returns those that it keeps; None on ranks that
            place no rows, which load nothing.

    Raises:
        BankError: a bank does not fit into the device's free memory.
    """

    def __init__(
        self,
        catalog: BankCatalog,
        modalities: Sequence[str],
        dtype: torch.dtype,
        *,
        hold: Callable[..., torch.Tensor] | None,
    ) -> None:
        self._dtype = dtype
        self._hold = hold
        self._banks = list(catalog.banks.values()) if hold is not None else []
        self._modality = np.array([modalities.index(b.spec.modality or "") for b in self._banks])
        self._sizes = np.array([served.bank.num_rows for served in self._banks])
        for served in self._banks:
            if hold is not None and served.spec.placement == "device":
                hold(served.spec.name, _load(served, dtype))
        self.on_device = any(
            served.spec.placement == "device" and self._rows(served).is_cuda
            for served in self._banks
        )
        """Whether a step's rows may lie on the GPU already."""

    def check(self, group: Group) -> None:
        """Refuse a group of a pack that names another bank than one that is here.

        Raises:
            PackError: no such bank, or another modality or version of it.
        """
        number = cast(int, group.bank)
        if not 0 <= number < len(self._banks):
            raise PackError(f"there is no bank number {number}, expected one of {len(self._banks)}")
        served = self._banks[number]
        if self._modality[number] != group.modality or served.bank.version != group.version:
            raise PackError(
                f"bank {served.spec.name!r}: modality {group.modality} of version "
                f"{group.version[:16]}, expected modality {self._modality[number]} of version "
                f"{served.bank.version[:16]}"
            )

    def find(self, bank: np.ndarray, ids: np.ndarray, modality: np.ndarray) -> HostRows:
        """See `mmqwen.packs.Banks`."""
        if not len(self._banks) or bank.max() >= len(self._banks):
            raise PackError(f"there is no bank number {bank.max()}, but {len(self._banks)} banks")
        # Ids become addresses, and a pack may come past the door that checks them.
        if (ids >= self._sizes[bank]).any() or (modality != self._modality[bank]).any():
            raise PackError("an id lies outside its bank, or the bank is of another modality")
        first = int(bank[0])
        if (bank == first).all():
            address, resident, held = self._find_in(self._banks[first], ids)
            mask = np.ones(len(ids), np.bool_) if resident else None
            return HostRows(modality, address, mask, held)
        address, on_device = np.empty(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        every: list[torch.Tensor] = []
        for number in np.unique(bank).tolist():
            mine = bank == number
            address[mine], on_device[mine], held = self._find_in(self._banks[number], ids[mine])
            every += held
        return HostRows(modality, address, on_device if on_device.any() else None, tuple(every))

    def table(self) -> np.ndarray | None:
        """See `mmqwen.packs.Banks`."""
        if not self._banks:
            return None
        words: list[int] = []
        for at, served in enumerate(self._banks):
            rows = self._rows(served)
            address = rows.data_ptr() if rows.dtype == self._dtype else 0  # 0: to be converted
            size = rows.shape[1] * rows.element_size()
            words += (address, len(rows), size, int(self._modality[at]), int(rows.is_cuda))
        return np.array(words, dtype=np.int64)

    def held(self) -> tuple[torch.Tensor, ...]:
        """See `mmqwen.packs.Banks`."""
        found = map(self._rows, self._banks)
        return tuple(rows for rows in found if rows.is_cuda)

    def _find_in(
        self, served: ServedBank, ids: np.ndarray
    ) -> tuple[np.ndarray, bool, tuple[torch.Tensor, ...]]:
        """Addresses of a bank's rows, whether they are the GPU's, and what holds the rows."""
        rows = self._rows(served)
        if rows.dtype != self._dtype:  # of a file that the model's dtype differs from
            with compat.single_threaded():
                rows = rows.index_select(0, torch.from_numpy(ids)).to(self._dtype)
            ids = np.arange(len(ids))
        size = rows.shape[1] * rows.element_size()
        return ids * size + rows.data_ptr(), rows.is_cuda, (rows,)

    def _rows(self, served: ServedBank) -> torch.Tensor:
        if served.spec.placement == "device" and self._hold is not None:
            return self._hold(served.spec.name)
        return served.bank.rows


def _load(served: ServedBank, dtype: torch.dtype) -> torch.Tensor:
    """A bank's rows on the current device, in `dtype`, some MiB at a time."""
    bank, device = served.bank, torch.get_default_device()
    nbytes = bank.num_rows * bank.width * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if nbytes > free:
            raise BankError(
                f"bank {served.spec.name!r} of {nbytes} bytes does not fit into the {free} that "
                "are free on the GPU; place it on the host, or serve fewer rows"
            )
    rows = torch.empty(bank.num_rows, bank.width, dtype=dtype, device=device)
    at = 0
    for block in bank.blocks():
        rows[at : at + len(block)].copy_(block)
        at += len(block)
    return rows
