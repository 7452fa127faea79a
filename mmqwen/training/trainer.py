"""transformers' Trainer, saving only what is trained, and each checkpoint whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from mmqwen.training.config import TrainingError
from mmqwen.training.sharding import (
    load_optimizer_state,
    optimizer_state,
    put,
    shard_on_cpu,
    whole,
)

TRAINABLE_FILE = "trainable.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"
STATE_FILE = "trainer_state.json"
_STAGE = ".saving"


def trainable_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are trained, by name, whole and on the CPU; every process calls it."""
    return {
        name: whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint into the model.

    Raises:
        TrainingError: the checkpoint is of other weights, or cannot be read.
    """
    file = checkpoint / TRAINABLE_FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file} cannot be read: {error}") from error
    try:
        set_trainable(model, tensors)
    except TrainingError as error:
        raise TrainingError(f"{file} is of another stage or model: {error}") from error


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


class StopOnNaN(TrainerCallback):
    """Ends a run whose loss is no number any more, before it overwrites good checkpoints."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Look at the loss that is logged."""
        loss = (logs or {}).get("loss")
        if loss is not None and not abs(float(loss)) < float("inf"):
            raise TrainingError(
                f"the loss is {loss} at step {state.global_step}; lower lr, and go on from an "
                "earlier checkpoint or anew"
            )


class RowsTrainer(Trainer):
    """Writes checkpoints aside and renames them, so that a kill or a full disk leaves the last one.

    A checkpoint holds `trainable.safetensors` (in stage `projector`, the projectors alone), the
    states of optimizer, schedule and random generators, and `trainer_state.json`.
    """

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, _STAGE) if getattr(self, "_staging", False) else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(run / _STAGE, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()  # every rank saves its random state
            if self.args.should_save:
                self._settle(run, name)
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(run / _STAGE, ignore_errors=True)
            good = last_checkpoint(run)
            raise TrainingError(
                f"cannot write {run / name}: {error}; "
                + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
                + "; make room and give the same command to go on"
            ) from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

    def _settle(self, run: Path, name: str) -> None:
        """Give the complete checkpoint its name, then remove the oldest."""
        if self.state.best_global_step:
            best = run / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        staged = run / _STAGE / name
        self.state.save_to_json(str(staged / STATE_FILE))
        shutil.rmtree(run / name, ignore_errors=True)
        staged.rename(run / name)
        shutil.rmtree(run / _STAGE, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def create_accelerator_and_postprocess(self) -> None:
        """Shard between CPU processes too, where FSDP is asked for."""
        super().create_accelerator_and_postprocess()
        sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        if self.args.fsdp_plugin_args is not None and not sharded:
            from accelerate.utils import FullyShardedDataParallelPlugin

            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            shard_on_cpu(self.accelerator, plugin)
            self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; every process calls it, the first one writes."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if not (self.args.should_save or self.is_fsdp_enabled):
            return
        # Shards are gathered by all processes together; nothing else needs the others.
        tensors = trainable_state(self.accelerator.unwrap_model(self.model))
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise TrainingError(
                f"{broken[0]} is not finite at step {self.state.global_step}, which is not saved; "
                "lower lr"
            )
        save_file(tensors, folder / TRAINABLE_FILE, metadata={"format": "pt"})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(self.model, self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_FILE))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(os.path.join(checkpoint, OPTIMIZER_FILE), weights_only=True)
        load_optimizer_state(self.model, self.optimizer, state)
        schedule = torch.load(os.path.join(checkpoint, SCHEDULE_FILE), weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trainable(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        # By its step: the folder may have been moved since.
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        load_trainable(self.model, best)
