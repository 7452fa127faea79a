"""`mmqwen playground`: a model server if there is none, the page, and the browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import webbrowser
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from mmqwen.demo import digits
from mmqwen.playground.drawing import SAMPLES, rows_of
from mmqwen.playground.engine import Engine, EngineError, started
from mmqwen.playground.server import HOST, Playground

PORT = 8010


def run(
    checkpoint: str | os.PathLike[str] = "demo-out/checkpoint",
    *,
    url: str | None = None,
    port: int = PORT,
    browser: bool = True,
    console: Console | None = None,
) -> int:
    """Serve the playground until Ctrl-C or SIGTERM.

    Args:
        checkpoint: what `mmqwen demo` has made; not looked at where `url` is given.
        url: a model server that already runs with such a checkpoint.
        port: of the page; 0 for any free one.
        browser: open the page in the person's browser.
        console: where to print; the terminal unless given.

    Returns:
        The exit code.

    Raises:
        ValueError: there is no such checkpoint, or it reads other rows.
        OSError: the port is taken.
    """
    console = console or Console()
    if url is None:
        check_checkpoint(Path(checkpoint))
    try:
        with _signals(), ExitStack() as stack:
            if url is not None:
                return _play(Engine(url), None, port, browser, console)
            with console.status("Starting the model server ..."):
                entry = stack.enter_context(started(Path(checkpoint), _free_port()))
            return _play(*entry, port, browser, console)
    except EngineError as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 0


def check_checkpoint(folder: Path) -> None:
    """Refuse what cannot read the playground's rows.

    Raises:
        ValueError: there is no checkpoint, or its modalities are others than the demo's.
    """
    from mmqwen.checkpoint import read_config

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"there is no checkpoint at {folder}; `mmqwen demo` makes demo-out/checkpoint, or "
            "name another: `mmqwen playground CHECKPOINT`"
        )
    widths = {name: spec.dim for name, spec in read_config(folder).modality_specs.items()}
    expected = {name: fields["dim"] for name, fields in digits.MODALITIES.items()}
    if widths != expected:
        raise ValueError(
            f"{folder} reads rows of {widths}, expected {expected}: the playground sends "
            "handwritten digits; use a checkpoint that `mmqwen demo` has made"
        )


def _play(
    engine: Engine,
    process: subprocess.Popen[bytes] | None,
    port: int,
    browser: bool,
    console: Console,
) -> int:
    # The first request is slow, and shows whether the server reads such rows.
    list(engine.ask(rows_of([np.array(stroke) for stroke in SAMPLES["3"]])))

    def watch() -> None:
        if process is not None and process.poll() is not None:
            raise EngineError(f"the model server has ended (exit status {process.poll()})")

    with Playground(engine, port, watch) as server:
        console.print(f"The playground is at [bold]{server.url}[/]; Ctrl-C ends it.")
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()
    return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process as Ctrl-C does, so that the model server ends with it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
