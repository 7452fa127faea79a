"""What transformers' Trainer is told of a run."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from mmqwen.training.config import TrainingError, TrainSettings

_LOG = logging.getLogger(__name__)


def trainer_arguments(settings: TrainSettings) -> Any:
    """The Trainer's own settings.

    Raises:
        TrainingError: settings that this machine or transformers cannot follow.
    """
    try:
        import tensorboard  # noqa: F401
        from transformers import TrainingArguments
        from transformers.utils import is_accelerate_available, is_torch_bf16_gpu_available
    except ImportError as error:
        raise TrainingError(f"training needs pip install 'mmqwen[train]' ({error})") from error
    if not is_accelerate_available():
        raise TrainingError("training needs accelerate: pip install 'mmqwen[train]'")
    if settings.fsdp and int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise TrainingError(
            "fsdp shards between processes: start them by torchrun or accelerate launch"
        )
    if settings.bf16 and not (settings.cpu or is_torch_bf16_gpu_available()):
        raise TrainingError(
            "bf16 needs a GPU that computes in bfloat16, and there is none here; add --cpu "
            "(cpu=True) to train on the CPU all the same, or leave --bf16 out"
        )
    _check_schedule(settings)
    evaluates = settings.eval_data is not None or settings.eval_share > 0
    rhythm: dict[str, Any] = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    if settings.save_steps is not None:
        rhythm = {"save_strategy": "steps", "save_steps": settings.save_steps}
        rhythm |= {"eval_strategy": "steps", "eval_steps": settings.save_steps}
    if not evaluates:
        rhythm["eval_strategy"] = "no"
    fields: dict[str, Any] = dict(
        output_dir=str(settings.run_folder.resolve()),
        per_device_train_batch_size=1,  # passes are batched by their sampler
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps if settings.max_steps > 0 else -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,  # a share, being below 1
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,  # StopOnNaN wants to see them
        save_total_limit=settings.keep,
        load_best_model_at_end=evaluates,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        prediction_loss_only=True,
        report_to=["tensorboard"],
        remove_unused_columns=False,  # a batch's embeddings are no column of the dataset
        label_names=["labels"],
        ddp_find_unused_parameters=False,  # a projector without rows has a gradient of zeros
        fsdp=settings.fsdp,
        fsdp_config={"version": 2} if settings.fsdp else None,
        use_cpu=settings.cpu,
        disable_tqdm=True,  # the bar is our own
        **rhythm,
    )
    try:
        arguments = TrainingArguments(**fields)
    except ValueError as error:
        raise TrainingError(f"transformers refuses the settings: {error}") from error
    if arguments.n_gpu > 1:
        # Trainer would wrap the model in DataParallel, which splits token ids between the GPUs but
        # not the rows that belong to them.
        _LOG.warning(
            "training on one of %d GPUs: start a process for each by torchrun to use them all "
            "(docs/training.md)",
            arguments.n_gpu,
        )
        arguments._n_gpu = 1  # as Trainer itself sets it where a model must not be replicated
    return arguments


def _check_schedule(settings: TrainSettings) -> None:
    """Refuse a schedule that transformers does not know, or that needs what no setting gives."""
    from transformers import SchedulerType, get_scheduler

    def refusal(name: str) -> Exception | None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], settings.learning_rate)
        try:
            get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10)
        except (ValueError, TypeError) as error:
            return error
        return None

    if (error := refusal(settings.schedule)) is not None:
        names = [kind.value for kind in SchedulerType if refusal(kind.value) is None]
        raise TrainingError(f"schedule {settings.schedule!r}, expected one of {names}") from error
