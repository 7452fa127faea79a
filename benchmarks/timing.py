"""Times of a GPU's steps, and what a raw file says of the machine.

Three times of a step:

    device    between two events around it, after a read of 256 MB that empties L2 (a write would
              leave L2 full of lines to be written back: up to 10 us more for everyone) and while
              the stream is kept busy, so that launches are queued. Copies from the host into the
              stream are in it, those beside the stream are not.
    host      the call's time on the CPU, stream idle
    latency   from the call to the end of its work, stream idle: nothing is hidden
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
Call = Callable[[], object]


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    cut = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cut[1], "p50": statistics.median(samples), "p80": cut[7]}


def queued(
    steps: Sequence[Call], runs: int, cycles: int, before: Call = lambda: None
) -> tuple[list[float], int, int]:
    """Time steps on the GPU alone: queued behind a pause, so that none waits for Python.

    Where the pause was over before all were queued, it is doubled and the run taken again.

    Args:
        steps: run one after the other, each timed.
        runs: of all steps.
        cycles: the first pause.
        before: what comes before the pause.

    Returns:
        Milliseconds of each step of each run; runs that stalled; how many of those were kept, as
        the longest pause was too short for a step that synchronises.
    """
    longest = 64 * cycles
    found: list[float] = []
    stalls = kept = 0
    while len(found) < runs * len(steps):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
        before()
        torch.cuda._sleep(cycles)
        marks[0].record()
        for step, mark in zip(steps, marks[1:], strict=True):
            step()
            mark.record()
        stalled = marks[0].query()
        torch.cuda.synchronize()
        stalls += stalled
        if stalled and cycles < longest:
            cycles *= 2
            continue
        kept += stalled
        found += [a.elapsed_time(b) for a, b in pairwise(marks)]
    return found, stalls, kept


class Clock:
    """Times calls on the device and on the host, in us. On a CPU all three times are the host's."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        if self.cuda:
            self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
            self._sink = torch.empty((), dtype=torch.float32, device=device)

    def by_turns(
        self, calls: Mapping[str, Sequence[Call]], *, to_the_end: bool = False
    ) -> dict[str, dict[str, float]]:
        """Host time of each of the calls of each name, or until its work has ended.

        Names take turns, so that a slow spell of the machine falls on all of them.
        """
        found: dict[str, list[float]] = {name: [] for name in calls}
        for at in range(max(map(len, calls.values()))):
            for name, of in calls.items():
                if self.cuda:
                    if to_the_end:
                        self._empty_l2()
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                of[at % len(of)]()
                if self.cuda and to_the_end:
                    torch.cuda.synchronize()
                found[name].append((time.perf_counter() - begin) * 1e6)
        return {name: percentiles(of) for name, of in found.items()}

    def device(self, calls: Sequence[Call], host_us: float) -> dict[str, float]:
        """Device time of the calls; `host_us` is about what one takes the host."""
        if not self.cuda:
            return self.by_turns({"": calls})[""]
        # Long enough for the host to queue the step behind it; clock below 2.1 GHz assumed.
        cycles = int(2100 * (2 * host_us + 100))
        found, stalls, kept = [], 0, 0
        for call in calls:
            times, stalled, short = queued([call], 1, cycles, self._empty_l2)
            found += times
            stalls += stalled
            kept += short
        return {**percentiles([1e3 * ms for ms in found]), "stalls": stalls, "kept_stalled": kept}

    def _empty_l2(self) -> None:
        torch.sum(self._flush, dim=0, out=self._sink)


def measure_roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s of a large copy, FLOP/s of a large square product, us of launches; now.

    `launches_us`: two small kernels, the second dependent on the first, as the least that any way
    of two products takes; `nothing_us`: what a pair of events reads around nothing.
    """
    cuda = device != "cpu"
    elements = (1 << 30) if cuda else (1 << 22)
    side = 8192 if cuda else 256
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    small = torch.zeros(1 << 16, dtype=torch.float32, device=device)
    clock = Clock(device)

    def best(call: Call) -> float:
        for _ in range(3):
            call()
        return clock.device([call] * 10, 50.0)["p20"] * 1e-6

    return {
        "copy_bytes_per_s": 2 * elements / best(lambda: target.copy_(source)),
        "gemm_flops": 2 * side**3 / best(lambda: a @ b),
        "launches_us": best(lambda: small.add_(1).add_(1)) * 1e6,
        "nothing_us": best(lambda: None) * 1e6,
    }


def commit() -> str:
    """MMQWEN_COMMIT, for copies whose repository is another; else HEAD, "-dirty" if it differs."""
    if "MMQWEN_COMMIT" in os.environ:
        return os.environ["MMQWEN_COMMIT"]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()  # fmt: skip

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def about(device: str) -> dict[str, Any]:
    """The machine, the versions, the commit and the date, as raw files name them."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "gpu": torch.cuda.get_device_name() if device != "cpu" else "none",
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
