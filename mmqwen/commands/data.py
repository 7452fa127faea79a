"""`mmqwen data`: datasets made of a folder of .npy files, checked, and looked at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mmqwen.commands.options import read_widths
from mmqwen.modalities import ModalityError, ModalitySpec

app = typer.Typer(no_args_is_help=True, help="Make, check and look at datasets.")

_Modality = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=WIDTH", help="A modality; repeat for more. Or give --model."),
]
_Model = Annotated[
    Path | None, typer.Option(metavar="CHECKPOINT", help="Whose modalities and tokenizer count.")
]


def _read_specs(modality: list[str] | None, model: Path | None) -> Mapping[str, ModalitySpec]:
    if bool(modality) == (model is not None):
        raise ModalityError("give either --model CHECKPOINT, or --modality NAME=WIDTH of each")
    if model is None:
        return read_widths(modality or [])
    from mmqwen.checkpoint import read_config

    return read_config(model).modality_specs


def _read_tokenizer(model: Path | None, specs: Mapping[str, ModalitySpec]) -> Any:
    if model is None:
        return None
    from transformers import AutoTokenizer

    from mmqwen.tokens import add_placeholder_tokens

    tokenizer = AutoTokenizer.from_pretrained(model)
    add_placeholder_tokens(tokenizer, specs)
    return tokenizer


def _say(text: str) -> None:
    Console().print(escape(text), highlight=False, soft_wrap=True)


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="Holds samples.jsonl and the files it names.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    modality: _Modality = None,
    model: _Model = None,
    dtype: Annotated[str, typer.Option(help="Of the stored rows: float32, float16, bfloat16.")] = (
        "float32"
    ),
) -> None:
    """Make a dataset of samples.jsonl and .npy files; a line names files where items go.

    {"prompt": "<|m1|> is", "answer": " a cat", "items": {"m1": ["cats/0001.npy"]}}
    """
    from mmqwen.modalities import ROW_DTYPES

    if dtype not in ROW_DTYPES:
        raise ValueError(f"--dtype {dtype!r}, expected one of {list(ROW_DTYPES)}")
    import torch

    from mmqwen.data import from_npy_folder

    specs = _read_specs(modality, model)
    path = from_npy_folder(folder, output, specs, dtype=getattr(torch, dtype))
    _say(f"wrote {path}")


@app.command()
def validate(
    data: Annotated[Path, typer.Argument(help="Dataset: a folder.")],
    modality: _Modality = None,
    model: _Model = None,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of a sample, rows counted; needs --model.")
    ] = None,
    problems: Annotated[int, typer.Option(help="Most problems to report.")] = 20,
) -> None:
    """Check all of a dataset, as `mmqwen train` does first: each problem on a line of its own."""
    specs = _read_specs(modality, model)
    if max_length is not None and model is None:
        raise ValueError("--max-length counts tokens; give --model CHECKPOINT")
    from mmqwen.data import validate as check

    tokenizer = _read_tokenizer(model, specs)
    found = check(data, specs, tokenizer=tokenizer, max_length=max_length, limit=problems)
    rows = "".join(f", {count} rows of {name}" for name, count in found.rows.items())
    longest = f", the longest of {found.longest} tokens" if found.longest else ""
    _say(f"{data}: {found.samples} samples{longest}{rows}: no problem found")


@app.command()
def show(
    data: Annotated[Path, typer.Argument(help="Dataset: a folder.")],
    samples: Annotated[int, typer.Option(help="How many samples.")] = 3,
    line: Annotated[int, typer.Option(help="The first one's line, from 1.")] = 1,
) -> None:
    """What a dataset holds, and some samples: texts, shapes, means and spreads of rows."""
    from mmqwen.data import DatasetError, RowsDataset

    dataset = RowsDataset(data)
    _say(f"{dataset.folder}: {len(dataset)} samples")
    for file in sorted(dataset.folder.glob("rows-*.safetensors")):
        store = dataset.store(file.stem.removeprefix("rows-"))
        kind = str(store.dtype).removeprefix("torch.")
        _say(f"{file.name}: {store.num_items} items, {store.num_rows} rows of {store.dim} {kind}")
    if not 1 <= line <= len(dataset):
        raise DatasetError(f"{dataset.folder}: there is no line {line}, only 1 to {len(dataset)}")
    for index in range(line - 1, min(line - 1 + samples, len(dataset))):
        example = dataset[index]
        sample = example.sample
        _say(f"\n{example.where}")
        if sample.prompt is not None:
            _say(f"  prompt: {sample.prompt!r}\n  answer: {sample.answer!r}")
        for message in sample.messages:
            _say(f"  {message['role']}: {message['content']!r}")
        if sample.choices:
            _say(f"  choices: {list(sample.choices)}")
        for name, items in example.rows.items():
            for number, item in zip(sample.items[name], items, strict=True):
                values = item.double()
                _say(
                    f"  {name} item {number}: {list(item.shape)}, mean {values.mean():.3g}, "
                    f"spread {values.std(correction=0):.3g}"
                )
