"""Safetensors shards as files: headers, links, and copies with rows appended; no whole loads.

The format (github.com/huggingface/safetensors): eight bytes of little-endian header length, a JSON
header of `{name: {"dtype", "shape", "data_offsets"}}`, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

PROJECTOR_FILE = "projectors.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BASE_PREFIX = "base-"

_COPY_BYTES = 16 * 1024 * 1024
_MEAN_ROWS = 8192
_MAX_HEADER = 100_000_000
"""Longest header that the safetensors library itself accepts, in bytes."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written, with the reason."""


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """A shard's tensors (dtype, shape, data_offsets) by name, and where its data begins.

    Raises:
        CheckpointError: the file cannot be read or is not a safetensors file.
    """
    try:
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["dtype"], entry["shape"], entry["data_offsets"]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is not a safetensors file") from error
    return header, 8 + length


def place_file(source: Path, target: Path, copy: bool) -> None:
    """Copy `source`, or link it: hard where the file system allows, else symbolically."""
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        os.symlink(source, target)


def copy_with_rows(source: Path, target: Path, names: Collection[str], rows: int) -> None:
    """Copy a shard, appending to each matrix of `names` as many copies of its mean row.

    The mean of the table is the neutral choice for a token that has no meaning yet. Memory stays
    at some MiB whatever the size of the shard.

    Args:
        source: shard to read.
        target: shard to write.
        names: `[V, D]` floating tensors of the shard.
        rows: rows to append to each.
    """
    header, start = read_header(source)
    ordered = sorted(header, key=lambda name: header[name]["data_offsets"][0])
    tails = {name: _mean_row(source, name) for name in names}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered:
        entry = header[name]
        begin, end = entry["data_offsets"]
        shape, size = list(entry["shape"]), end - begin
        if name in names:
            shape[0] += rows
            size += rows * len(tails[name])
        entries[name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must begin at a multiple of eight bytes
    with open(source, "rb") as reader, open(target, "wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            begin, end = header[name]["data_offsets"]
            reader.seek(start + begin)
            _copy_bytes(reader, writer, end - begin)
            if name in names:
                writer.write(tails[name] * rows)


def _copy_bytes(reader: BinaryIO, writer: BinaryIO, count: int) -> None:
    while count:
        block = reader.read(min(count, _COPY_BYTES))
        if not block:
            raise CheckpointError(f"{reader.name} ends before its header says")
        writer.write(block)
        count -= len(block)


def _mean_row(file: Path, name: str) -> bytes:
    """The mean of a matrix's rows, in its own dtype, as bytes."""
    with safe_open(file, framework="pt") as handle:
        table = handle.get_slice(name)
        count, width = table.get_shape()
        total = torch.zeros(width, dtype=torch.float64)
        for at in range(0, count, _MEAN_ROWS):
            block = table[at : min(at + _MEAN_ROWS, count)]
            total += block.double().sum(0)
        mean = (total / count).to(block.dtype)
    return mean.view(torch.uint8).numpy().tobytes()


def drop_replaced_files(folder: Path) -> None:
    """After a whole model was saved over a built checkpoint, remove the build's own weights.

    transformers would prefer the new files, but vLLM follows the index: left in place, the old
    index would go on serving the old projectors.
    """
    index = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file():  # transformers removes it when it writes shards
        index.unlink(missing_ok=True)
        used: set[str] = set()
    elif index.is_file():
        used = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        return
    for file in [folder / PROJECTOR_FILE, *folder.glob(f"{BASE_PREFIX}*.safetensors")]:
        if file.name not in used:
            file.unlink(missing_ok=True)


def check_output(output: Path) -> None:
    """Refuse a path that holds something.

    Raises:
        CheckpointError: `output` is a file, or a directory that is not empty.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise CheckpointError(f"output {output} is not empty; name a new directory")
    elif output.exists() or output.is_symlink():
        raise CheckpointError(f"output {output} exists and is not a directory")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its name when the block ends, or vanishes.

    Raises:
        CheckpointError: the file system refuses.
    """
    stage: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o777 & ~mask)  # mkdtemp's 0700 would hide the checkpoint from other users
        yield stage
        for file in stage.iterdir():  # safetensors writes with mode 0600; links stay
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(0o666 & ~mask)
        stage.rename(output)  # over an empty directory at most
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    finally:
        if stage is not None and stage.exists():
            shutil.rmtree(stage, ignore_errors=True)
