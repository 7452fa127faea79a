"""`train`: a dataset and a composite checkpoint in, a trained composite checkpoint out."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mmqwen._version import __version__
from mmqwen.checkpoint import CheckpointError, UntrainedProjectorsWarning, read_config
from mmqwen.checkpoint.index import read_weight_map
from mmqwen.checkpoint.names import only_projectors
from mmqwen.checkpoint.shards import check_output, staged
from mmqwen.checkpoint.trained import read_trained, untrained
from mmqwen.data.encoding import stop_ids
from mmqwen.hf import MultimodalQwen3Config, MultimodalQwen3ForConditionalGeneration
from mmqwen.stops import read_generation_config
from mmqwen.text_models import refuse_end_to_end
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.training.arguments import trainer_arguments
from mmqwen.training.attention import VARLEN
from mmqwen.training.collator import Collator
from mmqwen.training.config import TrainingError, TrainSettings
from mmqwen.training.lora import ADAPTER_FOLDER, add_lora, merge_lora, save_adapter
from mmqwen.training.output import add_stops, write_linked, write_whole
from mmqwen.training.plan import RunPlan, make_plan, open_data
from mmqwen.training.run_folder import (
    PLAN_FILE,
    RUN_FILE,
    alone_in,
    claim_run_folder,
    read_settings,
    release_run_folder,
)
from mmqwen.training.speed import (
    default_tokens,
    flops_per_token,
    peak_flops,
    speed_up,
    token_bytes,
    weight_bytes,
)

REPORT_FILE = "training.json"
MOST_WORKERS = 12
"""A sample takes a worker 1 to 5 ms, and 0.6B's shape 1,200 of them a second on an H100."""


def train(settings: TrainSettings, *, callbacks: Sequence[Any] = ()) -> Path:
    """Train, or go on with a run that was interrupted, and write the output.

    The dataset is checked first. Checkpoints and TensorBoard logs go to `settings.run_folder`; a
    run found there with the same settings goes on from its last checkpoint, on the same loss curve.
    Under `torchrun` or `accelerate launch`, every process calls this.

    Args:
        settings: what to train, on what, and how.
        callbacks: further `transformers.TrainerCallback`s.

    Returns:
        The output's directory, a checkpoint that `LLM(model=...)` serves.

    Raises:
        DatasetError: with file and line, before training starts.
        TrainingError: settings that do not fit together or to the run found there, a loss that is
            no number, or a checkpoint that cannot be written (the last good one is kept).
        CheckpointError: the model cannot be read, or the output exists or cannot be written.

    Warns:
        UntrainedProjectorsWarning: the data has no rows of a modality that was never trained.
    """
    from mmqwen.training.checkpoints import last_checkpoint
    from mmqwen.training.meter import without_file_bars

    config = read_config(settings.model)
    try:
        refuse_end_to_end(config.text_config)
    except ValueError as error:
        raise TrainingError(f"{settings.model}: {error}") from error
    arguments = trainer_arguments(settings)
    tokenizer = _load_tokenizer(settings, config)
    run = settings.run_folder
    with ExitStack() as stack:
        stack.enter_context(without_file_bars())
        claimed = False
        with arguments.main_process_first(local=False, desc="checking"):
            if arguments.process_index == 0:
                check_output(Path(settings.output))
                read_weight_map(Path(settings.model))
                _check_generation(Path(settings.model))
                stack.enter_context(alone_in(run))
                goes_on = last_checkpoint(run) is not None
                if goes_on and not (run / PLAN_FILE).is_file():
                    raise TrainingError(
                        f"{run} has checkpoints but no {PLAN_FILE}: it was begun by a version that "
                        "padded batches, and would go on with others; --export a checkpoint of it, "
                        "or name another output"
                    )
                plan = None if goes_on else _make_plan(settings, config, tokenizer, arguments)
                claimed = claim_run_folder(settings, has_checkpoint=goes_on)
                if plan is not None:
                    plan.write(run)
        try:
            return _train(settings, config, arguments, tokenizer, callbacks)
        except BaseException:
            if claimed and last_checkpoint(run) is None:
                release_run_folder(run)
            raise


def _check_generation(model: Path) -> None:
    """See that the file which the output's stops go into can be read, before anything is trained.

    Raises:
        TrainingError: it cannot.
    """
    try:
        read_generation_config(model)
    except ValueError as error:
        raise TrainingError(str(error)) from error


