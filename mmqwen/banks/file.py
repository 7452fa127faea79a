"""A bank's files: the table, what is known of it, and its keys."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmqwen.modalities import ROW_DTYPES

ROWS_TENSOR = "rows"
MODALITY_FIELD = "modality"
MOST_ROWS = 1 << 32
"""A pack has 32 bits for an id."""

BLOCK_BYTES = 16 * 2**20
_DTYPES = {code: getattr(torch, name) for name, (code, _) in ROW_DTYPES.items()}


class BankError(ValueError):
    """A bank's file cannot be used, with the reason."""


class UnknownBankError(BankError):
    """No bank is served under a name."""


class BankBusyError(BankError):
    """A bank is being changed already."""


def facts_file(file: Path) -> Path:
    """Where it stands beside a bank what a scan of it has found."""
    return file.with_name(file.name + ".json")


def keys_file(file: Path) -> Path:
    """Where a bank's keys stand beside it, one a line."""
    return file.with_name(file.name + ".keys")


@dataclass(frozen=True)
class Facts:
    """What a scan of a bank's file found, and which file it was.

    Attributes:
        size, mtime_ns: of the file; another size or time means another file.
        version: BLAKE3 of the whole file, in hex.
        largest: the largest magnitude among its elements, all of which are finite.
    """

    size: int
    mtime_ns: int
    version: str
    largest: float


@dataclass(frozen=True, eq=False)
class Bank:
    """An opened bank, memory-mapped.

    Attributes:
        file: where it lies.
        modality: as its file says; None where it does not.
        num_rows, width, dtype: of its rows.
        offset: where in the file the rows begin, in bytes.
        facts: what is known of the file's content.
    """

    file: Path
    modality: str | None
    num_rows: int
    width: int
    dtype: torch.dtype
    offset: int
    facts: Facts

    def __reduce__(self) -> Any:
        return open_bank, (str(self.file),)  # not the rows, which may be many

    @property
    def version(self) -> str:
        """BLAKE3 of the file, in hex."""
        return self.facts.version

    @cached_property
    def rows(self) -> torch.Tensor:
        """`[N, d]`, read from the disk where it is looked at."""
        return _mapped(self.file, self.offset, self.num_rows, self.width, self.dtype)

    @cached_property
    def keys(self) -> Keys | None:
        """The names of its rows; None without a keys file.

        Raises:
            BankError: as `Keys`.
        """
        file = keys_file(self.file)
        return Keys(file, self.num_rows) if file.exists() else None

    def blocks(self) -> Iterator[torch.Tensor]:
        """The rows in order, some MiB at a time."""
        return row_blocks(self.rows)

    def require_range(self, dtype: torch.dtype) -> None:
        """Refuse to serve it in a dtype that its values leave.

        Raises:
            BankError: a value is infinite in `dtype`.
        """
        if not torch.tensor(self.facts.largest, dtype=torch.float64).to(dtype).isfinite():
            raise BankError(
                f"{self.file}: its largest magnitude {self.facts.largest:.4g} is beyond the range "
                f"of {_short(dtype)}; scale the rows, or serve the model in another dtype"
            )


