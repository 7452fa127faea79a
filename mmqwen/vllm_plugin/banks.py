"""Banks inside vLLM: which there are, in any process, and their rows in a worker."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from mmqwen.banks import BankCatalog, BankError, BankSpec, parse_banks
from mmqwen.banks.catalog import ServedBank
from mmqwen.modalities import ModalitySpec
from mmqwen.packs import Group, PackError
from mmqwen.vllm_plugin import compat
from mmqwen_kernels import HostRows

if TYPE_CHECKING:
    from vllm.config import ModelConfig


_NO_BANK = (0, 0, 0, -1, 0)
"""In a bank's place in `ResidentBanks.table`."""


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
    in its file, mapped; a step reads the rows that it places. A number stands for a version of a
    bank: a new one comes beside the old (`advance`), which goes when nothing names it (`drop`).

    Args:
        catalog: the model's banks.
        modalities: names of the model's modalities, in the order of their indices.
        dtype: the model's.
        home: keeps rows on the device as its buffers, which vLLM brings through its sleep; None on
            ranks that place no rows, which load nothing.

    Raises:
        BankError: a bank does not fit into the device's free memory.
    """

    def __init__(
        self,
        catalog: BankCatalog,
        modalities: Sequence[str],
        dtype: torch.dtype,
        *,
        home: nn.Module | None,
    ) -> None:
        self._catalog = catalog
        self._modalities = list(modalities)
        self._dtype = dtype
        self._home = home
        self._device = torch.get_default_device()
        self._headroom = 0
        self._loading: dict[int, Iterator[None]] = {}
        self._banks: list[ServedBank | None] = []
        self._count()
        for served in catalog.banks.values() if home is not None else ():
            for _ in self._load(served):
                pass
        self.on_device = any(
            served.spec.placement == "device" and self._rows(served).is_cuda
            for served in self._banks
            if served is not None
        )
        """Whether a step's rows may lie on the GPU already."""

    # -- versions -------------------------------------------------------------------------------

    def advance(self, number: int, fields: Mapping[str, str], seconds: float) -> bool:
        """Load some more of a version of a bank, which no pack may name before it is here whole.

        Args:
            number: by which packs will call it.
            fields: of its `BankSpec`, its version among them.
            seconds: after which to leave the rest to the next call: steps wait for this one.

        Returns:
            Whether it is here.

        Raises:
            BankError: it cannot be served, or does not fit.
        """
        if self._home is None:
            return True
        here = self._banks[number] if number < len(self._banks) else None
        if here is not None and here.bank.version == fields["version"]:
            return True  # asked again, because another rank is not done
        left = self._loading.pop(number, None)
        if left is None:
            self.drop(number)
            self._note_headroom()
            left = self._load(self._catalog.open(BankSpec(**fields), number))
        end = time.monotonic() + seconds
        for _ in left:
            if time.monotonic() >= end:
                self._loading[number] = left
                return False
        return True

    def drop(self, number: int) -> None:
        """Let a version go, loaded or in part."""
        self._loading.pop(number, None)
        served = self._banks[number] if number < len(self._banks) else None
        if served is None:
            return
        self._banks[number] = None
        self._count()
        if self._home is not None and served.spec.placement == "device":
            self._note_headroom()
            delattr(self._home, _buffer(served))
            if self._device.type == "cuda":  # else the rows that left would count as headroom
                torch.cuda.reset_peak_memory_stats(self._device)

    def _load(self, served: ServedBank) -> Iterator[None]:
        """Bring a version of a bank here, some MiB at a time; it counts when all of it is here."""
        if served.spec.placement == "device" and self._home is not None:
            bank = served.bank
            self._require_memory(
                served.spec.name, bank.num_rows * bank.width * self._dtype.itemsize
            )
            shape = (bank.num_rows, bank.width)
            rows = torch.empty(shape, dtype=self._dtype, device=self._device)
            at = 0
            for block in bank.blocks():
                rows[at : at + len(block)].copy_(block)
                at += len(block)
                yield
            self._home.register_buffer(_buffer(served), rows, persistent=False)
        self._banks += [None] * (served.number + 1 - len(self._banks))
        self._banks[served.number] = served
        self._count()

    def _count(self) -> None:
        """What `find` compares with: of a number that stands for nothing, no rows."""
        names = self._modalities
        self._modality = np.array(
            [-1 if b is None else names.index(b.spec.modality or "") for b in self._banks]
        )
        self._sizes = np.array([0 if b is None else b.bank.num_rows for b in self._banks])

    def _require_memory(self, name: str, nbytes: int) -> None:
        if self._device.type != "cuda":
            return
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + kept - self._headroom
        if nbytes > free:
            raise BankError(
                f"bank {name!r} of {nbytes} bytes does not fit into the {max(free, 0)} that are "
                "free on the GPU; place it on the host, serve fewer rows, or lower "
                "gpu_memory_utilization"
            )

    def _note_headroom(self) -> None:
        """Note what a step took at most, which a bank that comes later must leave free."""
        if self._device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self._device)
        now = torch.cuda.memory_allocated(self._device)
        self._headroom = max(self._headroom, peak - now)

    # -- rows -----------------------------------------------------------------------------------

    def check(self, group: Group) -> None:
        """Refuse a group of a pack that names another bank than one that is here.

        Raises:
            PackError: no such bank, or another modality or version of it.
        """
        number = cast(int, group.bank)
        served = self._banks[number] if 0 <= number < len(self._banks) else None
        if served is None:
            raise PackError(f"there is no bank number {number}, expected one of {len(self._banks)}")
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
            address, resident, held = self._find_in(self._served(first), ids)
            mask = np.ones(len(ids), np.bool_) if resident else None
            return HostRows(modality, address, mask, held)
        address, on_device = np.empty(len(ids), np.int64), np.zeros(len(ids), np.bool_)
        every: list[torch.Tensor] = []
        for number in np.unique(bank).tolist():
            mine = bank == number
            address[mine], on_device[mine], held = self._find_in(self._served(number), ids[mine])
            every += held
        return HostRows(modality, address, on_device if on_device.any() else None, tuple(every))

    def table(self) -> np.ndarray | None:
        """See `mmqwen.packs.Banks`."""
        if not self._banks:
            return None
        words: list[int] = []
        for at, served in enumerate(self._banks):
            if served is None:
                words += _NO_BANK
                continue
            rows = self._rows(served)
            address = rows.data_ptr() if rows.dtype == self._dtype else 0  # 0: to be converted
            size = rows.shape[1] * rows.element_size()
            words += (address, len(rows), size, int(self._modality[at]), int(rows.is_cuda))
        return np.array(words, dtype=np.int64)

    def held(self) -> tuple[torch.Tensor, ...]:
        """See `mmqwen.packs.Banks`."""
        found = (self._rows(served) for served in self._banks if served is not None)
        return tuple(rows for rows in found if rows.is_cuda)

    def _served(self, number: int) -> ServedBank:
        return cast(ServedBank, self._banks[number])  # `find` has seen that it has rows

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
        if served.spec.placement == "device" and self._home is not None:
            return self._home.get_buffer(_buffer(served))
        return served.bank.rows


def _buffer(served: ServedBank) -> str:
    """The name of the buffer that keeps a version's rows: another version never has the same."""
    return f"_bank_{served.number}_{served.bank.version[:16]}"
