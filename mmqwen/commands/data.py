"""`mmqwen data`: datasets made of a folder of .npy files, checked, and looked at."""

from __future__ import annotations

import json
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


_Banks = Annotated[
    list[str] | None,
    typer.Option("--bank", metavar="NAME=FILE", help="Rows that samples may name; repeat."),
]


def _read_banks(bank: list[str] | None, model: Path | None) -> Mapping[str, Any]:
    from mmqwen.banks import parse_bank_flags, parse_banks

    given = parse_bank_flags(bank or [])
    if model is None:
        return parse_banks(given)
    from mmqwen.checkpoint import read_config
    from mmqwen.data.banks import served_banks

    return served_banks(read_config(model), model, given)


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
    bank: _Banks = None,
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
    banks = _read_banks(bank, model)
    found = check(
        data, specs, tokenizer=tokenizer, max_length=max_length, limit=problems, banks=banks
    )
    rows = "".join(f", {count} rows of {name}" for name, count in found.rows.items())
    longest = f", the longest of {found.longest} tokens" if found.longest else ""
    _say(f"{data}: {found.samples} samples{longest}{rows}: no problem found")


@app.command()
def show(
    data: Annotated[Path, typer.Argument(help="Dataset: a folder.")],
    samples: Annotated[int, typer.Option(help="How many samples.")] = 3,
    line: Annotated[int, typer.Option(help="The first one's line, from 1.")] = 1,
    modality: _Modality = None,
    model: _Model = None,
    bank: _Banks = None,
) -> None:
    """What a dataset holds, and some samples: texts, shapes, means and spreads of rows.

    Rows of a bank are read with --model, or --modality and --bank; without, only their names shown.
    """
    from mmqwen.data import DatasetError, RowsDataset
    from mmqwen.data.banks import BankItem

    specs = _read_specs(modality, model) if modality or model else {}
    dataset = RowsDataset(data, specs, _read_banks(bank, model))
    _say(f"{dataset.folder}: {len(dataset)} samples")
    for file in sorted(dataset.folder.glob("rows-*.safetensors")):
        store = dataset.store(file.stem.removeprefix("rows-"))
        kind = str(store.dtype).removeprefix("torch.")
        _say(f"{file.name}: {store.num_items} items, {store.num_rows} rows of {store.dim} {kind}")
    if not 1 <= line <= len(dataset):
        raise DatasetError(f"{dataset.folder}: there is no line {line}, only 1 to {len(dataset)}")
    for index in range(line - 1, min(line - 1 + samples, len(dataset))):
        sample = dataset.sample(index)
        _say(f"\n{dataset.where(index)}")
        if sample.prompt is not None:
            _say(f"  prompt: {sample.prompt!r}\n  answer: {sample.answer!r}")
        for message in sample.messages:
            _say(f"  {message['role']}: {message['content']!r}")
        if sample.choices:
            _say(f"  choices: {list(sample.choices)}")
        for name, items in sample.items.items():
            for at, item in enumerate(items):
                named = isinstance(item, BankItem)
                title = f"  {name} item {json.dumps(item.to_dict()) if named else item}"
                if named and not specs:
                    _say(title)
                    continue
                try:
                    values = dataset.rows(name, item, at).double()
                except (ValueError, IndexError) as error:
                    raise DatasetError(f"{dataset.where(index)}: {error}") from None
                _say(
                    f"{title}: {list(values.shape)}, mean {values.mean():.3g}, "
                    f"spread {values.std(correction=0):.3g}"
                )
