"""Which file holds which tensor: the index of a checkpoint, read and written here alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from mmqwen.checkpoint.headers import AGAIN, read_header
from mmqwen.checkpoint.names import (
    BASE_PREFIX,
    INDEX_FILE,
    PROJECTOR_FILE,
    SINGLE_FILE,
    CheckpointError,
)


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
        raise CheckpointError(f"{file} is not an index of shards ({reason}); {AGAIN}") from error
    return weight_map


def _exists(file: Path) -> bool:
    """Whether something has this name, be it a link to nothing or a directory."""
    return os.path.lexists(file)


def write_index(folder: Path, weight_map: Mapping[str, str] | None = None) -> None:
    """Write the index of the shards in `folder`.

    Args:
        folder: where the shards are.
        weight_map: tensor name to the name of its shard; None: whatever the shards there hold.

    Raises:
        CheckpointError: a shard cannot be read.
    """
    if weight_map is None:
        shards = sorted(folder.glob("*.safetensors"))
        weight_map = {name: shard.name for shard in shards for name in read_header(shard)[0]}
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
