"""`mmqwen eval`: `evaluate` with its arguments as options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmqwen.commands.options import (
    BankOption,
    DeviceOption,
    DtypeOption,
    EngineOptions,
    quiet_engine,
    read_options,
)

_CONTROLS = "rows,shuffled,none"


def command(
    checkpoint: Annotated[str, typer.Argument(help="Composite checkpoint: a folder or a hub id.")],
    data: Annotated[Path, typer.Argument(help="Dataset, as `mmqwen train` reads it.")],
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    choices: Annotated[
        str | None,
        typer.Option(
            help="Choose among texts instead of generating: A,B,C for every sample, or 'dataset' "
            "for each sample's own field `choices`.",
            metavar="A,B,C|dataset",
        ),
    ] = None,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Choose by the mean of a choice's tokens.")
    ] = False,
    controls: Annotated[str, typer.Option(help="Which prompts are asked.")] = _CONTROLS,
    limit: Annotated[int | None, typer.Option(help="Most samples, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of which rows go to which sample.")] = 0,
    max_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of an answer; the longest one's by default.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all of it as JSON.")
    ] = None,
    bank: BankOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    option: EngineOptions = None,
    progress: Annotated[bool, typer.Option(help="Show a bar.")] = True,
) -> None:
    """Accuracy and perplexity of a dataset's answers: with rows, with rows shuffled, without.

    `mmqwen eval CKPT DATA`; `mmqwen eval CKPT DATA --choices cat,dog --json figures.json`
    """
    options = read_options(option or [])
    if json_file is not None and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: there is no folder {json_file.parent}")
    quiet_engine()
    from mmqwen.banks import parse_bank_flags
    from mmqwen.evaluation import evaluate

    own = choices == "dataset"
    report = evaluate(
        checkpoint,
        data,
        engine=engine,  # type: ignore[arg-type]
        choices=choices if own or choices is None else [c.strip() for c in choices.split(",")],
        per_token=per_token,
        controls=[control.strip() for control in controls.split(",")],
        limit=limit,
        seed=seed,
        max_tokens=max_tokens,
        progress=progress,
        banks=parse_bank_flags(bank or []),
        device=device,
        dtype=dtype,
        **options,
    )
    Console().print(report.table())
    if json_file is not None:
        report.write(json_file)
