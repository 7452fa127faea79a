"""From trained weights to a composite checkpoint: what did not change is linked, not copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmqwen.checkpoint import save_projectors
from mmqwen.shards import (
    BASE_PREFIX,
    INDEX_FILE,
    PROJECTOR_FILE,
    CheckpointError,
    place_file,
    read_header,
    read_weight_map,
)
from mmqwen.stops import GENERATION_FILE, read_generation_config

PREFIX = "projectors."
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*")


def write_linked(
    source: Path,
    stage: Path,
    projectors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    trained: Mapping[str, bool],
) -> None:
    """Fill `stage` with the checkpoint `source` and new projectors; the base's shards are linked.

    Args:
        source: a composite checkpoint.
        stage: empty directory.
        projectors: all `projectors.*` tensors.
        dtype: in which they are stored.
        trained: modality to whether its projector was ever trained.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    weight_map = read_weight_map(source)
    copy_small_files(source, stage)
    for shard in sorted({f for name, f in weight_map.items() if not name.startswith(PREFIX)}):
        _place_shard((source / shard).resolve(), stage / _base_name(shard))
    _finish(stage, projectors, dtype, trained)


def write_whole(model: Any, tokenizer_source: Path, stage: Path, dtype: torch.dtype) -> None:
    """Fill `stage` with a model in memory: base shards, projectors, index.

    Args:
        model: the trained model; cast to `dtype` in place.
        tokenizer_source: checkpoint whose tokenizer and other small files are taken.
        stage: empty directory.
        dtype: in which the weights are stored.

    Raises:
        CheckpointError: a file cannot be written.
    """
    model.to(dtype)
    model.config.dtype = model.config.text_config.dtype = dtype
    whole = stage / ".whole"
    try:
        model.save_pretrained(whole)
        copy_small_files(tokenizer_source, stage)
        shutil.copyfile(whole / "config.json", stage / "config.json")
        for shard in sorted(whole.glob("*.safetensors")):
            _place_shard(shard, stage / _base_name(shard.name), move=True)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {stage}: {error}") from error
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    projectors = {k: v for k, v in model.state_dict().items() if k.startswith(PREFIX)}
    _finish(stage, projectors, dtype, model.projectors_trained)


def copy_small_files(source: Path, stage: Path) -> None:
    """Copy config, tokenizer and licence; not the index, nor what training leaves."""
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in (INDEX_FILE, "training.json"):
                shutil.copyfile(file, stage / file.name)


def add_stops(stage: Path, config: Any, ids: Sequence[int]) -> None:
    """Let generation stop at what training taught as an end, beside what it stops at anyway.

    Args:
        stage: directory of the output, with the base's `generation_config.json` if it has one.
        config: the checkpoint's config, whose stops are used where there is no such file.
        ids: the tokens that must be among the stops.
    """
    file = stage / GENERATION_FILE
    own = read_generation_config(stage)
    stops = own.get("eos_token_id", config.eos_token_id)
    known = [] if stops is None else stops if isinstance(stops, list) else [stops]
    missing = [token for token in ids if token not in known]
    if missing:
        own["eos_token_id"] = [*known, *missing]
        file.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def _base_name(shard: str) -> str:
    return shard if shard.startswith(BASE_PREFIX) else BASE_PREFIX + shard


def _place_shard(source: Path, target: Path, *, move: bool = False) -> None:
    """Link or move a shard; where projectors are among its tensors, copy it without them.

    Loaders read every tensor of a shard, so that old projectors in it could win over new ones.
    """
    names = read_header(source)[0]
    kept = [name for name in names if not name.startswith(PREFIX)]
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


def _finish(
    stage: Path,
    projectors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    trained: Mapping[str, bool],
) -> None:
    cast = {name: tensor.detach().to(dtype) for name, tensor in projectors.items()}
    for name, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"tensor {name} is not finite in {dtype}; training has diverged")
    save_projectors(cast, stage / PROJECTOR_FILE, trained=trained)
    shards = sorted(stage.glob("*.safetensors"))
    weight_map = {name: shard.name for shard in shards for name in read_header(shard)[0]}
    size = sum(shard.stat().st_size for shard in shards)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (stage / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
