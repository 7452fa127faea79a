"""Host time of rows by reference, stage by stage, in one process: text, rows, rows by reference.

    python benchmarks/bench_references.py

The stages are bench_host.py's, and so is the way they are called; packs are kept where a server's
engine keeps them, so that a reference is sent without data. One message at a time, then the last
turn of conversations, whose earlier turns are given by reference. Kinds by turns. The table shows
the 20th percentile; the raw file has p20, p50 and p80.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import bench_host  # sets what vLLM reads from the environment
import torch
from bench_vllm_prefill import (
    TURNS,
    WORKLOADS,
    as_text,
    conversation,
    environment,
    make_requests,
    start,
    write_checkpoint,
)

from mmqwen.references import ChatRows
from mmqwen.vllm_plugin.compat import processor_cache
from mmqwen.vllm_plugin.engine_config import REFERENCES_SWITCH

KINDS = ("text", "rows", "references")


def measure(path: bench_host.HostPath, count: int, turns: int) -> dict[str, Any]:
    """Microseconds (p20, p50, p80) of each stage of each workload."""
    results: dict[str, Any] = {}
    for workload, (items, rows) in WORKLOADS.items():
        times: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
        made = make_requests(count * turns, items, rows, seed=3, markers=True)
        for at in range(count):
            prompt = conversation(made[turns * at : turns * (at + 1)])
            sent: ChatRows = prompt["multi_modal_data"]
            # A conversation's last message is new; a message alone is the one that was sent.
            known = range(max(turns - 1, 1))
            path.once(prompt, f"{workload}-sent-{at}")
            named = sent.by_reference({turn: sent.issued[turn] for turn in known})
            plain = {**prompt, "multi_modal_data": sent.by_reference({})}
            (text,) = as_text([prompt], seed=at)
            prompts = (text, plain, {**prompt, "multi_modal_data": named})
            for kind, asked in zip(KINDS, prompts, strict=True):
                spent = path.once(asked, f"{workload}-{kind}-{at}")
                if at >= count // 5:  # the first fifth warms up
                    times[kind].append(spent)
        results[workload] = {
            kind: {
                stage: [round(q, 1) for q in statistics.quantiles(column, n=10)[1::3]]
                for stage, column in zip(bench_host.STAGES, zip(*rows_, strict=True), strict=True)
            }
            for kind, rows_ in times.items()
        }
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="vllm_references")
    arguments = parser.parse_args()
    # An engine in this process would leave the packs in the front end.
    processor_cache.engine_half = lambda config: True
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), "tiny")
        llm = start(
            folder / "ours",
            enforce_eager=True,
            block_size=32,
            num_gpu_blocks_override=256,
            enable_prefix_caching=True,
            additional_config={REFERENCES_SWITCH: True},
        )
        torch._C.set_num_threads(1)  # see bench_host.py
        path = bench_host.HostPath(llm)
        found = {turns: measure(path, arguments.requests, turns) for turns in (1, TURNS)}
    record = {
        "environment": environment(), "requests": arguments.requests,
        "microseconds": {f"{turns} turns": results for turns, results in found.items()},
    }  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{'us':22}" + "".join(f"{stage:>9}" for stage in bench_host.STAGES) + "    total")
    for turns, results in record["microseconds"].items():
        for workload, kinds in results.items():
            for kind, stages in kinds.items():
                least = [quantiles[0] for quantiles in stages.values()]
                numbers = "".join(f"{number:9.1f}" for number in [*least, sum(least)])
                print(f"{turns:8}{workload:6}{kind:10}{numbers}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
