"""Banks inside vLLM: which there are, in any process, and their rows in a worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from mmqwen.banks import BankCatalog, BankError, parse_banks
from mmqwen.banks.catalog import ServedBank
from mmqwen.modalities import ModalitySpec
from mmqwen.packs import ON_DEVICE, PROJECTED, Group, PackError
from mmqwen.vllm_plugin import compat
from mmqwen_kernels import HostRows, Projector, project_rows

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
    in its file, mapped; a step reads the rows that it places. Of one that is projected the device
    holds what the projector makes of its rows; each rank holds a share of them, one after another,
    as it does of the vocabulary.

    Args:
        catalog: the model's banks.
        modalities: names of the model's modalities, in the order of their indices.
        dtype: the model's.
        hold: keeps a bank's rows on the device, or returns those that it keeps; None on ranks that
            place no rows, which load nothing.
        hidden_size: D, of rows that are projected.
        rank, ranks: this rank, and how many share the projectors.

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
        hidden_size: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._dtype = dtype
        self._hold = hold
        self._banks = list(catalog.banks.values()) if hold is not None else []
        self._modality = np.array([modalities.index(b.spec.modality or "") for b in self._banks])
        self._sizes = np.array([served.bank.num_rows for served in self._banks])
        self._rank, self._ranks = rank, ranks
        for served in self._banks:
            if hold is not None and served.spec.placement == "device":
                hold(served.spec.name, _load(served, dtype))
            elif hold is not None and served.spec.placement == "projected":
                first, last = self._share(served)
                # At least one, where there are more ranks than rows.
                share = _allocate(served, max(1, last - first), hidden_size, dtype)
                hold(served.spec.name, share.zero_())
        self.on_device = any(
            served.spec.placement == "device" and self._rows(served).is_cuda
            for served in self._banks
        )
        """Whether a step's rows may lie on the GPU already."""
        self.projected = [s for s in self._banks if s.spec.placement == "projected"]
        """The banks whose rows are projected at load."""

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

    def refuse_untrained(self, modalities: Collection[str]) -> None:
        """Refuse to project banks of these modalities, whose projectors were never trained.

        Raises:
            BankError: there is such a bank.
        """
        for served in self.projected:
            if served.spec.modality in modalities:
                raise BankError(
                    f"bank {served.spec.name!r}, placement projected: the projector of modality "
                    f"{served.spec.modality!r} is UNTRAINED (random), expected a trained one; "
                    "train it, give one, or place the bank on the device until then"
                )

    def project(
        self,
        projectors: Mapping[str, Projector],
        backend: str,
        at_once: int,
        reduce: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Project the rows of the banks of some modalities anew, in place.

        Each rank projects every row by its share of the hidden units and keeps the sums of its own
        rows, which so have the bits that they have where a step places them.

        Args:
            projectors: of each modality that changed its weights.
            backend: of the op.
            at_once: rows, for which there is memory.
            reduce: sums over the ranks.
        """
        for served in self.projected:
            projector = projectors.get(served.spec.modality or "")
            if projector is None:
                continue
            table, raw = self._rows(served), served.bank.rows
            first, last = self._share(served)
            for at in range(0, len(raw), at_once):
                block = raw[at : at + at_once].to(table.device, self._dtype)
                done = reduce(project_rows(block, projector, backend=backend))
                begin, end = max(first, at), min(last, at + len(block))
                if begin < end:
                    table[begin - first : end - first].copy_(done[begin - at : end - at])

    def _share(self, served: ServedBank) -> tuple[int, int]:
        """The first and the end of this rank's rows of a bank that is projected."""
        count = served.bank.num_rows
        each = -(-count // self._ranks)
        return min(count, self._rank * each), min(count, (self._rank + 1) * each)

    def find(self, bank: np.ndarray, ids: np.ndarray, modality: np.ndarray) -> HostRows:
        """See `mmqwen.packs.Banks`."""
        if not len(self._banks) or bank.max() >= len(self._banks):
            raise PackError(f"there is no bank number {bank.max()}, but {len(self._banks)} banks")
        # Ids become addresses, and a pack may come past the door that checks them.
        if (ids >= self._sizes[bank]).any() or (modality != self._modality[bank]).any():
            raise PackError("an id lies outside its bank, or the bank is of another modality")
        first = int(bank[0])
        if (bank == first).all():
            return self._find_in(self._banks[first], ids, modality)
        address = np.empty(len(ids), np.int64)
        on_device, done = np.zeros((2, len(ids)), np.bool_)
        held: list[torch.Tensor] = []
        tables: list[torch.Tensor] = []
        for number in np.unique(bank).tolist():
            mine = bank == number
            found = self._find_in(self._banks[number], ids[mine], modality[mine])
            address[mine] = found.address
            on_device[mine], done[mine] = found.resident is not None, found.projected is not None
            held += found.held
            tables += found.tables
        return HostRows(
            modality,
            address,
            on_device if on_device.any() else None,
            tuple(held),
            done if tables else None,
            tuple(tables),
        )

    def table(self) -> np.ndarray | None:
        """See `mmqwen.packs.Banks`."""
        if not self._banks:
            return None
        words: list[int] = []
        for at, served in enumerate(self._banks):
            rows = self._rows(served)
            address = rows.data_ptr() if rows.dtype == self._dtype else 0  # 0: to be converted
            size = rows.shape[1] * rows.element_size()
            place, (first, end) = ON_DEVICE * rows.is_cuda, (0, len(rows))
            if served.spec.placement == "projected":
                place, (first, end) = PROJECTED, self._share(served)
            words += (address, int(self._sizes[at]), size, int(self._modality[at]))
            words += (place, first, end)
        return np.array(words, dtype=np.int64)

    def held(self) -> tuple[torch.Tensor, ...]:
        """See `mmqwen.packs.Banks`."""
        found = (self._rows(b) for b in self._banks if b.spec.placement == "device")
        return tuple(rows for rows in found if rows.is_cuda)

    def projections(self) -> tuple[torch.Tensor, ...]:
        """See `mmqwen.packs.Banks`."""
        return tuple(map(self._rows, self.projected))

    def _find_in(self, served: ServedBank, ids: np.ndarray, modality: np.ndarray) -> HostRows:
        """Rows of one bank."""
        rows, every = self._rows(served), np.ones(len(ids), np.bool_)
        if served.spec.placement == "projected":
            first, last = self._share(served)
            size = rows.shape[1] * rows.element_size()
            mine = (ids >= first) & (ids < last)
            address = np.where(mine, (ids - first) * size + rows.data_ptr(), 0)
            return HostRows(modality, address, projected=every, tables=(rows,))
        if rows.dtype != self._dtype:  # of a file that the model's dtype differs from
            with compat.single_threaded():
                rows = rows.index_select(0, torch.from_numpy(ids)).to(self._dtype)
            ids = np.arange(len(ids))
        size = rows.shape[1] * rows.element_size()
        address = ids * size + rows.data_ptr()
        return HostRows(modality, address, every if rows.is_cuda else None, (rows,))

    def _rows(self, served: ServedBank) -> torch.Tensor:
        if served.spec.placement != "host" and self._hold is not None:
            return self._hold(served.spec.name)
        return served.bank.rows


def _load(served: ServedBank, dtype: torch.dtype) -> torch.Tensor:
    """A bank's rows on the current device, in `dtype`, some MiB at a time."""
    bank = served.bank
    rows = _allocate(served, bank.num_rows, bank.width, dtype)
    at = 0
    for block in bank.blocks():
        rows[at : at + len(block)].copy_(block)
        at += len(block)
    return rows


def _allocate(served: ServedBank, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Room on the current device for rows `[count, width]` of a bank.

    Raises:
        BankError: there is not as much.
    """
    device = torch.get_default_device()
    nbytes = count * width * dtype.itemsize
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if nbytes > free:
            raise BankError(
                f"bank {served.spec.name!r}, placement {served.spec.placement}: {count} rows of "
                f"{width} elements take {nbytes} bytes, expected at most the {free} that are free "
                "on the GPU; place it on the host, or serve fewer rows"
            )
    return torch.empty(count, width, dtype=dtype, device=device)
