"""Files put in place: shards linked, or copied with tensors left out or rows appended; never loaded
whole. And the directory that they go to, which appears whole or not at all."""

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
from safetensors.torch import save_file

from mmqwen.checkpoint.index import read_header
from mmqwen.checkpoint.names import (
    BANKS_FOLDER,
    BASE_PREFIX,
    INDEX_FILE,
    PROJECTOR_PREFIX,
    SMALL_FILES,
    CheckpointError,
)

_COPY_BYTES = 16 * 1024 * 1024
_MEAN_ROWS = 8192


def place_file(source: Path, target: Path, copy: bool) -> None:
    """Copy `source`, or link it: hard where the file system allows, else symbolically."""
    if copy:
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        os.symlink(source, target)


def place_base_shard(source: Path, folder: Path, *, move: bool = False) -> None:
    """Link or move a shard under a base's name; copy it without the projectors that it holds.

    Loaders read every tensor of a shard, so that old projectors in it could win over new ones.
    """
    target = folder / (BASE_PREFIX + source.name.removeprefix(BASE_PREFIX))
    source = source.resolve()
    names = read_header(source)[0]
    kept = [name for name in names if not name.startswith(PROJECTOR_PREFIX)]
    if len(kept) == len(names) and move:
        source.rename(target)
    elif len(kept) == len(names):
        place_file(source, target, copy=False)
    elif kept:
        copy_tensors(source, target, kept)


def copy_tensors(source: Path, target: Path, names: Collection[str]) -> None:
    """Copy some of a shard's tensors, which stay memory-mapped meanwhile."""
    with safe_open(source, framework="pt") as handle:
        save_file({n: handle.get_tensor(n) for n in names}, target, metadata={"format": "pt"})


def copy_small_files(source: Path, target: Path) -> None:
    """Copy config, tokenizer and licence; not the index, nor what training leaves. Link banks."""
    for file in (source / BANKS_FOLDER).glob("*"):
        (target / BANKS_FOLDER).mkdir(exist_ok=True)
        place_file(file.resolve(), target / BANKS_FOLDER / file.name, copy=False)
    for pattern in SMALL_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in (INDEX_FILE, "training.json"):
                shutil.copyfile(file, target / file.name)


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
