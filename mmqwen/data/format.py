"""The files of a dataset, and how one line and one item are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmqwen.data.banks import read_bank_item
from mmqwen.data.errors import DatasetError
from mmqwen.data.parquet import ParquetRows
from mmqwen.modalities import ROW_DTYPES, ModalitySpec

DATA_FILE = "data.jsonl"
PARQUET_FILE = "data.parquet"
ROWS_TENSOR = "rows"
OFFSETS_TENSOR = "offsets"
DTYPES = {code: getattr(torch, name) for name, (code, _) in ROW_DTYPES.items()}
"""Dtypes of stored rows, by safetensors' names."""

_BLOCK_BYTES = 16 * 2**20
_ROLES = ("system", "user", "assistant", "tool")


def rows_file(folder: Path, name: str) -> Path:
    """Where the rows of a modality lie."""
    return folder / f"rows-{name}.safetensors"


def items_file(folder: Path, name: str) -> Path:
    """Where the offsets of a modality's items lie."""
    return folder / f"items-{name}.safetensors"


def find_folder(path: str | Path) -> Path:
    """The directory of a dataset, given it or its `data.jsonl` or `data.parquet`.

    Raises:
        DatasetError: there is no such dataset, or it has both files.
    """
    path = Path(path)
    if path.is_file() and path.name in (DATA_FILE, PARQUET_FILE):
        path = path.parent
    found = [name for name in (DATA_FILE, PARQUET_FILE) if (path / name).is_file()]
    if len(found) == 2:
        raise DatasetError(f"{path}: holds {DATA_FILE} and {PARQUET_FILE}; remove one of them")
    if not found:
        raise DatasetError(
            f"{path}: no dataset, expected a directory with {DATA_FILE} or {PARQUET_FILE}; "
            "mmqwen.data.DatasetWriter writes one, mmqwen.data.from_npy_folder makes one from .npy "
            "files"
        )
    return path


def fingerprint(path: str | Path) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of each file of a dataset, by name.

    Raises:
        DatasetError: there is no dataset.
    """
    folder = find_folder(path)
    files = [folder / DATA_FILE, folder / PARQUET_FILE]
    files += [*folder.glob("rows-*.safetensors"), *folder.glob("items-*.safetensors")]
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(files)
        if file.is_file()
    }


# -- text --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One line: a prompt and its answer, or a conversation; and the numbers of its items.

    Attributes:
        prompt: text before the answer; None for a conversation.
        answer: text to be learnt; None for a conversation.
        messages: the conversation; every assistant's message is learnt.
        items: modality to the numbers of its items, or `BankItem`s, in the order of the markers.
        choices: what the last answer may be, for evaluation; training does not read it.
    """

    prompt: str | None = None
    answer: str | None = None
    messages: tuple[dict[str, str], ...] = ()
    items: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    choices: tuple[str, ...] = ()

    def questions(self) -> list[str]:
        """The texts that may hold markers."""
        if self.prompt is not None:
            return [self.prompt]
        return [m["content"] for m in self.messages if m["role"] != "assistant"]

    def answers(self) -> list[str]:
        """The texts to be learnt."""
        if self.answer is not None:
            return [self.answer]
        return [m["content"] for m in self.messages if m["role"] == "assistant"]


