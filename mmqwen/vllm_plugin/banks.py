"""Banks inside vLLM: which there are, in any process, and their rows in a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from mmqwen.banks import BankCatalog, BankError, BankSpec, parse_banks
from mmqwen.banks.catalog import ServedBank
from mmqwen.modalities import ModalitySpec
from mmqwen.pack_slices import ON_DEVICE, PROJECTED
from mmqwen.packs import Group, PackError
from mmqwen.vllm_plugin import compat
from mmqwen_kernels import HostRows

if TYPE_CHECKING:
    from vllm.config import ModelConfig


_NO_BANK = (0, 0, 0, -1, 0, 0, 0)
"""In a bank's place in `ResidentBanks.table`."""

BLOCKS_A_CALL = 8
"""Of rows that are projected, before requests may have their next step."""


def bank_catalog(model_config: ModelConfig, specs: Mapping[str, ModalitySpec]) -> BankCatalog:
    """The banks that a served model's config names; none where it names none.

    Raises:
        BankError: as `parse_banks` and `BankCatalog`.
    """
    raw = getattr(model_config.hf_config, "banks", None)
    banks = parse_banks(raw, model_config.model)
    return BankCatalog(banks, specs, cast(torch.dtype, model_config.dtype))


class Projection(NamedTuple):
    """How rows of banks are projected in a worker.

    Attributes:
        run: of a modality and rows `[n, d]` of it: `[n, D]`, summed over the ranks.
        width: D.
        at_once: n, at most.
        rank: this rank.
        ranks: how many share the rows, as they do the vocabulary.
    """

    run: Callable[[str, torch.Tensor], torch.Tensor]
    width: int
    at_once: int
    rank: int = 0
    ranks: int = 1


