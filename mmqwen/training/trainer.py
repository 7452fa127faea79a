"""transformers' Trainer, saving only what is trained, and each checkpoint whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from mmqwen.data.errors import DatasetError
from mmqwen.training.checkpoints import (
    STATE_FILE,
    TRAINABLE_FILE,
    TRAINED,
    last_checkpoint,
    load_trainable,
    trainable_state,
    trained_anywhere,
)
from mmqwen.training.config import TrainingError
from mmqwen.training.meter import Meter
from mmqwen.training.packing import PackedSampler
from mmqwen.training.sharding import (
    keep_losses_whole,
    load_optimizer_state,
    optimizer_state,
    shard_on_cpu,
)

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULE_FILE = "scheduler.pt"
_STAGE = ".saving"


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


class _Guarded:
    """A collator whose errors come back as values.

    torch would wrap one that is raised in another process into a traceback of that process.
    """

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: Any) -> Any:
        try:
            return self.collator([read() for read in examples])
        except DatasetError as error:
            return error


class _Readers(Dataset[Any]):
    """A dataset whose samples are read when the collator asks for them."""

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return partial(self.samples.__getitem__, index)


def _checked(batches: Any) -> Iterator[dict[str, Any]]:
    """The passes that a loader gives.

    Raises:
        DatasetError: with file and line, for the sample that cannot be used.
        TrainingError: a process that reads was killed.
    """
    try:
        for batch in batches:
            if isinstance(batch, DatasetError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            f"a process that reads data ended ({error}); if memory ran out, use fewer --workers; "
            "the same command goes on from the last checkpoint"
        ) from error


class NextEpoch(TrainerCallback):
    """Has each epoch's order drawn, whichever way transformers would go about it."""

    def __init__(self, passes: PackedSampler) -> None:
        self.passes = passes

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at how far the run is; where one goes on, in the middle of an epoch."""
        self.passes.set_epoch(int((state.epoch or 0.0) + 1e-6))


class RowsTrainer(Trainer):
    """Trains on passes of samples that stand end to end, and keeps checkpoints safely.

    The loss is the mean over the learnt tokens of a step, over all its passes and processes; that
    of an evaluation is the mean over its learnt tokens. A step never waits for the GPU.

    Checkpoints are written aside and renamed, so that a kill or a full disk leaves the last one.
    Each holds `trainable.safetensors` (in stage `projector`, the projectors alone), the states of
    optimizer, schedule and random generators, and `trainer_state.json`.

    Args:
        passes: the samples of each training pass of this process.
        eval_passes: those of evaluation.
        meter: what is measured beside the loss.
        workers: processes that read and encode ahead.
        has_bounds: whether attention goes by the samples' bounds alone, and reads no mask.
        **kwargs: transformers' own.
    """

    control: Any

    def __init__(
        self,
        *,
        passes: PackedSampler,
        eval_passes: PackedSampler | None,
        meter: Meter,
        workers: int,
        has_bounds: bool = False,
        **kwargs: Any,
    ) -> None:
        self.passes, self.eval_passes = passes, eval_passes
        self.meter, self.workers, self.has_bounds = meter, workers, has_bounds
        super().__init__(**kwargs)
        self.add_callback(NextEpoch(passes))

    # -- passes --------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """This process's passes. Not prepared by accelerate, which would share them out again."""
        return self._loader(self.train_dataset, self.passes)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's passes of the evaluation."""
        assert self.eval_passes is not None
        return self._loader(self.eval_dataset, self.eval_passes)

    def _loader(self, dataset: Any, passes: PackedSampler) -> DataLoader:
        own = torch.Generator()  # workers are seeded from it: no draw from the global one
        own.manual_seed(self.args.seed)
        return DataLoader(
            _Readers(dataset),
            batch_sampler=passes,
            collate_fn=_Guarded(self.data_collator),
            num_workers=self.workers,
            pin_memory=self.args.device.type == "cuda",
            persistent_workers=self.workers > 0,
            prefetch_factor=4 if self.workers else None,
            generator=own,
        )

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        """The passes of a step, and the learnt tokens of all processes' passes in it."""
        batches = list(itertools.islice(_checked(epoch_iterator), num_batches))
        count: Any = sum(len(batch["shift_labels"]) for batch in batches)
        self.meter.count(batches)
        if self.args.world_size > 1:
            count = torch.tensor(count, device=device)
            torch.distributed.all_reduce(count)
            return batches, count.clamp_(min=1)
        return batches, max(count, 1)

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, torch.Tensor):  # from pinned memory, without waiting for it
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """This process's part of the loss, times the processes, whose gradients are averaged."""
        outputs = model(**self._given(inputs), num_items_in_batch=num_items_in_batch)
        loss = outputs.loss * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch."""
        given = {name: value for name, value in inputs.items() if name != "padding"}
        if self.has_bounds:
            # transformers would look in the positions for where samples begin, and wait for it; a
            # mask of four dimensions is handed on as it is.
            given["attention_mask"] = inputs["input_ids"].new_empty(1, 1, 1, 1)
        return given

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss of the learnt tokens of all processes' passes."""
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = torch.zeros(2, dtype=torch.float64)
        total = torch.zeros((), device=self.args.device, dtype=torch.float32)
        with torch.no_grad():
            for batch in _checked(dataloader):
                inputs = self._given(self._prepare_inputs(batch))
                with self.compute_loss_context_manager():
                    total += self.model_wrapped(**inputs, num_items_in_batch=1).loss
                sums[1] += len(batch["shift_labels"])
                self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        sums[0] = total.item()
        if self.args.world_size > 1:
            sums = sums.to(self.args.device)
            torch.distributed.all_reduce(sums)
        loss = float(sums[0] / sums[1].clamp(min=1))
        metrics = {f"{metric_key_prefix}_loss": loss}
        samples = len(self.eval_dataset)  # type: ignore[arg-type]
        return EvalLoopOutput(None, None, metrics, samples)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what is measured beside the loss; not transformers' samples a second, of passes."""
        wrong = ("samples_per_second", "total_flos")
        logs = {name: value for name, value in logs.items() if not name.endswith(wrong)}
        if "loss" in logs:
            logs |= self.meter.read()
        if "train_runtime" in logs and (mean := self.meter.mean_speed()):
            logs["train_tokens_per_second"] = mean
        super().log(logs, start_time)

    # -- checkpoints ---------------------------------------------------------------------------

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
        if self.is_fsdp_enabled:
            keep_losses_whole(self.accelerator.state.fsdp_plugin)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained; every process calls it, the first one writes."""
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        trained = trained_anywhere(model.projectors_trained)
        if not (self.args.should_save or self.is_fsdp_enabled):
            return
        # Shards are gathered by all processes together; nothing else needs the others.
        tensors = trainable_state(model)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
        if broken:
            raise TrainingError(
                f"{broken[0]} is not finite at step {self.state.global_step}, which is not saved; "
                "lower lr"
            )
        metadata = {"format": "pt", TRAINED: json.dumps(trained)}
        save_file(tensors, folder / TRAINABLE_FILE, metadata=metadata)

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