def read_sample(raw: bytes | dict[str, Any] | ValueError, item_type: type = int) -> Sample:
    """Parse a line.

    Args:
        raw: the line, or its fields, or why they cannot be read.
        item_type: what names an item: an int in a dataset, a str in a folder of .npy.

    Raises:
        ValueError: what is wrong with it; the caller adds file and line.
    """
    if isinstance(raw, ValueError):
        raise raw
    fields: Any = raw
    if isinstance(raw, bytes):
        try:
            fields = json.loads(raw)
        except ValueError as error:  # of JSON or of UTF-8
            raise ValueError(f"not JSON ({error})") from None
        except RecursionError:
            raise ValueError("not a sample: its JSON is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"got a {type(fields).__name__}, expected an object")
    chat = "messages" in fields
    known = {"items", "choices"} | ({"messages"} if chat else {"prompt", "answer"})
    if set(fields) - known:
        raise ValueError(f"unknown fields {sorted(set(fields) - known)}, expected {sorted(known)}")
    items = _read_items(fields.get("items", {}), item_type)
    choices = read_choices(fields["choices"]) if "choices" in fields else ()
    if chat:
        messages = _read_messages(fields["messages"])
        sample = Sample(messages=messages, items=items, choices=choices)
    else:
        for key in ("prompt", "answer"):
            if not isinstance(fields.get(key), str):
                raise ValueError(f"field {key!r} is missing or not a string")
        texts = {key: fields[key] for key in ("prompt", "answer")}
        sample = Sample(**texts, items=items, choices=choices)
        if not sample.prompt and not any(items.values()):
            raise ValueError("the prompt is empty and there is no item: nothing to answer to")
    check_text(sample)
    return sample


def read_choices(value: Any) -> tuple[str, ...]:
    """What an answer may be.

    Raises:
        ValueError: no list of at least two texts that differ.
    """
    if not isinstance(value, (list, tuple)) or any(not isinstance(c, str) for c in value):
        raise ValueError("'choices' is not a list of texts")
    texts = [choice.strip() for choice in value]
    if len(texts) < 2 or "" in texts or len(set(texts)) < len(texts):
        raise ValueError(f"choices {list(value)}: expected at least two, that differ, none empty")
    return tuple(value)


def check_text(sample: Sample) -> None:
    """Refuse empty answers, and what is no text, though JSON may spell it: half a surrogate pair.

    Raises:
        ValueError: an answer is empty; a text or the name of an item holds such a half.
    """
    if any(not answer.strip() for answer in sample.answers()):
        raise ValueError("an answer is empty; leave the sample out, or give it an answer")
    names = [n for numbers in sample.items.values() for n in numbers if isinstance(n, str)]
    for text in (*sample.questions(), *sample.answers(), *sample.choices, *sample.items, *names):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half, around = text[error.start], text[max(0, error.start - 20) : error.start + 20]
            raise ValueError(
                f"{half!r} in {around!r} is half of a surrogate pair, which no text may hold; "
                "write the whole character, or remove it"
            ) from None


def check_answers(sample: Sample, specs: Mapping[str, ModalitySpec]) -> None:
    """Refuse answers that hold markers.

    Raises:
        ValueError: an answer holds the marker of one of `specs`.
    """
    for spec in specs.values():
        if any(spec.token in answer for answer in sample.answers()):
            raise ValueError(f"an answer holds {spec.token}; only questions have items")


def _read_items(items: Any, item_type: type) -> dict[str, list[Any]]:
    if not isinstance(items, dict):
        raise ValueError(f"'items' is a {type(items).__name__}, expected an object of lists")
    found: dict[str, list[Any]] = {}
    for name, numbers in items.items():
        if not isinstance(numbers, list) or any(
            not isinstance(n, (item_type, dict)) or isinstance(n, bool) for n in numbers
        ):
            kind = "item numbers" if item_type is int else "file names"
            raise ValueError(f"items of {name!r}: expected a list of {kind}, or of rows of a bank")
        try:
            found[name] = [read_bank_item(n) if isinstance(n, dict) else n for n in numbers]
        except ValueError as error:
            raise ValueError(f"items of {name!r}: {error}") from None
    return found


def _read_messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise ValueError("a message is not an object with exactly 'role' and 'content'")
        if message["role"] not in _ROLES or not isinstance(message["content"], str):
            raise ValueError(f"a message's role is not one of {_ROLES}, or its content not text")
    if messages[-1]["role"] != "assistant" or messages[0]["role"] == "assistant":
        raise ValueError("a conversation begins with a question and ends with the assistant")
    return tuple(messages)


class TextLines:
    """Random access to the lines of a file, 8 bytes of memory a line."""

    def __init__(self, file: Path) -> None:
        self.file = file
        ends, at, last = [], 0, b"\n"
        with open(file, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (at + 1))
                at += len(block)
                last = block[-1:]
        if last != b"\n":
            ends.append(np.array([at]))
        self._bounds = np.concatenate([np.zeros(1, np.int64), *ends])

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> bytes:
        begin, end = int(self._bounds[index]), int(self._bounds[index + 1])
        with open(self.file, "rb") as stream:
            stream.seek(begin)
            return stream.read(end - begin)

    def __iter__(self) -> Iterator[bytes]:
        with open(self.file, "rb") as stream:
            yield from stream


def open_lines(folder: Path) -> TextLines | ParquetRows:
    """The samples of a dataset, unparsed.

    Raises:
        DatasetError: the file cannot be read.
    """
    if (folder / PARQUET_FILE).is_file():
        return ParquetRows(folder / PARQUET_FILE)
    try:
        return TextLines(folder / DATA_FILE)
    except OSError as error:
        raise DatasetError(f"{folder / DATA_FILE}: cannot be read: {error}") from error


# -- rows --------------------------------------------------------------------------------------


class RowStore:
    """The items of one modality, read from memory-mapped files as they are asked for.

    Attributes:
        file: the safetensors file of the rows.
        dim: width of a row.
        num_rows: rows of all items.
        num_items: how many items there are.
        dtype: of the rows.

    Raises:
        DatasetError: a file is missing, unreadable or inconsistent.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.file = rows_file(folder, name)
        self._open()

    def _open(self) -> None:
        try:
            handle = safe_open(self.file, framework="pt")
            self._rows = handle.get_slice(ROWS_TENSOR)
            shape, kind = self._rows.get_shape(), self._rows.get_dtype()
            self._handle = handle
        except (OSError, SafetensorError) as error:
            raise DatasetError(f"{self.file}: cannot be read: {error}") from error
        if len(shape) != 2 or kind not in DTYPES:
            raise DatasetError(
                f"{self.file}: tensor {ROWS_TENSOR!r} is {kind} {shape}, expected [rows, width] of "
                f"{', '.join(DTYPES)}"
            )
        self.num_rows, self.dim = shape
        self.dtype = DTYPES[kind]
        self._offsets = self._read_offsets()
        self.num_items = self.num_rows if self._offsets is None else len(self._offsets) - 1

    def _read_offsets(self) -> torch.Tensor | None:
        """The offsets, still on the disk; None where every row is an item."""
        file = items_file(self.folder, self.name)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                offsets = handle.get_tensor(OFFSETS_TENSOR)
        except (OSError, SafetensorError) as error:
            raise DatasetError(f"{file}: cannot be read: {error}") from error
        if offsets.ndim != 1 or offsets.dtype != torch.int64 or not len(offsets):
            raise DatasetError(f"{file}: tensor {OFFSETS_TENSOR!r} is not int64 [items + 1]")
        if offsets[0] != 0 or offsets[-1] != self.num_rows or bool((offsets.diff() < 0).any()):
            raise DatasetError(
                f"{file}: offsets do not rise from 0 to {self.num_rows}, the rows of "
                f"{self.file.name}"
            )
        return offsets

    def bounds(self, item: int) -> tuple[int, int]:
        """First row of an item, and the one after its last.

        Raises:
            IndexError: there is no such item.
        """
        if not 0 <= item < self.num_items:
            raise IndexError(f"item {item} of {self.num_items}")
        if self._offsets is None:
            return item, item + 1
        return int(self._offsets[item]), int(self._offsets[item + 1])

    def item(self, item: int) -> torch.Tensor:
        """Rows `[n, d]` of an item, in the file's dtype."""
        begin, end = self.bounds(item)
        return self._rows[begin:end]

    def items_of_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The items to which rows belong: `[n]` row numbers to `[n]` item numbers."""
        if self._offsets is None:
            return rows
        return torch.searchsorted(self._offsets, rows, right=True) - 1

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows, some MiB at a time, each block with the number of its first row."""
        step = max(1, _BLOCK_BYTES // max(1, self.dim * self.dtype.itemsize))
        for begin in range(0, self.num_rows, step):
            yield begin, self._rows[begin : min(begin + step, self.num_rows)]

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "name": self.name, "file": self.file}

    def __setstate__(self, state: dict[str, Any]) -> None:  # a spawned worker opens its own
        self.__dict__.update(state)
        self._open()
