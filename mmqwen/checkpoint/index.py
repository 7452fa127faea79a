"""Which file holds which tensor: weight files' headers, and the index, read and written here alone.

A safetensors file (github.com/huggingface/safetensors) is eight bytes of little-endian header
length, a JSON header of `{name: {"dtype", "shape", "data_offsets"}}`, then the tensors' bytes.
Headers are held against the file's size; the tensors are not read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmqwen.checkpoint.names import (
    BASE_PREFIX,
    INDEX_FILE,
    LEFT_OUT,
    PROJECTOR_FILE,
    SINGLE_FILE,
    SMALL_SUFFIXES,
    CheckpointError,
)

_AGAIN = "download or copy it again"
_MAX_HEADER = 100_000_000
"""Longest header that the safetensors library itself accepts, in bytes."""
_DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
"""Of the format's dtypes; the shapes of tensors of others are taken as they are."""
_LFS_POINTER = b"version https://git-lfs"
_MOST_POINTER_BYTES = 1024
"""Git LFS keeps its pointer files below this."""


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
            small = file.suffix in SMALL_SUFFIXES and file.is_file()
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


def write_index(folder: Path, weight_map: Mapping[str, str] | None = None) -> None:
    """Write the index of the shards in `folder`.

    Args:
        folder: where the shards are.
        weight_map: tensor name to the name of its shard; None: whatever the shards there hold that
            is read.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    if weight_map is None:
        shards = sorted(folder.glob("*.safetensors"))
        weight_map = {
            name: shard.name
            for shard in shards
            for name in read_header(shard)[0]
            if not name.startswith(LEFT_OUT)
        }
    size = sum((folder / shard).stat().st_size for shard in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
        used = set(read_index(index).values())
    else:
        return
    for file in [folder / PROJECTOR_FILE, *folder.glob(f"{BASE_PREFIX}*.safetensors")]:
        if file.name not in used:
            file.unlink(missing_ok=True)
