"""Samples in `data.parquet` instead of `data.jsonl`; needs pyarrow (`mmqwen[parquet]`).

The columns are the fields of a line: `prompt` and `answer`, or `messages` (a list of structs of
`role` and `content`), `items` (a map of lists of integers, or a struct of such lists) and `choices`
(a list of strings). A field that is null is absent. Items that name rows of a bank are structs of
`bank` and `ids` or `keys`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmqwen.data.errors import DatasetError

_BATCH = 1024
_GROUPS_KEPT = 4


class ParquetRows:
    """Random access to the rows of a Parquet file, as the fields of a line.

    A row is found by reading its row group, the last few of which are kept: memory is that of four
    row groups, and shuffled reading is as fast as they are small (write them with
    `row_group_size=1000`).

    Args:
        file: the Parquet file.

    Raises:
        DatasetError: pyarrow is missing, or the file is not Parquet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open()

    def _open(self) -> None:
        try:
            import pyarrow as arrow
            import pyarrow.parquet
        except ImportError as error:
            raise DatasetError(
                f"{self.file}: needs pyarrow: pip install 'mmqwen[parquet]' ({error})"
            ) from error
        self._errors: tuple[type[Exception], ...] = (arrow.ArrowException, OSError)
        try:
            self._parquet: Any = arrow.parquet.ParquetFile(self.file)
        except self._errors as error:
            raise DatasetError(f"{self.file}: cannot be read: {error}") from error
        about = self._parquet.metadata
        sizes = (about.row_group(at).num_rows for at in range(about.num_row_groups))
        self._begins = [0, *accumulate(sizes)]
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The fields of a row.

        Raises:
            DatasetError: the row group cannot be read.
            ValueError: the row cannot.
        """
        group = bisect_right(self._begins, index) - 1
        if group not in self._groups:
            try:
                self._groups[group] = self._parquet.read_row_group(group)
            except self._errors as error:
                raise DatasetError(f"{self.file}: row group {group}: {error}") from error
            if len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        return _read_row(self._groups[group], index - self._begins[group])

    def __iter__(self) -> Iterator[dict[str, Any] | ValueError]:
        """The fields of each row, or why they cannot be read."""
        try:
            for batch in self._parquet.iter_batches(batch_size=_BATCH):
                try:
                    rows = [_fields(row) for row in batch.to_pylist()]
                except (ValueError, RecursionError):
                    yield from (_row_or_error(batch, at) for at in range(len(batch)))
                else:
                    yield from rows
        except self._errors as error:
            raise DatasetError(f"{self.file}: cannot be read: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a worker opens its own
        self.__dict__.update(state)
        self._open()


def _read_row(table: Any, at: int) -> dict[str, Any]:
    """The fields of a row of a table or batch.

    Raises:
        ValueError: it holds what is no text, which Parquet does not check, or is nested too deeply.
    """
    try:
        (row,) = table.slice(at, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"a text is not UTF-8 ({error}); write it anew, or remove it") from None
    except RecursionError:
        raise ValueError("not a sample: nested too deeply") from None
    return _fields(row)


def _row_or_error(table: Any, at: int) -> dict[str, Any] | ValueError:
    try:
        return _read_row(table, at)
    except ValueError as error:
        return error


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    """A row as `json.loads` would have given it: nulls left out, a map as an object."""
    fields = {name: value for name, value in row.items() if value is not None}
    items = fields.get("items")
    if isinstance(items, list) and all(isinstance(pair, tuple) for pair in items):
        items = dict(items)
    if isinstance(items, dict):
        fields["items"] = {n: _items(value) for n, value in items.items() if value is not None}
    return fields


def _items(value: Any) -> Any:
    """A modality's items; a struct has all fields of its column, of which those given count."""
    if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
        return value
    return [
        {k: v for k, v in item.items() if v is not None} if isinstance(item, dict) else item
        for item in value
    ]
