"""Writing a dataset as a stream: constant memory, whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from mmqwen.banks.rows import BankRows, is_named
from mmqwen.checkpoint.names import CheckpointError
from mmqwen.checkpoint.shards import check_output, staged
from mmqwen.data.banks import BankItem, read_bank_item
from mmqwen.data.errors import DatasetError
from mmqwen.data.format import (
    DATA_FILE,
    DTYPES,
    OFFSETS_TENSOR,
    ROWS_TENSOR,
    check_answers,
    items_file,
    read_sample,
    rows_file,
)
from mmqwen.modalities import ModalitySpec, check_marker_count, parse_modalities
from mmqwen.transport import as_items, check_item, refuse_unknown

_HEADER = 512
"""Bytes kept at the head of a file for a header that is known at the end only."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.int64: "I64"}


class DatasetWriter:
    """Writes a dataset sample by sample; a context manager.

    The directory appears when the block ends, complete; if it ends with an exception, nothing does.

        with DatasetWriter("data", {"m1": 768}) as writer:
            writer.add("What is <|m1|>?", " a cat", {"m1": [rows]})

    Args:
        path: directory to create; it may exist if it is empty.
        modalities: `{"m1": 768}` or specs, as in the checkpoint's config.
        dtype: of the stored rows: float32, float16 or bfloat16.

    Raises:
        DatasetError: the path holds something, or cannot be written (a full disk).
    """

    def __init__(
        self, path: str | Path, modalities: Mapping[str, Any], *, dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in DTYPES.values():
            raise DatasetError(f"{path}: rows cannot be stored as {dtype}")
        self.path = Path(path)
        self.specs: dict[str, ModalitySpec] = parse_modalities(modalities)
        self.dtype = dtype
        self.samples = 0
        self._stack = ExitStack()

    def __enter__(self) -> DatasetWriter:
        try:
            check_output(self.path)
            stage = self._stack.enter_context(staged(self.path))
            self._text = self._stack.enter_context(open(stage / DATA_FILE, "wb"))
            self._rows = {
                name: _TensorStream(rows_file(stage, name), self.dtype, spec.dim)
                for name, spec in self.specs.items()
            }
            self._ends = {
                name: _TensorStream(items_file(stage, name), torch.int64) for name in self.specs
            }
        except CheckpointError as error:
            raise DatasetError(str(error)) from error
        for ends in self._ends.values():
            ends.write(torch.zeros(1, dtype=torch.int64))
        return self

    def add_item(self, modality: str, rows: Any) -> int:
        """Store an item and return its number, by which any number of samples may use it.

        Args:
            modality: its modality.
            rows: `[d]` or `[n, d]`: torch, numpy or nested lists.

        Raises:
            EmbeddingError: the rows are not dense, floating, finite, of the right width and number.
        """
        if modality not in self.specs:
            refuse_unknown(modality, self.specs)
        number = self._ends[modality].count - 1
        checked = check_item(rows, self.specs[modality], index=number, dtype=self.dtype)
        self._rows[modality].write(checked)
        self._ends[modality].write(torch.tensor([self._rows[modality].count]))
        return number

    def add(
        self,
        prompt: str,
        answer: str,
        items: Mapping[str, Sequence[Any]] | None = None,
        *,
        choices: Sequence[str] | None = None,
    ) -> None:
        """Add a prompt and its answer; the answer is what will be learnt.

        Args:
            prompt: text with one marker per item (`<|m1|>`), or none of a modality.
            answer: text that follows the prompt, with its leading space if it has one.
            items: for each modality its items: arrays, numbers that `add_item` gave, or `BankRows`,
                of a bank that is given when the dataset is read.
            choices: what the answer may be, for `mmqwen eval`.

        Raises:
            EmbeddingError: an item cannot be stored.
            DatasetError: the answer is empty, or markers do not match the items.
        """
        self._add({"prompt": prompt, "answer": answer}, items or {}, choices)

    def add_messages(
        self,
        messages: Sequence[Mapping[str, str]],
        items: Mapping[str, Sequence[Any]] | None = None,
        *,
        choices: Sequence[str] | None = None,
    ) -> None:
        """Add a conversation `[{"role", "content"}, ...]`; what the assistant says is learnt.

        Args and raises: see `add`.
        """
        plain = [dict(m) if isinstance(m, Mapping) else m for m in messages]
        self._add({"messages": plain}, items or {}, choices)

    def _add(
        self,
        fields: dict[str, Any],
        items: Mapping[str, Sequence[Any]],
        choices: Sequence[str] | None,
    ) -> None:
        if choices:
            fields["choices"] = list(choices)
        where = f"{self.path}, sample {self.samples + 1}"
        for name in items:
            if name not in self.specs:
                refuse_unknown(name, self.specs)
        given = {name: list(as_items_or_numbers(value, name)) for name, value in items.items()}
        try:
            given = {name: [_spelled(one) for one in value] for name, value in given.items()}
            named = {n: [v if _is_spelled(v) else 0 for v in value] for n, value in given.items()}
            draft = {**fields, "items": named}
            sample = read_sample(json.dumps(draft).encode())
            for name, spec in self.specs.items():
                markers = sum(text.count(spec.token) for text in sample.questions())
                check_marker_count(spec, markers, len(given.get(name, ())))
            check_answers(sample, self.specs)
        except (ValueError, TypeError) as error:
            raise DatasetError(f"{where}: {error}") from None
        except RecursionError:
            raise DatasetError(f"{where}: not a sample: nested too deeply") from None
        for name, value in given.items():
            for number in (v for v in value if isinstance(v, int)):
                if not 0 <= number < self._ends[name].count - 1:
                    raise DatasetError(f"{where}: modality {name!r} has no item {number} yet")
        draft["items"] = {
            name: [v if _is_spelled(v) else self.add_item(name, v) for v in value]
            for name, value in given.items()
            if value
        }
        self._text.write(json.dumps(draft, ensure_ascii=False).encode() + b"\n")
        self.samples += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._text.flush()  # before `staged` gives the directory its name
            for stream in (*self._rows.values(), *self._ends.values()):
                stream.close(finish=kind is None)
        except OSError as failure:
            if kind is None:
                kind, error, trace = type(failure), failure, failure.__traceback__
        try:
            self._stack.__exit__(kind, error, trace)
        except CheckpointError as failure:
            raise DatasetError(str(failure)) from failure


def as_items_or_numbers(value: Any, modality: str) -> Sequence[Any]:
    """A list of items, of item numbers, or of both; a bare array is one item."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
        return value
    return as_items(value, modality)


def _spelled(item: Any) -> Any:
    """Rows of a bank as a line has them; any other item as it is.

    Raises:
        ValueError, TypeError: they are not named by lists of ids or keys.
    """
    if not is_named(item):
        return item
    if not isinstance(item, BankRows):
        return read_bank_item(item).to_dict()
    keys = None if item.keys is None else list(item.keys)
    return BankItem(item.bank, item.ids, keys).to_dict()


def _is_spelled(item: Any) -> bool:
    return isinstance(item, (int, dict))


class _TensorStream:
    """A safetensors file with one tensor, written row by row."""

    def __init__(self, file: Path, dtype: torch.dtype, width: int | None = None) -> None:
        self.count = 0
        self._name = OFFSETS_TENSOR if width is None else ROWS_TENSOR
        self._dtype, self._width = dtype, width
        self._stream: BinaryIO = open(file, "wb")  # noqa: SIM115 - closed by `close`
        self._stream.write(b" " * _HEADER)

    def write(self, rows: torch.Tensor) -> None:
        self._stream.write(rows.contiguous().view(torch.uint8).numpy().data)
        self.count += rows.shape[0]

    def close(self, finish: bool) -> None:
        try:
            if finish:
                shape = [self.count] if self._width is None else [self.count, self._width]
                size = self._dtype.itemsize * self.count * (self._width or 1)
                entry = {"dtype": _NAMES[self._dtype], "shape": shape, "data_offsets": [0, size]}
                header = {"__metadata__": {"format": "pt"}, self._name: entry}
                text = json.dumps(header).encode()
                self._stream.seek(0)
                self._stream.write(struct.pack("<Q", _HEADER - 8) + text.ljust(_HEADER - 8))
        finally:
            self._stream.close()
