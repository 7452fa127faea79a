"""A run's checkpoints: which there are, and the trained weights put into them and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from mmqwen.training.config import TrainingError
from mmqwen.training.sharding import put, whole

TRAINABLE_FILE = "trainable.safetensors"
STATE_FILE = "trainer_state.json"
TRAINED = "trained"
"""In the metadata of the weights: which projectors were ever trained."""


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name, whole and on the CPU; every process calls it."""
    return {
        name: whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable(model: Any, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into the model, and which projectors were trained.

    Raises:
        TrainingError: the checkpoint is of other weights, or cannot be read.
    """
    file = checkpoint / TRAINABLE_FILE
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            trained = json.loads((opened.metadata() or {}).get(TRAINED, "{}"))
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file} cannot be read: {error}") from error
    try:
        set_trainable(model, tensors)
    except TrainingError as error:
        raise TrainingError(f"{file} is of another stage or model: {error}") from error
    model.projectors_trained.update(trained)


def set_trainable(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put weights, as `trainable_state` gave them, into the model; every process calls it.

    Raises:
        TrainingError: they are of another stage or model.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())[:3]
        raise TrainingError(f"{odd} are in one of them only")
    for name, parameter in wanted.items():
        put(parameter, tensors[name])


def trained_anywhere(own: Mapping[str, bool]) -> dict[str, bool]:
    """Which projectors had rows in some process; every process calls it."""
    if not torch.distributed.is_initialized():
        return dict(own)
    everywhere: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, dict(own))
    names = {name for one in everywhere for name in one}
    return {name: any(one.get(name, False) for one in everywhere) for name in names}


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. What stands there is complete: see `RowsTrainer`."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in run.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / STATE_FILE).is_file()
    ]
    return [path for _, path in sorted(found)]


def last_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, or None."""
    return next(reversed(all_checkpoints(run)), None)