def _make_plan(
    settings: TrainSettings, config: MultimodalQwen3Config, tokenizer: Any, arguments: Any
) -> RunPlan:
    """Check the datasets, and choose how many tokens a pass holds."""
    text = config.text_config
    bounds = (
        settings.max_length,
        settings.tokens_per_step,
        getattr(text, "max_position_embeddings", None),
    )
    limit = min((bound for bound in bounds if bound), default=None)
    per_token = token_bytes(
        text, gradient_checkpointing=settings.gradient_checkpointing, half=settings.bf16
    )
    weights = weight_bytes(Path(settings.model), stage=settings.stage, half=settings.bf16)
    return make_plan(
        settings,
        config,
        tokenizer,
        limit,
        lambda lengths: default_tokens(lengths, arguments.device, weights, per_token),
    )


def _train(
    settings: TrainSettings,
    config: MultimodalQwen3Config,
    arguments: Any,
    tokenizer: Any,
    callbacks: Sequence[Any],
) -> Path:
    """Train by a plan that stands in the run's folder, and write the output."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from mmqwen.training.checkpoints import (
        last_checkpoint,
        set_trainable,
        trainable_state,
        trained_anywhere,
    )
    from mmqwen.training.meter import Bar, Meter
    from mmqwen.training.trainer import RowsTrainer, StopOnNaN

    main, world = arguments.process_index == 0, arguments.world_size
    plan = RunPlan.read(settings.run_folder)
    train_set, eval_set = open_data(settings, config, plan)
    plan.check(len(train_set), None if eval_set is None else len(eval_set))
    if main:
        _warn_without_rows(settings, config, plan.used)
    passes = plan.passes(settings, arguments.process_index, world)
    eval_passes = plan.eval_passes(arguments.process_index, world)
    model, tuner = _load_model(settings, config)
    steps = len(passes) * settings.epochs
    if settings.max_steps > 0:
        steps = settings.max_steps * settings.accumulation
    of_the_run = steps * plan.tokens
    fast = speed_up(model, settings, arguments.device, of_the_run, a_pass=plan.tokens)
    flops = flops_per_token(model, settings.stage) if settings.bf16 else None
    meter = Meter(arguments.device, world=world, flops=flops, peak=peak_flops(arguments.device))
    meter.watch(model.projectors)
    most = max(p.most_samples for p in (passes, eval_passes) if p is not None)
    trainer = RowsTrainer(
        model=model,
        args=arguments,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=Collator(
            tokenizer,
            config.modality_specs,
            tokens=plan.tokens,
            samples=most,
            longest=plan.longest,
            cut=settings.overlong == "cut",
        ),
        callbacks=[StopOnNaN(), meter, *callbacks],
        passes=passes,
        eval_passes=eval_passes,
        meter=meter,
        workers=_workers(settings, arguments, len(passes)),
        has_bounds=fast.attention == VARLEN,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if settings.progress:
        trainer.add_callback(Bar(compiles=fast.compiled))
    checkpoint = last_checkpoint(settings.run_folder)
    with fast.memory():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trained = trained_anywhere(model.projectors_trained)
    if settings.fsdp:  # the shards' whole weights, in a model of the first process alone
        weights = trainable_state(trainer.model)
        if main:
            del trainer.model, model
            model, tuner = _load_model(settings, config)
            set_trainable(model, weights)
    if main:
        report = {
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step,
            "best_eval_loss": trainer.state.best_metric,
            "tokens_per_step": plan.tokens,
            "padding": passes.waste,
            **fast.to_dict(),
            "log": trainer.state.log_history,
        }
        model.projectors_trained.update(trained)
        _write_output(settings, model, tuner, Path(settings.output), report)
    trainer.accelerator.wait_for_everyone()
    return Path(settings.output)


def _workers(settings: TrainSettings, arguments: Any, passes: int) -> int:
    """Processes that encode ahead: so many that a GPU does not wait, none where there is none."""
    if settings.workers is not None:
        return settings.workers
    if arguments.device.type != "cuda":
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is a process for each core
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(MOST_WORKERS, max(1, (os.cpu_count() or 1) // local - 1), passes)


def export(checkpoint: str | Path, output: str | Path) -> Path:
    """Make the output of a run that was not finished from one of its checkpoints.

    Args:
        checkpoint: `<run folder>/checkpoint-<step>`.
        output: directory to create.

    Raises:
        TrainingError: it is not the checkpoint of a run; where it is the run's folder, with the
            checkpoints that it has.
        CheckpointError: the output exists or cannot be written.
    """
    from mmqwen.training.checkpoints import all_checkpoints, load_trainable
    from mmqwen.training.meter import without_file_bars

    checkpoint, output = Path(checkpoint), Path(output)
    check_output(output)
    run = checkpoint if (checkpoint / RUN_FILE).is_file() else checkpoint.parent
    settings = read_settings(run)
    if checkpoint not in (found := all_checkpoints(run)):
        names = ", ".join(str(path) for path in found) or "none yet"
        raise TrainingError(f"{checkpoint} is no checkpoint of a run; the run has: {names}")
    config = read_config(settings.model)
    with without_file_bars():
        model, tuner = _load_model(settings, config)
        load_trainable(model, checkpoint)
        _write_output(settings, model, tuner, output, {"checkpoint": checkpoint.name})
    return output


def _load_tokenizer(settings: TrainSettings, config: MultimodalQwen3Config) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    add_placeholder_tokens(tokenizer, config.modality_specs)
    return tokenizer


def _warn_without_rows(
    settings: TrainSettings, config: MultimodalQwen3Config, learnt: Collection[str]
) -> None:
    """Say which projectors this run will not train."""
    absent = [name for name in config.modality_specs if name not in learnt]
    random = untrained(read_trained(settings.model), absent)
    if random:
        warnings.warn(
            f"{settings.data} has no rows of {', '.join(random)}, whose projectors are UNTRAINED "
            "(random) and stay so: add samples with such rows, or give the projectors (`mmqwen "
            "build --projector FILE`)",
            UntrainedProjectorsWarning,
            stacklevel=3,
        )
    kept = [name for name in absent if name not in random]
    if kept:
        warnings.warn(
            f"{settings.data} has no rows of {', '.join(kept)}: their projectors stay as they are",
            stacklevel=3,
        )


def _stored_dtype(config: MultimodalQwen3Config) -> torch.dtype:
    """The dtype of the checkpoint's weights, which the output keeps."""
    dtype = config.text_config.dtype or config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _load_model(settings: TrainSettings, config: MultimodalQwen3Config) -> tuple[Any, Any]:
    """The model with exactly the stage's weights trainable, in float32; and peft's tuner, if any.

    Frozen weights are in bfloat16 where that loses nothing that the output keeps.
    """
    stored = _stored_dtype(config)
    halved = settings.bf16 and (
        settings.stage == "projector" or (settings.stage == "lora" and stored == torch.bfloat16)
    )
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(
        settings.model, dtype=torch.bfloat16 if halved else torch.float32
    )
    tuner = None
    if settings.stage != "full":
        model.requires_grad_(False)
    if settings.stage == "lora":
        tuner = add_lora(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            layers=settings.lora_layers,
            seed=settings.seed,
            autocast=settings.bf16,
        )
    model.projectors.float().requires_grad_(True)
    return model, tuner


def _write_output(
    settings: TrainSettings, model: Any, tuner: Any, output: Path, report: dict[str, Any]
) -> None:
    """Write the composite checkpoint, whole or not at all."""
    import transformers

    source = Path(settings.model)
    config = read_config(source)
    stored = _stored_dtype(config)
    linked = settings.stage == "projector" or (tuner is not None and not settings.merge)
    try:
        with staged(output) as stage:
            if linked:
                state = only_projectors(model.state_dict())
                write_linked(source, stage, state, stored, model.projectors_trained)
                if tuner is not None:
                    save_adapter(tuner, stage / ADAPTER_FOLDER, str(output))
            else:
                write_whole(
                    merge_lora(tuner) if tuner is not None else model, source, stage, stored
                )
            add_stops(stage, config, stop_ids(_load_tokenizer(settings, config)))
            versions = {"mmqwen": __version__, "torch": torch.__version__}
            versions["transformers"] = transformers.__version__
            about = {"settings": settings.to_dict(), "versions": versions, **report}
            (stage / REPORT_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the trained weights are kept in {settings.run_folder}: make room and give "
            "the same command again"
        ) from error