def row_blocks(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows `[N, d]` in order, some MiB at a time."""
    step = max(1, BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    for at in range(0, rows.shape[0], step):
        yield rows[at : at + step]


def open_bank(file: str | os.PathLike[str]) -> Bank:
    """Open a bank's file: at once where it was looked through before, else after a scan of it.

    Args:
        file: safetensors with the tensor `rows` `[N, d]` of float32, float16 or bfloat16. What a
            scan finds is stored beside it, where that can be written to.

    Raises:
        BankError: it cannot be read, is truncated, holds no such tensor, or NaN or infinity.
    """
    path = Path(file)
    modality, shape, dtype, offset = read_layout(path)
    stat = path.stat()
    facts = _read_facts(path)
    if facts is None or (facts.size, facts.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
        facts = scan(path)
        write_facts(path, facts)
    return Bank(path, modality, shape[0], shape[1], dtype, offset, facts)


def read_layout(file: Path) -> tuple[str | None, tuple[int, int], torch.dtype, int]:
    """Modality, shape and dtype of a bank's rows, and where in the file they begin.

    Raises:
        BankError: as `open_bank`, but for values.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
            if ROWS_TENSOR not in names:
                raise BankError(
                    f"{file}: holds tensors {names[:4]}, expected one called {ROWS_TENSOR!r}; "
                    "`mmqwen bank build` makes a bank of it"
                )
            found = handle.get_slice(ROWS_TENSOR)
            shape, kind = tuple(found.get_shape()), found.get_dtype()
            modality = (handle.metadata() or {}).get(MODALITY_FIELD)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            begin = json.loads(stream.read(length))[ROWS_TENSOR]["data_offsets"][0]
    except (OSError, SafetensorError) as error:
        raise BankError(
            f"{file}: cannot be read as a bank, expected a whole safetensors file: {error}"
        ) from error
    if len(shape) != 2 or kind not in _DTYPES or 0 in shape or shape[0] > MOST_ROWS:
        raise BankError(
            f"{file}: {ROWS_TENSOR!r} is {kind} {list(shape)}, expected [rows, width] of one of "
            f"{', '.join(_DTYPES)}, and at most {MOST_ROWS} rows"
        )
    return modality, (shape[0], shape[1]), _DTYPES[kind], 8 + length + begin


def scan(file: Path) -> Facts:
    """Read a bank's file from end to end, some MiB at a time.

    Raises:
        BankError: as `open_bank`.
    """
    hasher = new_hash()
    _, (count, width), dtype, offset = read_layout(file)
    stat = file.stat()
    size = count * width * dtype.itemsize
    with open(file, "rb") as stream:
        hasher.update(stream.read(offset))
        largest, row, step = 0.0, 0, max(1, BLOCK_BYTES // (width * dtype.itemsize))
        while row < count:
            rows = min(step, count - row)
            raw = bytearray(stream.read(rows * width * dtype.itemsize))
            if len(raw) != rows * width * dtype.itemsize:
                raise BankError(f"{file}: ends before its {size} bytes of rows do; copy it again")
            hasher.update(raw)
            block = torch.frombuffer(raw, dtype=dtype).view(rows, width)
            largest = max(largest, largest_of(block, str(file), row))
            row += rows
        while rest := stream.read(BLOCK_BYTES):
            hasher.update(rest)
    return Facts(stat.st_size, stat.st_mtime_ns, hasher.hexdigest(), largest)


def largest_of(block: torch.Tensor, source: str, first: int) -> float:
    """The largest magnitude in a block of rows whose first one is row `first`.

    Raises:
        BankError: a row is not finite; the message names it.
    """
    found = float(block.abs().max())
    if math.isfinite(found):
        return found
    row = first + int((~block.isfinite()).any(dim=1).nonzero()[0])
    raise BankError(
        f"{source}: got NaN or Inf in row {row}, expected finite numbers; check what the encoder "
        "returned"
    )


def new_hash() -> Any:
    """A BLAKE3 to be updated.

    Raises:
        BankError: the package is missing.
    """
    try:
        from blake3 import blake3
    except ImportError:
        raise BankError("a bank's version is its BLAKE3: pip install blake3") from None
    return blake3(max_threads=blake3.AUTO)


def _read_facts(file: Path) -> Facts | None:
    try:
        raw = json.loads(facts_file(file).read_text(encoding="utf-8"))
        return Facts(**{field.name: raw[field.name] for field in fields(Facts)})
    except (OSError, ValueError, KeyError, TypeError):  # none, or none of ours: scanned again
        return None


def write_facts(file: Path, facts: Facts) -> None:
    """Store what a scan found beside a bank; where that cannot be, it is scanned at each start."""
    target = facts_file(file)
    part = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
        part.replace(target)
    except OSError:
        part.unlink(missing_ok=True)


def _mapped(file: Path, offset: int, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    # Copy on write: torch warns of memory that it must not write to, which nothing here does.
    raw = np.memmap(file, np.uint8, "c", offset, (count * width * dtype.itemsize,))
    return torch.from_numpy(raw).view(dtype).view(count, width)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Keys:
    """A bank's keys to the numbers of their rows; 24 bytes of memory a key, and the file mapped.

    Raises:
        BankError: not one key a row, an empty one, one given twice, or no UTF-8.
    """

    def __init__(self, file: Path, num_rows: int) -> None:
        self._file = file
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            self._text: Any = (
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            )
        ends = np.flatnonzero(np.frombuffer(self._text, np.uint8) == 10) if size else np.empty(0)
        if size and self._text[size - 1] != 10:
            ends = np.append(ends, size)
        if len(ends) != num_rows:
            raise BankError(f"{file}: got {len(ends)} keys, expected {num_rows}, one a row")
        self._ends = ends.astype(np.int64)
        hashes = np.fromiter(map(hash, self._lines()), np.int64, num_rows)
        self._order = hashes.argsort(kind="stable")
        self._hashes = hashes[self._order]
        self._refuse_doubles()

    def __len__(self) -> int:
        return len(self._ends)

    def _line(self, row: int) -> bytes:
        begin = int(self._ends[row - 1]) + 1 if row else 0
        return bytes(self._text[begin : int(self._ends[row])]).removesuffix(b"\r")

    def _lines(self) -> Iterator[bytes]:
        for row in range(len(self._ends)):
            line = self._line(row)
            try:
                text = line.decode()
            except UnicodeDecodeError:
                text = ""
            if not text:
                raise BankError(f"{self._file}:{row + 1}: a key is empty, or no UTF-8")
            yield line

    def _refuse_doubles(self) -> None:
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            # Of equal hashes there are two, but by a chance that `row` then decides.
            one, other = self._order[at : at + 2].tolist()
            if self._line(one) == self._line(other):
                key = self._line(one).decode()
                raise BankError(
                    f"{self._file}: key {key!r:.60} stands in line {one + 1} and in line "
                    f"{other + 1}; expected each once"
                )

    def row(self, key: str) -> int | None:
        """The number of a key's row; None where there is no such key."""
        try:
            line = key.encode()
        except UnicodeEncodeError:
            return None
        value = hash(line)
        at = int(np.searchsorted(self._hashes, value))
        while at < len(self._hashes) and self._hashes[at] == value:
            row = int(self._order[at])
            if self._line(row) == line:
                return row
            at += 1
        return None

    def rows(self, keys: Sequence[str]) -> list[int | None]:
        """The numbers of many keys' rows."""
        return [self.row(key) for key in keys]
