"""Measure the fusion on this machine's GPU against measured roofs, and write the raw figures.

    python benchmarks/bench_kernels.py                     the grid of docs/kernels.md
    python benchmarks/bench_kernels.py --quick             a few points, a minute
    python benchmarks/bench_kernels.py --sweep             launch configurations, for ours alone
    python benchmarks/bench_kernels.py --device cpu --quick --size 64   a smoke test

Every point is checked against float64 before it is timed. Three times, medians:

    device    between two events around one step, after a read of 256 MB that empties L2 (a write
              would leave L2 full of lines to be written back: up to 10 us more for everyone) and
              while the stream is kept busy, so that launches are queued. Copies of peers stand in
              the stream; ours runs beside one that is busy.
    host      the call's time on the CPU, stream idle, providers by turns
    latency   from the call to the end of its work, stream idle: nothing is hidden; by turns

"ours_planned" is ours with the plan made beforehand: the kernels alone. "ours_packed" begins with
rows in host memory, as an engine has them, and has no peer here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]

from providers import (  # noqa: E402
    PEERS,
    PROVIDERS,
    Step,
    Workload,
    gate,
    make_workload,
    prepare_planned,
    why_not,
)

from mmqwen_kernels.launch import LaunchConfig, TileConfig, choose_config  # noqa: E402

SIZES = (1024, 2560, 4096)
MODALITIES = (1, 2, 4)
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK_ROWS = (1, 64, 1024)
FLUSH_BYTES = 256 << 20


def percentiles(samples: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(samples, n=10, method="inclusive")
    return {"p20": cut[1], "p50": statistics.median(samples), "p80": cut[7]}


def queued(
    steps: Sequence[Step], runs: int, cycles: int, before: Step = lambda: None
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
    """Times a step on the device and on the host, in us."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        if self.cuda:
            self._flush = torch.ones(FLUSH_BYTES // 4, dtype=torch.float32, device=device)
            self._sink = torch.empty((), dtype=torch.float32, device=device)

    def host(self, step: Step, samples: int) -> dict[str, float]:
        return self.by_turns({"": step}, samples)[""]

    def by_turns(
        self, steps: dict[str, Step], samples: int, *, to_the_end: bool = False
    ) -> dict[str, dict[str, float]]:
        """Host time of each step's call, or until its work has ended; the stream is idle before.

        The steps take turns, so that a slow spell of the machine falls on all of them.
        """
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(samples):
            for name, step in steps.items():
                if self.cuda:
                    if to_the_end:
                        self._empty_l2()
                    torch.cuda.synchronize()
                begin = time.perf_counter()
                step()
                if self.cuda and to_the_end:
                    torch.cuda.synchronize()
                found[name].append((time.perf_counter() - begin) * 1e6)
        return {name: percentiles(of) for name, of in found.items()}

    def device(self, step: Step, samples: int, host_us: float) -> dict[str, float]:
        if not self.cuda:
            return self.host(step, samples)
        # Long enough for the host to queue the step behind it; clock below 2.1 GHz assumed.
        cycles = int(2100 * (2 * host_us + 100))
        found, stalls, kept = queued([step], samples, cycles, self._empty_l2)
        return {
            **percentiles([1e3 * ms for ms in found]),
            "stalls": stalls,
            "kept_stalled": kept,
        }

    def _empty_l2(self) -> None:
        torch.sum(self._flush, dim=0, out=self._sink)


def measure_roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s of a large copy, FLOP/s of a large square product, us read around nothing; now."""
    cuda = device != "cpu"
    elements = (1 << 30) if cuda else (1 << 22)
    side = 8192 if cuda else 256
    source = torch.zeros(elements, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)

    def best(step: Step) -> float:
        for _ in range(3):
            step()
        return clock.device(step, 10, 50.0)["p20"] * 1e-6

    return {
        "copy_bytes_per_s": 2 * elements / best(lambda: target.copy_(source)),
        "gemm_flops": 2 * side**3 / best(lambda: a @ b),
        "nothing_us": best(lambda: None) * 1e6,
    }


def commit() -> str:
    """MMQWEN_COMMIT, for copies whose repository is another; else HEAD, "-dirty" if it differs."""
    if "MMQWEN_COMMIT" in os.environ:
        return os.environ["MMQWEN_COMMIT"]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, cwd=HERE
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if dirty else "")


def about(device: str) -> dict[str, Any]:
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


def floor_us(work: Workload, roofs: dict[str, float]) -> float:
    """The least time of a step: bytes over the copy's speed or FLOPs over the product's."""
    return 1e6 * max(
        work.bytes_moved() / roofs["copy_bytes_per_s"], work.flops() / roofs["gemm_flops"]
    )


def measure_point(
    work: Workload, names: list[str], clock: Clock, roofs: dict[str, float], samples: int
) -> dict[str, Any]:
    runnable = [name for name in names if why_not(name, work.device, work.dtype, work.rows) is None]
    errors = gate(work, runnable)
    floor = floor_us(work, roofs)
    steps = {name: PROVIDERS[name](work) for name in runnable}
    for step in steps.values():
        for _ in range(5):
            step()
    host = clock.by_turns(steps, samples)
    latency = clock.by_turns(steps, samples, to_the_end=True)
    found: dict[str, Any] = {}
    for name, step in steps.items():
        device = clock.device(step, samples, host[name]["p50"])
        found[name] = {
            "device_us": device,
            "host_us": host[name],
            "latency_us": latency[name],
            "error": errors[name],
            "share_of_floor": floor / device["p50"],
        }
    return {
        "size": work.size,
        "modalities": work.modalities,
        "rows": work.rows,
        "text": work.text,
        "items": len(work.items),
        "bytes": work.bytes_moved(),
        "flops": work.flops(),
        "floor_us": floor,
        "providers": found,
    }


def line_of(point: dict[str, Any]) -> str:
    found = point["providers"]
    peers = {n: found[n]["device_us"]["p50"] for n in PEERS if n in found}
    cells = [f"{point['size']:5d} {point['modalities']:2d} {point['rows']:5d}"]
    cells.append(f"floor {point['floor_us']:7.1f}")
    cells += [
        f"{n} {f['device_us']['p50']:.1f}/{f['host_us']['p50']:.0f}/{f['latency_us']['p50']:.0f}"
        for n, f in found.items()
    ]
    if "ours" in found and peers:
        ours = found["ours"]["device_us"]["p50"]
        best = min(peers, key=peers.__getitem__)
        cells.append(f"ours/best({best}) {ours / peers[best]:.2f}")
        cells.append(f"ours/floor {ours / point['floor_us']:.2f}")
    return "  ".join(cells)


def candidates(rows: int) -> list[TileConfig]:
    """Tiles worth a try for `rows` rows a modality, around the ones that `launch` has."""
    if rows <= 32:
        r = 16 if rows <= 16 else 32
        ring = [(64, 64, 4, 8), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 4, 8)]
        ring += [(64, 256, 4, 3), (64, 256, 4, 4), (64, 256, 8, 4), (128, 128, 8, 4)]
        return [TileConfig(r, n, k, w, s, swap=True) for n, k, w, s in ring]
    middle = [(64, 32, 128, 4, 6), (64, 32, 256, 4, 4), (64, 64, 64, 4, 8), (64, 64, 128, 4, 4)]
    middle += [(64, 64, 128, 4, 6), (64, 128, 64, 4, 4), (64, 128, 128, 4, 4)]
    wide = [(128, 64, 64, 4, 6), (128, 64, 128, 4, 4), (128, 64, 128, 8, 4)]
    large = [(128, 128, 64, 4, 3, 8), (128, 128, 64, 4, 4, 8), (128, 128, 64, 8, 4, 8)]
    large += [(128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 4, 16)]
    large += [(256, 128, 64, 8, 4, 8), (64, 256, 64, 4, 4, 8), (64, 256, 64, 8, 4, 8)]
    found = [TileConfig(*t) for t in (middle if rows <= 128 else [])]
    found += [TileConfig(*t) for t in (wide if rows > 64 else [])]
    return found + [TileConfig(*t) for t in large if rows > 128]


def variations(base: LaunchConfig, rows: int) -> Iterator[tuple[str, LaunchConfig]]:
    """The chosen configuration and others, one part changed at a time."""
    yield "chosen", base
    yield "dependent flipped", replace(base, dependent=not base.dependent)
    for tile in candidates(rows):
        name = f"{tile.block_r}x{tile.block_n}x{tile.block_k} {tile.num_warps} warps "
        name += f"{tile.num_stages} stages groups of {tile.group_r}"
        if tile != base.up:
            yield f"up {name}", replace(base, up=tile)
        if tile != base.down:
            yield f"down {name}", replace(base, down=tile)
    for block_t in (4, 16):
        yield f"text tiles of {block_t}", replace(base, block_t=block_t)


def sweep(work: Workload, clock: Clock, roofs: dict[str, float], samples: int) -> dict[str, Any]:
    """Device time of ours, plan made beforehand, in many configurations."""
    from mmqwen_kernels.triton_backend import triton_backend

    backend = triton_backend(torch.device(work.device))
    base = choose_config(
        work.counts,
        [p.w1.shape[1] for p in work.projectors],
        [work.size] * work.modalities,
        work.size,
        work.dtype,
        backend.capability,
        backend.num_sms,
    )
    want = PROVIDERS["D"](work)().clone()
    tried: list[dict[str, Any]] = []
    for label, config in variations(base, max(work.counts)):
        step = prepare_planned(work, launch=config)
        try:
            work.buffer.fill_(float("nan"))
            got = step()
            error = ((got - want).norm() / want.norm()).item()
            if not error < 0.02:
                raise ValueError(f"wrong: {error:.2e}")
            for _ in range(3):
                step()
            us = clock.device(step, samples, clock.host(step, 5)["p50"])
        except Exception as problem:  # a configuration that cannot run is a result too
            tried.append({"label": label, "problem": f"{type(problem).__name__}: {problem}"[:200]})
            continue
        tried.append({"label": label, "device_us": us, "config": asdict(config)})
    ran = sorted((t for t in tried if "device_us" in t), key=lambda t: t["device_us"]["p50"])
    for t in ran[:5]:
        print(f"    {t['device_us']['p50']:7.1f}  {t['label']}", flush=True)
    return {
        "size": work.size,
        "modalities": work.modalities,
        "rows": work.rows,
        "floor_us": floor_us(work, roofs),
        "tried": tried,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few rows, few samples")
    parser.add_argument("--sweep", action="store_true", help="launch configurations of ours")
    parser.add_argument("--size", type=int, action="append", help="D = H; may be repeated")
    parser.add_argument("--modalities", type=int, action="append", choices=MODALITIES)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--providers", default="B,C,D,E,ours,ours_planned,ours_packed")
    parser.add_argument("--compile-at", default="1:64,1:1024,4:64", help="modalities:rows of C")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many; 0: never")
    parser.add_argument("--samples", type=int, default=0, help="0: 30, or 5 with --quick")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", help="of the file in it")
    args = parser.parse_args()
    cuda = args.device != "cpu"
    dtype = torch.bfloat16 if cuda else torch.float32
    samples = args.samples or (5 if args.quick else 30)
    sizes = args.size or (SIZES if cuda else (64,))
    rows_list = args.rows or (QUICK_ROWS if args.quick else ROWS)
    names = args.providers.split(",")
    unknown = set(names) - set(PROVIDERS)
    if unknown:
        parser.error(f"unknown providers {sorted(unknown)}, expected some of {list(PROVIDERS)}")
    if not cuda:
        names = [n for n in names if n in ("A", "B", "D")] + ["ours_torch"]

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report: dict[str, Any] = about(args.device)
    report["dtype"] = str(dtype)
    report["roofs"] = roofs = measure_roofs(args.device, dtype)
    print(
        f"{report['gpu']}  torch {report['torch']}  triton {report['triton']}  "
        f"copy {roofs['copy_bytes_per_s'] / 1e12:.2f} TB/s  "
        f"product {roofs['gemm_flops'] / 1e12:.1f} TFLOP/s",
        flush=True,
    )
    print("    D  M     R  (device / host / latency, us, medians)", flush=True)
    points: list[dict[str, Any]] = []
    report["sweeps" if args.sweep else "points"] = points
    clock = Clock(args.device)
    if cuda and not args.sweep:  # thrown away: what is measured first is slower, by 1 us of 22
        work = make_workload(sizes[0], 1, rows_list[0], dtype=dtype, device=args.device)
        measure_point(work, [n for n in names if n != "C"], clock, roofs, samples)
    slug = (report["gpu"] if cuda else "cpu").lower().replace(" ", "-")
    kind = "sweep" if args.sweep else "kernels"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / (args.name or f"{kind}-{slug}-{report['date'][:10]}.json")
    # torch.compile takes seconds for each shape: at a few points.
    compiled = {tuple(map(int, at.split(":"))) for at in args.compile_at.split(",") if at}
    begin = time.monotonic()
    for size in sizes:
        for modalities in args.modalities or MODALITIES:
            for rows in rows_list:
                if rows < modalities:
                    continue
                if args.seconds and time.monotonic() - begin > args.seconds:
                    print(f"stopped after {args.seconds:.0f} s: later points were not measured")
                    return 0
                here = [n for n in names if n != "C" or (modalities, rows) in compiled]
                work = make_workload(size, modalities, rows, dtype=dtype, device=args.device)
                if args.sweep:
                    print(f"{size:5d} {modalities:2d} {rows:5d}", flush=True)
                    points.append(sweep(work, clock, roofs, samples))
                else:
                    points.append(measure_point(work, here, clock, roofs, samples))
                    print(line_of(points[-1]), flush=True)
                # After every point: a run that is cut off leaves what it has.
                path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
