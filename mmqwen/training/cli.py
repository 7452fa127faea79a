"""`mmqwen train`: the fields of `TrainSettings` as options."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from mmqwen.training.config import TrainingError, TrainSettings

_SHORT = {"output": "-o"}


def _run(export: Path | None, given: dict[str, Any]) -> None:
    from mmqwen.training.run import export as export_checkpoint
    from mmqwen.training.run import train

    if given["output"] is None:
        raise TrainingError("--output is needed")
    if export is not None:
        path = export_checkpoint(export, given["output"])
    else:
        if given["model"] is None or given["data"] is None:
            raise TrainingError("--model and --data are needed")
        path = train(TrainSettings(**given))
    Console().print(f"wrote [bold]{path}[/bold]", highlight=False)


def _options() -> list[inspect.Parameter]:
    """An option for each setting, as typer reads them from a signature."""
    hints = get_type_hints(TrainSettings)
    found = []
    for own in fields(TrainSettings):
        needed = own.default is MISSING
        kind = {tuple[str, ...]: list[str]}.get(hints[own.name], hints[own.name])
        name = own.metadata["flag"] or f"--{own.name.replace('_', '-')}"
        if kind is bool or kind == bool | None:
            # A switch that is off by default has no opposite to name.
            name += f"/--no-{name[2:]}" if own.default is not False else ""
        names = [name, *filter(None, [_SHORT.get(own.name)])]
        option = typer.Option(*names, help=own.metadata["help"])
        default = None if needed else own.default
        found.append(
            inspect.Parameter(
                own.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=list(default) if isinstance(default, tuple) else default,
                annotation=Annotated[kind | None if needed else kind, option],
            )
        )
    export = typer.Option(help="Only write --output from this checkpoint of a run.")
    return [
        *found,
        inspect.Parameter(
            "export",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, export],
        ),
    ]


def command(**options: Any) -> None:
    """Train projectors, and the language model if asked; write a checkpoint that vLLM serves."""
    _run(options.pop("export"), options)


command.__signature__ = inspect.Signature(_options())  # type: ignore[attr-defined]
