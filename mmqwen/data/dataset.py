"""A dataset as torch's `Dataset`: any sample at any time, nothing held in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from mmqwen.data.errors import DatasetError
from mmqwen.data.format import (
    RowStore,
    Sample,
    find_folder,
    open_lines,
    read_sample,
)


@dataclass(frozen=True)
class Example:
    """A sample with its rows.

    Attributes:
        sample: the line.
        rows: modality to its items `[n, d]`, in the order of the markers, in the file's dtype.
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

    Raises:
        DatasetError: there is no dataset.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = find_folder(path)
        self._lines = open_lines(self.folder)
        self._stores: dict[str, RowStore] = {}

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
                name: [self.store(name).item(number) for number in numbers]
                for name, numbers in sample.items.items()
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

    def store(self, name: str) -> RowStore:
        """The items of one modality."""
        if name not in self._stores:
            self._stores[name] = RowStore(self.folder, name)
        return self._stores[name]
