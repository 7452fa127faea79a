"""A dataset as torch's `Dataset`: any sample at any time, nothing held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from mmqwen.data.banks import BankItem, DatasetBanks
from mmqwen.data.errors import DatasetError
from mmqwen.data.format import (
    RowStore,
    Sample,
    find_folder,
    open_lines,
    read_sample,
)
from mmqwen.modalities import ModalitySpec


@dataclass(frozen=True)
class Example:
    """A sample with its rows.

    Attributes:
        sample: the line.
        rows: modality to its items `[n, d]`, in the order of the markers, in their file's dtype.
        where: file and line, for messages.
    """

    sample: Sample
    rows: dict[str, list[torch.Tensor]]
    where: str

    @property
    def counts(self) -> dict[str, list[int]]:
        """Rows of each item."""
        return {name: [len(item) for item in items] for name, items in self.rows.items() if items}


class RowsDataset(Dataset[Example]):
    """Map-style dataset over a directory that `DatasetWriter` wrote.

    Text is read line by line, rows through safetensors' memory map, when a sample is asked for:
    memory is 8 bytes a sample, whatever the size of the files (with Parquet, some row groups). It
    may be pickled to workers, which open the files anew.

    Args:
        path: the directory, or its data.jsonl or data.parquet.
        modalities: the model's, where samples name rows of banks.
        banks: these banks, `{"items": FILE}` or as a config has them; read by id, memory-mapped.

    Raises:
        DatasetError: there is no dataset.
        BankError: `banks` cannot be read. One is opened when a sample names it.
    """

    def __init__(
        self,
        path: str | Path,
        modalities: Mapping[str, ModalitySpec] | None = None,
        banks: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = find_folder(path)
        self._lines = open_lines(self.folder)
        self._stores: dict[str, RowStore] = {}
        self.banks = DatasetBanks(banks, modalities)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        """The sample of line `index + 1`.

        Raises:
            DatasetError: the line or one of its items cannot be read.
            IndexError: there is no such line.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        where = self.where(index)
        try:
            sample = self.sample(index)
            rows = {
                name: [self.rows(name, item, at) for at, item in enumerate(items)]
                for name, items in sample.items.items()
            }
        except DatasetError:
            raise
        except (ValueError, IndexError) as error:
            raise DatasetError(f"{where}: {error}") from None
        return Example(sample, rows, where)

    def sample(self, index: int) -> Sample:
        """The line `index + 1` without its rows.

        Raises:
            DatasetError: the line cannot be read.
        """
        try:
            return read_sample(self._lines[index])
        except DatasetError:
            raise
        except ValueError as error:
            raise DatasetError(f"{self.where(index)}: {error}") from None

    def where(self, index: int) -> str:
        """File and line of a sample, for messages."""
        return f"{self._lines.file}:{index + 1}"

    def rows(self, name: str, item: int | BankItem, index: int = 0) -> torch.Tensor:
        """Rows `[n, d]` of an item of a modality, in their file's dtype.

        Args:
            name: the modality.
            item: its number, or what it names.
            index: its place among the sample's items of the modality, for messages.

        Raises:
            ValueError: a file cannot be used, or a bank has no such rows.
            IndexError: there is no such item.
        """
        if isinstance(item, BankItem):
            return self.banks.read(item, name, index).read()
        return self.store(name).item(item)

    def counts(self, sample: Sample) -> dict[str, list[int]]:
        """Rows of each item of a sample, for each modality that it has items of; none is read.

        Raises:
            ValueError, IndexError: as `rows`.
        """
        return {
            name: [self._count(name, item, at) for at, item in enumerate(items)]
            for name, items in sample.items.items()
            if items
        }

    def _count(self, name: str, item: int | BankItem, index: int) -> int:
        if isinstance(item, BankItem):
            return len(self.banks.read(item, name, index).ids)
        begin, end = self.store(name).bounds(item)
        return end - begin

    def store(self, name: str) -> RowStore:
        """The items of one modality."""
        if name not in self._stores:
            self._stores[name] = RowStore(self.folder, name)
        return self._stores[name]
