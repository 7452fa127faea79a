"""Measure the fusion on this machine's GPU against measured roofs, and write the raw figures.

    python benchmarks/bench_kernels.py                     the grid of docs/kernels.md
    python benchmarks/bench_kernels.py --quick             a few points, a minute
    python benchmarks/bench_kernels.py --sweep             launch configurations, for ours alone
    python benchmarks/bench_kernels.py --device cpu --quick --size 64   a smoke test

Every point is checked against float64 before it is timed. Device time is the median between two
events around one step, after a 256 MB write that empties L2 and while the stream is kept busy, so
that launches are queued; with ours the row table's copy is inside. Host time is the same call's
time on the CPU, stream idle.
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
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
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
    prepare_ours,
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


class Clock:
    """Times a step on the device and on the host, in us."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        if self.cuda:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def host(self, step: Step, samples: int) -> dict[str, float]:
        found = []
        for _ in range(samples):
            if self.cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            step()
            found.append((time.perf_counter() - begin) * 1e6)
        return percentiles(found)

    def device(self, step: Step, samples: int, host_us: float) -> dict[str, float]:
        if not self.cuda:
            return self.host(step, samples)
        # Long enough for the host to queue the step behind it; clock below 2.1 GHz assumed.
        cycles = int(2100 * (2 * host_us + 100))
        found = []
        for _ in range(samples):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end) * 1e3)
        return percentiles(found)


def measure_roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s of a large copy and FLOP/s of a large square product, on this machine, now."""
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
    }


def commit() -> str:
    """HEAD, with "-dirty" where the tree differs; MMQWEN_COMMIT where there is no repository."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=HERE
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, cwd=HERE
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MMQWEN_COMMIT", "unknown")
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
    runnable = [name for name in names if why_not(name, work) is None]
    errors = gate(work, runnable)
    floor = floor_us(work, roofs)
    found: dict[str, Any] = {}
    for name in runnable:
        step = PROVIDERS[name](work)
        for _ in range(5):
            step()
        host = clock.host(step, samples)
        device = clock.device(step, samples, host["p50"])
        found[name] = {
            "device_us": device,
            "host_us": host,
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
        f"{n} {f['device_us']['p50']:7.1f}/{f['host_us']['p50']:6.0f}" for n, f in found.items()
    ]
    if "ours" in found and peers:
        ours = found["ours"]["device_us"]["p50"]
        best = min(peers, key=peers.__getitem__)
        cells.append(f"ours/best({best}) {ours / peers[best]:.2f}")
        cells.append(f"ours/floor {ours / point['floor_us']:.2f}")
    return "  ".join(cells)


def variations(base: LaunchConfig, rows: int) -> Iterator[tuple[str, LaunchConfig]]:
    """Configurations worth a try around the chosen one; the first session on a GPU starts here."""
    yield "chosen", base
    yield "dependent flipped", replace(base, dependent=not base.dependent)
    for stages in (2, 3, 4, 5, 6):
        if stages != base.up.num_stages:
            yield f"up {stages} stages", replace(base, up=replace(base.up, num_stages=stages))
        if stages != base.down.num_stages:
            yield f"down {stages} stages", replace(base, down=replace(base.down, num_stages=stages))
    if rows <= 32:
        for programs in (32, 68, 132):
            yield f"prefetch by {programs}", replace(base, prefetch_programs=programs)
        for block_n in (32, 128):
            yield f"up {block_n} units", replace(base, up=replace(base.up, block_n=block_n))
            yield f"down {block_n} columns", replace(base, down=replace(base.down, block_n=block_n))
        for block_k in (64, 128, 256):
            yield f"down K {block_k}", replace(base, down=replace(base.down, block_k=block_k))
    else:
        for r, n, warps, stages in (
            (64, 64, 4, 4),
            (64, 128, 4, 4),
            (64, 256, 8, 3),
            (128, 64, 4, 4),
            (128, 128, 4, 3),
            (128, 128, 8, 4),
            (128, 256, 8, 4),
        ):
            tile = TileConfig(r, n, 64, warps, stages, group_r=8)
            yield f"up {r}x{n}", replace(base, up=tile)
            yield f"down {r}x{n}", replace(base, down=tile)
    for block_t in (1, 8, 32):
        yield f"text tiles of {block_t}", replace(base, block_t=block_t)


def sweep(work: Workload, clock: Clock, roofs: dict[str, float], samples: int) -> dict[str, Any]:
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
        num_tokens=len(work.input_ids),
    )
    want = PROVIDERS["D"](work)().clone()
    tried: list[dict[str, Any]] = []
    for label, config in variations(base, max(work.counts)):
        step = prepare_ours(work, launch=config)
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
    parser.add_argument("--providers", default="B,D,E,ours,ours_invariant")
    parser.add_argument("--samples", type=int, default=0, help="0: 30, or 5 with --quick")
    parser.add_argument("--out", type=Path, default=HERE / "results")
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
        names = [n for n in names if n not in ("C", "E", "ours", "ours_invariant")]
        names.append("ours_torch")

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
    print("    D  M     R  (device us / host us, medians)", flush=True)
    points: list[dict[str, Any]] = []
    report["sweeps" if args.sweep else "points"] = points
    clock = Clock(args.device)
    slug = (report["gpu"] if cuda else "cpu").lower().replace(" ", "-")
    kind = "sweep" if args.sweep else "kernels"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{kind}-{slug}-{report['date'][:10]}.json"
    for size in sizes:
        for modalities in args.modalities or MODALITIES:
            for rows in rows_list:
                if rows < modalities:
                    continue
                work = make_workload(size, modalities, rows, dtype=dtype, device=args.device)
                if args.sweep:
                    print(f"{size:5d} {modalities:2d} {rows:5d}", flush=True)
                    points.append(sweep(work, clock, roofs, samples))
                else:
                    points.append(measure_point(work, names, clock, roofs, samples))
                    print(line_of(points[-1]), flush=True)
                # After every point: a run that is cut off leaves what it has.
                path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
