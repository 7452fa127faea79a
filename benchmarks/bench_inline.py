"""Packing on the server's event loop against packing in vLLM's thread, by size, in one process.

    python benchmarks/bench_inline.py

Prompts are rendered as the server renders them, 1, 16 and 64 at a time, the two ways by turns. CPU
time of the process is what other work on the machine disturbs least; what a prompt takes inline is
the time for which the event loop answers nobody else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_host  # noqa: F401 - sets what vLLM reads from the environment
import torch
from bench_vllm_prefill import WIDTHS, environment, start, write_checkpoint

from mmqwen.vllm_plugin import renderer as ours

SIZES = {"8 rows": 8, "64 rows": 64, "256 rows": 256, "768 rows": 768}
CONCURRENCY = (1, 16, 64)
LIMITS = {"thread": -1, "inline": 2**40}


def prompts(rows: int, count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 8 items (fewer where rows are fewer) of one width."""
    generator = torch.Generator().manual_seed(seed)
    name, width = next(iter(WIDTHS.items()))
    each = max(1, rows // 8)
    return [
        {
            "prompt_token_ids": torch.randint(1, 200, (64,), generator=generator).tolist(),
            "multi_modal_data": {
                name: [torch.randn(each, width, generator=generator) for _ in range(rows // each)]
            },
        }
        for _ in range(count)
    ]


async def render(renderer: Any, asked: list[dict[str, Any]], at_once: int) -> dict[str, float]:
    """Microseconds of wall and CPU time a prompt."""
    gate = asyncio.Semaphore(at_once)

    async def one(prompt: dict[str, Any]) -> None:
        async with gate:
            await renderer.render_cmpl_async([prompt])

    wall, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*map(one, asked))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    scale = 1e6 / len(asked)
    return {"wall_us": wall * scale, "cpu_us": cpu * scale}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="render_inline")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_checkpoint(Path(scratch), "tiny")
        llm = start(folder / "ours", enforce_eager=True, block_size=32, num_gpu_blocks_override=256)
        torch._C.set_num_threads(1)  # see bench_host.py
        renderer = llm.llm_engine.renderer
        found: dict[str, Any] = {}
        for size, rows in SIZES.items():
            for at_once in CONCURRENCY:
                kept: dict[str, list[dict[str, float]]] = {way: [] for way in LIMITS}
                for repeat in range(arguments.repeats + 1):
                    asked = prompts(rows, max(16, arguments.requests * 64 // max(64, rows)), repeat)
                    for way, limit in LIMITS.items():
                        ours.RENDER_INLINE = limit
                        result = asyncio.run(render(renderer, asked, at_once))
                        if repeat:  # the first warms up
                            kept[way].append(result)
                found[f"{size}, {at_once} at once"] = kept
    record = {"environment": environment(), "width": next(iter(WIDTHS.values())), "results": found}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for where, ways in found.items():
        for way, results in ways.items():
            medians = {key: statistics.median(r[key] for r in results) for key in results[0]}
            print(f"{where:24}{way:8}" + "".join(f"{k:>12} {v:8.1f}" for k, v in medians.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
