"""`mmqwen train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmqwen.training.config import LORA_LAYERS, TrainingError, TrainSettings


def command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoint to write.")],
    model: Annotated[Path | None, typer.Option(help="Composite checkpoint to start from.")] = None,
    data: Annotated[Path | None, typer.Option(help="Dataset (see mmqwen.data).")] = None,
    stage: Annotated[str, typer.Option(help="projector, lora or full.")] = "projector",
    eval_data: Annotated[Path | None, typer.Option(help="Dataset for evaluation.")] = None,
    eval_share: Annotated[float, typer.Option(help="Or this share of --data.")] = 0.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps, instead of epochs.")] = -1,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples per device and forward pass.")] = 8,
    accumulation: Annotated[int, typer.Option(help="Forward passes per step.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.03,
    schedule: Annotated[str, typer.Option(help="Learning-rate schedule.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Clip gradients; 0 does not.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Order of samples, LoRA weights, dropout.")] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; default: once an epoch.")
    ] = None,
    keep: Annotated[int, typer.Option(help="Checkpoints kept, besides the best.")] = 2,
    log_steps: Annotated[int, typer.Option(help="Steps between log entries.")] = 10,
    max_length: Annotated[int | None, typer.Option(help="Most tokens, rows counted.")] = None,
    lora_rank: Annotated[int, typer.Option(help="Rank of LoRA.")] = 16,
    lora_alpha: Annotated[int, typer.Option(help="Alpha of LoRA.")] = 32,
    lora_dropout: Annotated[float, typer.Option(help="Dropout of LoRA.")] = 0.0,
    lora_layer: Annotated[
        list[str] | None, typer.Option(help=f"Layer that LoRA adapts; repeat. {LORA_LAYERS}")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge/--no-merge", help="Merge LoRA, or save OUTPUT/adapter.")
    ] = True,
    workers: Annotated[int, typer.Option(help="Processes that read data.")] = 0,
    fsdp: Annotated[str | None, typer.Option(help="FSDP options of transformers.")] = None,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Check the whole dataset first.")
    ] = True,
    cpu: Annotated[bool, typer.Option("--cpu", help="Train on the CPU.")] = False,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")
    ] = True,
    export: Annotated[
        Path | None, typer.Option(help="Only write --output from this checkpoint of a run.")
    ] = None,
) -> None:
    """Train projectors, and the language model if asked; write a checkpoint that vLLM serves."""
    from mmqwen.training.run import export as export_checkpoint
    from mmqwen.training.run import train

    if export is not None:
        path = export_checkpoint(export, output)
    else:
        if model is None or data is None:
            raise TrainingError("--model and --data are needed")
        settings = TrainSettings(
            model=str(model),
            data=str(data),
            output=str(output),
            stage=stage,
            eval_data=None if eval_data is None else str(eval_data),
            eval_share=eval_share,
            epochs=epochs,
            max_steps=max_steps,
            lr=lr,
            batch_size=batch_size,
            accumulation=accumulation,
            warmup=warmup,
            schedule=schedule,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            save_steps=save_steps,
            keep=keep,
            log_steps=log_steps,
            max_length=max_length,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_layers=tuple(lora_layer or LORA_LAYERS),
            merge=merge,
            workers=workers,
            fsdp=fsdp,
            validate=validate,
            cpu=cpu,
            progress=progress,
        )
        path = train(settings)
    Console().print(f"wrote [bold]{path}[/bold]", highlight=False)
