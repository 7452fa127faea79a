"""Safetensors shards as files: headers, links, and copies with rows appended; no whole loads.

The format (github.com/huggingface/safetensors): eight bytes of little-endian header length, a JSON
header of `{name: {"dtype", "shape", "data_offsets"}}`, then the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

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


_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
"""Of the format's dtypes; the shapes of tensors of others are taken as they are."""
_SMALL_FILES = (".json", ".jinja", ".txt", ".model")
"""Suffixes of what a checkpoint has beside its weights."""
_LFS_POINTER = b"version https://git-lfs"
_MOST_POINTER_BYTES = 1024
"""Git LFS keeps its pointer files below this."""
_AGAIN = "download or copy it again"


def read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """A shard's tensors (dtype, shape, data_offsets) by name, and where its data begins.

    Reads the header alone, and holds the file's size against it.

    Raises:
        CheckpointError: the file is missing, cannot be read, is not a safetensors file, or is
            shorter or longer than its header says.
    """
    header, start, size = _read_json_header(Path(file))
    header.pop("__metadata__", None)
    try:
        ends = _check_offsets(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file: its header is wrong ({error}); {_AGAIN}"
        ) from error
    if size != start + ends:
        state = "truncated" if size < start + ends else "longer than it should be"
        raise CheckpointError(
            f"{file} is {state}: got {size} bytes, expected {start + ends} by its header; {_AGAIN}"
        )
    return header, start


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself beside its tensors.

    Raises:
        CheckpointError: as for `read_header`.
    """
    metadata = _read_json_header(Path(file))[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_json_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the data begins, and the size of the file."""
    try:
        state = file.stat()
        if not stat.S_ISREG(state.st_mode):  # before opening: a pipe would wait for ever
            what = "a directory" if stat.S_ISDIR(state.st_mode) else "no regular file"
            raise CheckpointError(f"{file} is {what}, expected a safetensors file")
        with open(file, "rb") as stream:
            begin = stream.read(_MOST_POINTER_BYTES)
            length = int.from_bytes(begin[:8], "little")
            stream.seek(8)
            text = stream.read(length) if length <= _MAX_HEADER else b""
    except FileNotFoundError as error:
        gone = f", a link to {os.readlink(file)}, which is gone" if file.is_symlink() else ""
        raise CheckpointError(f"{file}{gone} not found; {_AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    size = state.st_size
    if not begin:
        raise CheckpointError(f"{file} is empty, expected a safetensors file; {_AGAIN}")
    if begin.startswith(_LFS_POINTER):
        raise CheckpointError(_pointer_message(file))
    if len(begin) < 8 or length > _MAX_HEADER:
        raise CheckpointError(
            f"{file} is not a safetensors file: got {begin[:16]!r} at its start, expected the "
            "length of a header"
        )
    if len(text) < length:
        raise CheckpointError(
            f"{file} is truncated: got {size} bytes, expected {8 + length} for its header alone; "
            f"{_AGAIN}"
        )
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a safetensors file: its header is no JSON ({error}); {_AGAIN}"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file: its header is no JSON object")
    return header, 8 + length, size


def _check_offsets(header: Mapping[str, Any]) -> int:
    """See that the tensors lie one behind the other, each as long as its shape; their end."""
    at = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != at or end < begin:
            raise ValueError(f"tensor {name!r} lies at [{begin}, {end}], expected to begin at {at}")
        bits = _DTYPE_BITS.get(entry["dtype"])
        count = math.prod(entry["shape"])
        if bits is not None and end - begin != count * bits // 8:
            raise ValueError(
                f"tensor {name!r} has {end - begin} bytes, expected {count * bits // 8} for "
                f"{entry['dtype']} {entry['shape']}"
            )
        at = end
    return at


def _pointer_message(file: Path) -> str:
    return (
        f"{file} is a Git LFS pointer, expected the file that it stands for; run `git lfs pull` "
        "in its repository"
    )


def refuse_pointers(folder: Path) -> None:
    """Refuse a directory in which Git LFS left pointers for config, tokenizer, template or index.

    Not for other files, which nobody may have asked for: pictures, weights in another format.
    `read_header` refuses pointers for weights that are used.

    Raises:
        CheckpointError: with the first such file.
    """
    try:
        for file in sorted(folder.iterdir()):
            small = file.suffix in _SMALL_FILES and file.is_file()
            if small and file.stat().st_size < _MOST_POINTER_BYTES:
                with open(file, "rb") as stream:
                    if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                        raise CheckpointError(_pointer_message(file))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to shard, of a checkpoint with a single file or an index; headers are checked.

    Raises:
        CheckpointError: there are no safetensors weights, the index cannot be read, or a shard is
            missing, broken, or lacks a tensor that the index promises.
    """
    if _exists(folder / SINGLE_FILE):  # transformers prefers it, too
        return dict.fromkeys(read_header(folder / SINGLE_FILE)[0], SINGLE_FILE)
    if _exists(folder / INDEX_FILE):
        weight_map = read_index(folder / INDEX_FILE)
        for shard in sorted(set(weight_map.values())):
            if not _exists(folder / shard):
                raise CheckpointError(
                    f"{folder}: shard {shard} of the index is missing; download or copy it"
                )
            held = read_header(folder / shard)[0]
            lacking = sorted(n for n, s in weight_map.items() if s == shard and n not in held)
            if lacking:
                raise CheckpointError(
                    f"{folder / shard} lacks tensor {lacking[0]!r}, which {INDEX_FILE} promises "
                    f"({len(lacking)} in all); download or copy both files again"
                )
        return weight_map
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} has only PyTorch .bin weights; convert them first: load the model with "
            "transformers and save_pretrained it, which writes safetensors"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_index(file: Path) -> dict[str, str]:
    """The `weight_map` of an index file: tensor name to the name of its shard.

    Raises:
        CheckpointError: it cannot be read, or is no index.
    """
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is not an object with entries")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{name!r} is in {shard!r}, expected a file beside the index")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = "weight_map is missing" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{file} is not an index of shards ({reason}); {_AGAIN}") from error
    return weight_map


def _exists(file: Path) -> bool:
    """Whether something has this name, be it a link to nothing or a directory."""
    return os.path.lexists(file)


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
    import torch  # here: headers are also read where torch is broken (`mmqwen doctor`)
    from safetensors import safe_open

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
