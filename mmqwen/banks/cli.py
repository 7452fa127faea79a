"""`mmqwen bank build` and `mmqwen bank check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from mmqwen.banks.file import Bank

app = typer.Typer(no_args_is_help=True, help="Tables of rows that requests name by id.")


@app.command()
def build(
    rows: Annotated[Path, typer.Argument(help=".npy, .safetensors, or a folder of such files.")],
    modality: Annotated[str, typer.Option(help="Whose rows they are.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")],
    keys: Annotated[
        Path | None, typer.Option(help="Names of the rows, one a line, for requests to use.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; left out, as it is.")
    ] = None,
) -> None:
    """Write a bank of a table of any size."""
    from mmqwen.banks.build import build_bank

    _show("wrote", build_bank(rows, output, modality=modality, keys=keys, dtype=dtype))


@app.command()
def check(bank: Annotated[Path, typer.Argument(help="File of a bank.")]) -> None:
    """Read a whole bank and compare it with what is stored beside it."""
    from mmqwen.banks.build import check_bank

    _show("checked", check_bank(bank))


def _show(done: str, bank: Bank) -> None:
    from mmqwen.banks.file import keys_file

    keys = "with" if keys_file(bank.file).exists() else "without"
    dtype = str(bank.dtype).removeprefix("torch.")
    Console().print(
        f"{done} {bank.file}: {bank.num_rows} rows of {bank.width} {dtype}, modality "
        f"{bank.modality}, {keys} keys, version {bank.version[:16]}",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
