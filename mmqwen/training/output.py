"""From trained weights to a composite checkpoint: what did not change is linked, not copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mmqwen.checkpoint.index import read_weight_map, write_index
from mmqwen.checkpoint.names import (
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    CheckpointError,
    only_projectors,
)
from mmqwen.checkpoint.projectors import cast_projectors, save_projectors
from mmqwen.checkpoint.shards import copy_small_files, place_base_shard
from mmqwen.modalities import parse_modalities
from mmqwen.stops import GENERATION_FILE, read_generation_config


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
    base = {f for name, f in weight_map.items() if not name.startswith(PROJECTOR_PREFIX)}
    for shard in sorted(base):
        place_base_shard(source / shard, stage)
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
            place_base_shard(shard, stage, move=True)
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {stage}: {error}") from error
    finally:
        shutil.rmtree(whole, ignore_errors=True)
    _finish(stage, only_projectors(model.state_dict()), dtype, model.projectors_trained)


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


def _finish(
    stage: Path,
    projectors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    trained: Mapping[str, bool],
) -> None:
    otherwise = f"is not finite in {dtype}; training has diverged"
    cast = cast_projectors(projectors, dtype, otherwise)
    config = json.loads((stage / "config.json").read_bytes())
    specs = parse_modalities(config.get("modalities") or {})
    save_projectors(cast, stage / PROJECTOR_FILE, trained=trained, specs=specs)
    write_index(stage)
