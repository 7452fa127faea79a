"""`mmqwen extract`: a checkpoint's text model, or one of its projectors, by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    no_args_is_help=True, help="Take the text model, or a projector, out of a checkpoint."
)

_Checkpoint = Annotated[str, typer.Argument(help="Composite checkpoint: a folder or a hub id.")]


def _say(path: Path) -> None:
    Console().print(f"wrote [bold]{escape(str(path))}[/bold]", highlight=False, soft_wrap=True)


@app.command()
def text(
    checkpoint: _Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
) -> None:
    """A plain text model that vLLM and transformers load: `mmqwen extract text CKPT -o DIR`."""
    from mmqwen.checkpoint import extract_text

    _say(extract_text(checkpoint, output))


@app.command()
def projector(
    checkpoint: _Checkpoint,
    name: Annotated[str, typer.Argument(help="The modality.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, or an existing folder for it.")
    ],
) -> None:
    """One projector as a file of its own: `mmqwen extract projector CKPT m1 -o m1.safetensors`."""
    from mmqwen.checkpoint import extract_projector

    _say(extract_projector(checkpoint, name, output))
