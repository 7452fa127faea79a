"""The command line: `mmqwen build`, `train`, `eval`, `serve` and others."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from mmqwen._version import __version__
from mmqwen.banks.cli import app as bank_app
from mmqwen.commands.data import app as data_app
from mmqwen.commands.extract import app as extract_app
from mmqwen.commands.generate import command as generate_command
from mmqwen.commands.options import read_renames
from mmqwen.evaluation.cli import command as eval_command
from mmqwen.modalities import NAME_PATTERN, PROJECTOR_FIELDS, ModalityError, read_field
from mmqwen.training.cli import command as train_command

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a Qwen3-family LLM on prompts that mix text with arbitrary embeddings.",
)
EXTRAS = "pip install 'mmqwen[vllm]' (or [cpu], [train], [demo])"
_FLAG_FIELDS = {"hidden": "hidden_dim"} | dict.fromkeys(("max_rows", "token", *PROJECTOR_FIELDS))
"""What `--modality` takes beside the width, by the field's own name where it has another."""
PASS_THROUGH = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[  # `main` takes it out, wherever it stands
        bool, typer.Option("--debug", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """What stands before a command."""


def parse_modality_flag(text: str) -> tuple[str, dict[str, Any]]:
    """`m1=768`, `m1` or `m2=512:hidden=1024:activation=gelu:token=<|x|>` -> name and fields.

    Raises:
        ModalityError: the flag cannot be read.
    """
    head, *options = text.split(":")
    name, separator, width = head.partition("=")
    if not NAME_PATTERN.fullmatch(name) or (separator and not _is_number(width)):
        raise ModalityError(
            f"--modality {text!r}: expected NAME=WIDTH (NAME alone where a projector's file "
            "tells), optionally followed by " + "".join(f"[:{field}=...]" for field in _FLAG_FIELDS)
        )
    fields: dict[str, Any] = {"dim": int(width)} if separator else {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _FLAG_FIELDS or not value:
            raise ModalityError(
                f"--modality {text!r}: {option!r}, expected one of {list(_FLAG_FIELDS)}"
            )
        field = _FLAG_FIELDS[key] or key
        try:
            fields[field] = read_field(field, value)
        except ModalityError:
            kind = {"norm_eps": "a number", "bias": "true or false"}.get(key, "an integer")
            message = f"--modality {text!r}: {key} is {value!r}, expected {kind}"
            raise ModalityError(message) from None
    return name, fields


def _is_number(text: str) -> bool:
    """Digits that `int` reads; str.isdigit alone also takes superscripts."""
    return text.isascii() and text.isdigit()


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the checkpoint and the picture go.")
    ] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of the data split and the weights.")] = 0,
    play: Annotated[bool, typer.Option("--play", help="Then open the playground.")] = False,
) -> None:
    """Train a small model on real handwritten digits, serve it through vLLM, compare."""
    from mmqwen.demo.run import run  # the package attribute is the module, once imported

    status = run(output, seed=seed)
    if play and status == 0:
        from mmqwen.playground.run import run as run_playground

        status = run_playground(output / "checkpoint")
    raise typer.Exit(status)


@app.command()
def playground(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint that `mmqwen demo` has made.")
    ] = Path("demo-out/checkpoint"),
    url: Annotated[
        str | None, typer.Option(help="A server that runs already, as http://127.0.0.1:8000.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the page; 0 for any free one.")] = 8010,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
) -> None:
    """Draw a digit in a browser on this machine; see its rows, and the answer as it streams."""
    from mmqwen.playground.run import run

    raise typer.Exit(run(checkpoint, url=url, port=port, browser=browser))


@app.command()
def build(
    base: Annotated[
        str,
        typer.Option(help="Text model, or checkpoint whose modalities stay: a folder or a hub id."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    modality: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WIDTH[:hidden=N][:max_rows=N][:token=TEXT][:activation=relu|gelu|gelu_tanh|"
            "silu|none][:norm=none|layer|rms][:norm_eps=X][:bias=true|false][:layers=1|2]; repeat "
            "for more."
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Leave out a modality of --base; repeat for more."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Rename a modality of --base; repeat for more."),
    ] = None,
    projector: Annotated[
        list[str] | None,
        typer.Option(
            help="Trained projectors: FILE, NAME=FILE or NAME=FILE:OLD (safetensors, or a "
            "checkpoint's or a LLaVA model's folder); repeat for more."
        ),
    ] = None,
    bank: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE[:placement=device|projected|host][:modality=NAME]; repeat for more."
        ),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the base's shards.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of fresh projectors.")] = 0,
) -> None:
    """Join a text model and projectors into a checkpoint that vLLM serves, or change one."""
    from mmqwen.banks import parse_bank_flags
    from mmqwen.checkpoint import build_checkpoint

    modality = modality or []
    modalities = dict(parse_modality_flag(flag) for flag in modality)
    if len(modalities) != len(modality):
        raise ModalityError("--modality names the same modality twice")
    path = build_checkpoint(
        base,
        modalities,
        output,
        projector=projector or None,
        drop=drop or (),
        rename=read_renames(rename or []),
        banks=parse_bank_flags(bank or []),
        copy=copy,
        seed=seed,
    )
    Console().print(f"wrote [bold]{escape(str(path))}[/bold]", highlight=False, soft_wrap=True)


app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("generate")(generate_command)
app.add_typer(data_app, name="data")
app.add_typer(extract_app, name="extract")
app.add_typer(bank_app, name="bank")


@app.command(context_settings=PASS_THROUGH)
def serve(context: typer.Context) -> None:
    """Serve a checkpoint over vLLM's OpenAI API: `mmqwen serve CHECKPOINT \\[any vLLM flag]`."""
    from mmqwen.serve import main as run_server

    raise typer.Exit(run_server(context.args))


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Also check this checkpoint's files and projectors.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, which devices there are, and which backend is picked and why."""
    from mmqwen.doctor import render, report

    found = report(checkpoint)
    if as_json:
        Console().print_json(data=found)
    else:
        render(found, Console())
    if checkpoint is not None and found["checkpoint"]["problems"]:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _complain(kind: str, colour: str, message: object) -> None:
    """One line on stderr, as it is: brackets in a message are not markup."""
    line = " ".join(str(message).split())
    Console(stderr=True).print(
        f"[bold {colour}]{kind}:[/bold {colour}] {escape(line)}", highlight=False, soft_wrap=True
    )


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Show warnings that are meant for users as one line, without where in the code they arose."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UserWarning):
                _complain("warning", "yellow", message)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


def main(argv: list[str] | None = None) -> int:
    """Run the command line; user errors are one line on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        with _short_warnings():
            return int(app(arguments, standalone_mode=False) or 0)
    except (ValueError, OSError) as error:
        if debug:
            raise
        for problem in getattr(error, "problems", (error,)):  # of a dataset: each on its own line
            _complain("error", "red", problem)
        return 2
    except ModuleNotFoundError as error:
        if debug or (error.name or "mmqwen").startswith("mmqwen"):
            raise  # ours: a broken install, not a missing extra
        _complain("error", "red", f"{error}; install the extra that needs it: {EXTRAS}")
        return 2
    except typer.Abort:
        return 130
    except Exception as error:
        # typer carries its own copy of click, whose classes have no public home.
        if isinstance(error, RuntimeError) or not hasattr(error, "exit_code"):
            raise
        shown: Any = error
        shown.show()
        return int(shown.exit_code)


if __name__ == "__main__":
    sys.exit(main())
