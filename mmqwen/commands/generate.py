"""`mmqwen generate`: one prompt, with rows from files."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from mmqwen.commands.options import (
    BankOption,
    DeviceOption,
    DtypeOption,
    EngineOptions,
    messages_of,
    quiet_engine,
    read_options,
    read_rows,
)


def command(
    checkpoint: Annotated[str, typer.Argument(help="Composite checkpoint: a folder or a hub id.")],
    prompt: Annotated[
        str, typer.Argument(help="The text, with one marker (<|NAME|>) an item; - reads stdin.")
    ],
    rows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="An item of a modality: a .npy file [d] or [rows, d], or "
            'NAME=FILE.safetensors[:TENSOR], or NAME={"bank": "items", "ids": [5, 17]}; repeat '
            "for more, in the order of the markers.",
        ),
    ] = None,
    bank: BankOption = None,
    chat: Annotated[bool, typer.Option("--chat", help="Through the chat template.")] = False,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print text, token ids, finish reason and log-probabilities."),
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    option: EngineOptions = None,
) -> None:
    """Continue one prompt: `mmqwen generate CKPT "What is <|m1|>?" --rows m1=rows.npy`."""
    options = read_options(option or [])
    items = read_rows(rows or [])
    text = sys.stdin.read() if prompt == "-" else prompt
    quiet_engine()
    from mmqwen.banks import parse_bank_flags
    from mmqwen.pipeline import MultimodalQwen3Pipeline

    asked: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    asked["return_full" if as_json else "stream"] = True
    with MultimodalQwen3Pipeline(
        checkpoint,
        device,
        engine=engine,  # type: ignore[arg-type]
        dtype=dtype,
        banks=parse_bank_flags(bank or []),
        **options,
    ) as pipeline:
        if chat:
            answer = pipeline.chat(messages_of(text, items, pipeline.specs), **asked)
        else:
            answer = pipeline.generate({"prompt": text, "multi_modal_data": items}, **asked)
        if as_json:
            (one,) = answer
            typer.echo(json.dumps(asdict(one), ensure_ascii=False))
            return
        for piece in answer:
            typer.echo(piece, nl=False)
        typer.echo()