class ResidentBanks:
    """The rows of a worker's banks, found by a pack's bank numbers and ids.

    A bank placed on the device lies there whole, in the model's dtype. One placed on the host stays
    in its file, mapped; a step reads the rows that it places. Of one that is projected, the device
    holds what the projector makes of this rank's share of the rows (`project`). A number stands for
    a version of a bank: a new one comes beside the old (`advance`), which goes when nothing names
    it (`drop`).

    Args:
        catalog: the model's banks.
        modalities: names of the model's modalities, in the order of their indices.
        dtype: the model's.
        home: keeps rows on the device as its buffers, which vLLM brings through its sleep; None on
            ranks that place no rows, which load nothing.
        projection: for banks that are projected.

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
        projection: Projection,
    ) -> None:
        self._catalog = catalog
        self._modalities = list(modalities)
        self._dtype = dtype
        self._home = home
        self._device = torch.get_default_device()
        self._headroom = 0
        self._projection = projection
        self._rounds = 0
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
        # Ranks that project rows wait for each other, so none may stop where others do not.
        by_time = fields.get("placement") != "projected"
        if left is None:
            self.drop(number)
            self._note_headroom()
            left = self._load(self._catalog.open(BankSpec(**fields), number))
        end = time.monotonic() + seconds
        for _ in left:
            if not by_time or time.monotonic() >= end:
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
        if self._home is not None and served.spec.placement != "host":
            self._note_headroom()
            delattr(self._home, _buffer(served))
            if self._device.type == "cuda":  # else the rows that left would count as headroom
                torch.cuda.reset_peak_memory_stats(self._device)

    def _load(self, served: ServedBank) -> Iterator[None]:
        """Bring a version of a bank here, some MiB at a time; it counts when all of it is here."""
        bank = served.bank
        if served.spec.placement == "projected" and self._home is not None:
            first, last = self._share(served)
            table = self._allocate(served, max(1, last - first), self._projection.width).zero_()
            if self._rounds:  # else there are no weights yet, and `project` will come
                yield  # of ranks that wait for each other, none has failed by now
                yield from self._fill(served, table)
            self._home.register_buffer(_buffer(served), table, persistent=False)
        elif served.spec.placement == "device" and self._home is not None:
            rows = self._allocate(served, bank.num_rows, bank.width)
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

    def _allocate(self, served: ServedBank, count: int, width: int) -> torch.Tensor:
        """Room on the device for rows `[count, width]` of a bank, or a refusal."""
        self._require_memory(served, count * width * self._dtype.itemsize)
        return torch.empty(count, width, dtype=self._dtype, device=self._device)

    def _require_memory(self, served: ServedBank, nbytes: int) -> None:
        if self._device.type != "cuda":
            return
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + kept - self._headroom
        if nbytes > free:
            how = ", projected," if served.spec.placement == "projected" else ""
            raise BankError(
                f"bank {served.spec.name!r}{how} of {nbytes} bytes does not fit into the "
                f"{max(free, 0)} that are free on the GPU; place it on the host, serve fewer rows, "
                "or lower gpu_memory_utilization"
            )

    def _note_headroom(self) -> None:
        """Note what a step took at most, which a bank that comes later must leave free."""
        if self._device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self._device)
        now = torch.cuda.memory_allocated(self._device)
        self._headroom = max(self._headroom, peak - now)

    # -- rows that are projected ----------------------------------------------------------------

    @property
    def projected(self) -> list[ServedBank]:
        """The versions that are here whose rows are projected."""
        return [b for b in self._banks if b is not None and b.spec.placement == "projected"]

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

    def project(self, modalities: Collection[str]) -> None:
        """Project the banks of these modalities, whose weights are others now, in place."""
        self._rounds += 1
        for served in self.projected:
            if served.spec.modality in modalities:
                for _ in self._fill(served, self._rows(served)):
                    pass

    def _fill(self, served: ServedBank, table: torch.Tensor) -> Iterator[None]:
        """Project a bank's rows into this rank's table; anew if weights change meanwhile.

        Each rank projects every row by its share of the hidden units and keeps the sums of its own
        rows, which so have the bits that they have where a step places them.
        """
        raw, (first, last), begun = served.bank.rows, self._share(served), -1
        step = self._projection.at_once
        while begun != self._rounds:
            begun = self._rounds
            for at in range(0, len(raw), step):
                block = raw[at : at + step].to(table.device, self._dtype)
                done = self._projection.run(served.spec.modality or "", block)
                begin, end = max(first, at), min(last, at + len(block))
                if begin < end:
                    table[begin - first : end - first].copy_(done[begin - at : end - at])
                if at // step % BLOCKS_A_CALL == BLOCKS_A_CALL - 1:
                    yield

    def _share(self, served: ServedBank) -> tuple[int, int]:
        """The first and the end of this rank's rows of a bank that is projected."""
        count, (rank, ranks) = served.bank.num_rows, self._projection[-2:]
        each = -(-count // ranks)
        return min(count, rank * each), min(count, (rank + 1) * each)

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
        """See `mmqwen.pack_slices.Banks`."""
        if not len(self._banks) or bank.max() >= len(self._banks):
            raise PackError(f"there is no bank number {bank.max()}, but {len(self._banks)} banks")
        # Ids become addresses, and a pack may come past the door that checks them.
        if (ids >= self._sizes[bank]).any() or (modality != self._modality[bank]).any():
            raise PackError("an id lies outside its bank, or the bank is of another modality")
        first = int(bank[0])
        if (bank == first).all():
            return self._find_in(self._served(first), ids, modality)
        address = np.empty(len(ids), np.int64)
        on_device, done = np.zeros((2, len(ids)), np.bool_)
        held: list[torch.Tensor] = []
        tables: list[torch.Tensor] = []
        for number in np.unique(bank).tolist():
            mine = bank == number
            found = self._find_in(self._served(number), ids[mine], modality[mine])
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
        """See `mmqwen.pack_slices.Banks`."""
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
            place, (first, end) = ON_DEVICE * rows.is_cuda, (0, len(rows))
            if served.spec.placement == "projected":
                place, (first, end) = PROJECTED, self._share(served)
            words += (address, int(self._sizes[at]), size, int(self._modality[at]))
            words += (place, first, end)
        return np.array(words, dtype=np.int64)

    def held(self) -> tuple[torch.Tensor, ...]:
        """See `mmqwen.pack_slices.Banks`."""
        here = [b for b in self._banks if b is not None and b.spec.placement == "device"]
        return tuple(rows for rows in map(self._rows, here) if rows.is_cuda)

    def projections(self) -> tuple[torch.Tensor, ...]:
        """See `mmqwen.pack_slices.Banks`."""
        return tuple(map(self._rows, self.projected))

    def _served(self, number: int) -> ServedBank:
        return cast(ServedBank, self._banks[number])  # `find` has seen that it has rows

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
        if served.spec.placement != "host" and self._home is not None:
            return self._home.get_buffer(_buffer(served))
        return served.bank.rows


def _buffer(served: ServedBank) -> str:
    """The name of the buffer that keeps a version's rows: another version never has the same."""
    return f"_bank_{served.number}_{served.bank.version[:16]}"
