"""Measure the fusion from the engine's own start against measured roofs, and write the raw figures.

    python benchmarks/bench_kernels.py                     the grid of docs/kernels.md
    python benchmarks/bench_kernels.py --quick             a few points, a minute
    python benchmarks/bench_kernels.py --sweep             launch configurations, for ours alone
    python benchmarks/bench_kernels.py --kinds             kinds of projectors, for ours alone
    python benchmarks/bench_kernels.py --device cpu --quick --size 64   a smoke test

`providers.py` says what a step is and by what means it is made; `timing.py`, what device, host and
latency mean. Every point is checked against float64 before it is timed. Each sample is of a step
with counts that no step before had.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

from providers import (  # noqa: E402
    PEERS,
    PROVIDERS,
    Run,
    Step,
    Workload,
    exact,
    gate,
    into_buffer,
    make_workload,
    prepare_kernels,
    why_not,
)
from timing import Call, Clock, about, measure_roofs  # noqa: E402

from mmqwen_kernels import (  # noqa: E402
    ACTIVATIONS,
    NORM_EPS,
    LaunchConfig,
    Norm,
    Projector,
    TileConfig,
    choose_config,
)

SIZES = (1024, 4096)
MODALITIES = (1, 2, 4)
ROWS = (8, 64, 512, 4096)
TEXT = (64, 256, 4096)
WARM_UP = 3
KINDS = ("device_us", "host_us", "latency_us")


def floor_us(work: Workload, roofs: dict[str, float]) -> float:
    """The least time of a step: bytes over the copy's speed or FLOPs over the product's, and what
    two dependent launches take."""
    busy = max(work.bytes_moved() / roofs["copy_bytes_per_s"], work.flops() / roofs["gemm_flops"])
    return 1e6 * busy + roofs["launches_us"]


def calls(run: Run, steps: Sequence[Step]) -> list[Call]:
    """One call for each step."""
    return [partial(run, step) for step in steps]


def measure_point(
    work: Workload, names: Sequence[str], clock: Clock, roofs: dict[str, float]
) -> dict[str, Any]:
    """All times of all providers; a third of the workload's steps for each kind of time."""
    names = [name for name in names if why_not(name, work.device, work.dtype) is None]
    errors = gate(work, names)
    runs = {name: into_buffer(work, PROVIDERS[name](work)) for name in names}
    for run in runs.values():
        for step in work.steps[:WARM_UP]:
            run(step)
    thirds = [work.steps[WARM_UP + at :: 3] for at in range(3)]
    host = clock.by_turns({name: calls(run, thirds[0]) for name, run in runs.items()})
    latency = clock.by_turns(
        {name: calls(run, thirds[1]) for name, run in runs.items()}, to_the_end=True
    )
    found = {
        name: {
            "device_us": clock.device(calls(run, thirds[2]), host[name]["p50"]),
            "host_us": host[name],
            "latency_us": latency[name],
            "error": errors[name],
        }
        for name, run in runs.items()
    }
    return {
        "size": work.size,
        "modalities": work.modalities,
        "rows": work.rows,
        "text": work.text,
        "items": len(work.steps[0].items),
        "packs": len(work.steps[0].packs),
        "bytes": work.bytes_moved(),
        "flops": work.flops(),
        "floor_us": floor_us(work, roofs),
        "providers": found,
    }


def best_peer(point: dict[str, Any], kind: str) -> str:
    """The peer with the least median."""
    found = point["providers"]
    return min((n for n in PEERS if n in found), key=lambda n: found[n][kind]["p50"])


def line_of(point: dict[str, Any]) -> str:
    """Ours and the best peer of each kind of time."""
    found = point["providers"]
    cells = [
        f"{point['size']:5d} {point['modalities']:2d} {point['rows']:5d} {point['text']:5d}",
        f"floor {point['floor_us']:7.1f}",
    ]
    ours = found.get("ours", found["plan_torch"])
    for kind in KINDS:
        peer = best_peer(point, kind)
        a, b = ours[kind]["p50"], found[peer][kind]["p50"]
        cells.append(f"{kind.removesuffix('_us')} {a:7.1f} {a / b:5.2f} of {peer}'s")
    return "  ".join(cells)


# -- launch configurations -----------------------------------------------------------------------


def candidates(rows: int) -> list[TileConfig]:
    """Tiles worth a try for `rows` rows a modality, around the ones that the rule has."""
    if rows <= 32:
        r = 16 if rows <= 16 else 32
        ring = [(64, 64, 4, 8), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 4, 8)]
        ring += [(64, 256, 4, 3), (64, 256, 4, 4), (64, 256, 8, 4), (128, 128, 8, 4)]
        return [TileConfig(r, n, k, w, s, swap=True) for n, k, w, s in ring]
    middle = [(64, 32, 128, 4, 6), (64, 32, 256, 4, 4), (64, 64, 64, 4, 8), (64, 64, 128, 4, 4)]
    middle += [(64, 64, 128, 4, 6), (64, 128, 64, 4, 4), (64, 128, 128, 4, 4)]
    wide = [(128, 64, 64, 4, 3), (128, 64, 64, 4, 6), (128, 64, 128, 4, 4), (128, 64, 128, 8, 4)]
    large = [(128, 128, 64, 4, 3, 8), (128, 128, 64, 4, 4, 8), (128, 128, 64, 8, 4, 8)]
    large += [(128, 256, 64, 8, 3, 8), (128, 256, 64, 8, 4, 8), (128, 256, 64, 8, 4, 16)]
    large += [(256, 128, 64, 8, 4, 8), (64, 256, 64, 4, 4, 8), (64, 256, 64, 8, 4, 8)]
    found = [TileConfig(*t) for t in (middle if rows <= 512 else [])]
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
    """Device time of the kernels alone, on one step, in many configurations."""
    step = work.steps[0]
    properties = torch.cuda.get_device_properties(work.device)
    counts = [len(at) for at in step.slots(work.modalities)]
    base = choose_config(
        counts,
        [p.width for p in work.projectors],
        [work.size] * work.modalities,
        work.size,
        work.dtype,
        (properties.major, properties.minor),
        properties.multi_processor_count,
    )
    want = exact(work, step)
    tried: list[dict[str, Any]] = []
    for label, config in variations(base, max(counts)):
        run = prepare_kernels(work, launch=config)
        try:
            error = ((run(step).double() - want).norm() / want.norm()).item()
            if not error < 0.02:
                raise ValueError(f"wrong: {error:.2e}")
            for _ in range(WARM_UP):
                run(step)
            us = clock.device(calls(run, [step] * samples), 50.0)
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
        "text": work.text,
        "floor_us": floor_us(work, roofs),
        "tried": tried,
    }


# -- kinds of projectors -------------------------------------------------------------------------

KINDS_OF_PROJECTORS: dict[str, dict[str, Any]] = {
    "relu": {},
    **{name: {"activation": name} for name in ACTIVATIONS if name != "relu"},
    "layer norm": {"norm": "layer"},
    "rms norm": {"norm": "rms"},
    "no bias": {"bias": False},
    "one layer": {"layers": 1},
    "one layer, layer norm": {"layers": 1, "norm": "layer"},
}


def of_kind(projector: Projector, kind: dict[str, Any]) -> Projector:
    """A projector of the same sizes and weights, of another kind."""
    w1, b1, w2, b2 = projector[:4]
    if not kind.get("bias", True):
        b1 = b2 = None
    norm = None
    if "norm" in kind:
        scale = torch.ones(projector.width, dtype=w2.dtype, device=w2.device)
        shift = torch.zeros_like(scale) if kind["norm"] == "layer" else None
        norm = Norm(kind["norm"], scale, shift, NORM_EPS[kind["norm"]])
    if kind.get("layers") == 1:
        columns = w2.shape[0]
        w2 = torch.randn(columns, projector.width, device=w2.device).to(w2.dtype) / columns**0.5
        return Projector(None, None, w2, b2, "none", norm)
    return Projector(w1, b1, w2, b2, kind.get("activation", "relu"), norm)


def compare_kinds(
    work: Workload, clock: Clock, roofs: dict[str, float], samples: int
) -> dict[str, Any]:
    """Device time of the kernels alone, and of plan and torch, on one step, by kind of projector.

    "mixed" has another activation in each modality. By turns, relu first and last.
    """
    plain, step = work.projectors, work.steps[0]
    kinds = {name: [of_kind(p, kind) for p in plain] for name, kind in KINDS_OF_PROJECTORS.items()}
    if work.modalities > 1:
        kinds["mixed"] = [
            p._replace(activation=name) for p, name in zip(plain, ACTIVATIONS, strict=False)
        ]
    found: list[dict[str, Any]] = []
    for name, projectors in [*kinds.items(), ("relu again", plain)]:
        work.projectors = projectors
        want = exact(work, step)
        row: dict[str, Any] = {"kind": name}
        for provider in ("kernels", "plan_torch"):
            run = PROVIDERS[provider](work)
            row[f"{provider}_error"] = ((run(step).double() - want).norm() / want.norm()).item()
            if not row[f"{provider}_error"] < 0.02:
                raise ValueError(f"{name}: {provider} is wrong: {row}")
            for _ in range(WARM_UP):
                run(step)
            row[f"{provider}_us"] = clock.device(calls(run, [step] * samples), 600.0)
        found.append(row)
        us, peer = (row[f"{of}_us"]["p50"] for of in ("kernels", "plan_torch"))
        print(f"    {us:7.1f}  plan and torch {peer:7.1f}  {name}", flush=True)
    work.projectors = plain
    return {
        "size": work.size,
        "modalities": work.modalities,
        "rows": work.rows,
        "text": work.text,
        "floor_us": floor_us(work, roofs),
        "kinds": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few points, few samples")
    parser.add_argument("--sweep", action="store_true", help="launch configurations of ours")
    parser.add_argument("--kinds", action="store_true", help="kinds of projectors, for ours alone")
    parser.add_argument("--size", type=int, action="append", help="D = H; may be repeated")
    parser.add_argument("--modalities", type=int, action="append", choices=MODALITIES)
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--text", type=int, action="append", help="text rows")
    parser.add_argument("--providers", default="vllm,torch,graph,grouped,plan_torch,ours,kernels")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many; 0: never")
    parser.add_argument("--samples", type=int, default=0, help="0: 20, or 5 with --quick")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--name", help="of the file in it")
    args = parser.parse_args()
    cuda = args.device != "cpu"
    dtype = torch.bfloat16 if cuda else torch.float32
    samples = args.samples or (5 if args.quick else 20)
    names = args.providers.split(",")
    unknown = set(names) - set(PROVIDERS)
    if unknown:
        parser.error(f"unknown providers {sorted(unknown)}, expected some of {list(PROVIDERS)}")

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    report: dict[str, Any] = about(args.device)
    report["dtype"] = str(dtype)
    report["roofs"] = roofs = measure_roofs(args.device, dtype)
    print(
        f"{report['gpu']}  torch {report['torch']}  triton {report['triton']}  "
        f"copy {roofs['copy_bytes_per_s'] / 1e12:.2f} TB/s  "
        f"product {roofs['gemm_flops'] / 1e12:.1f} TFLOP/s  "
        f"two launches {roofs['launches_us']:.1f} us",
        flush=True,
    )
    print("    D  M     R     T  (medians, us; of the best peer's)", flush=True)
    points: list[dict[str, Any]] = []
    report["sweeps" if args.sweep else "kinds" if args.kinds else "points"] = points
    clock = Clock(args.device)
    slug = (report["gpu"] if cuda else "cpu").lower().replace(" ", "-")
    kind = "sweep" if args.sweep else "kinds" if args.kinds else "kernels"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / (args.name or f"{kind}-{slug}-{report['date'][:10]}.json")
    grid = [
        (size, modalities, rows, text)
        for size in args.size or (SIZES if cuda else (64,))
        for modalities in args.modalities or MODALITIES
        for rows in args.rows or (ROWS[1:3] if args.quick else ROWS)
        for text in args.text or (TEXT[:1] if args.quick else TEXT)
        if rows >= modalities
    ]
    begin = time.monotonic()
    # The first point is measured twice: what is measured first is slower, by 1 us of 22.
    for at, (size, modalities, rows, text) in enumerate([grid[0], *grid]):
        if args.seconds and time.monotonic() - begin > args.seconds:
            print(f"stopped after {args.seconds:.0f} s: later points were not measured")
            return 1
        count = 1 if args.sweep or args.kinds else WARM_UP + 3 * samples
        work = make_workload(
            size, modalities, rows, text, steps=count, dtype=dtype, device=args.device
        )
        if args.sweep or args.kinds:
            if not at:
                continue
            print(f"{size:5d} {modalities:2d} {rows:5d} {text:5d}", flush=True)
            measure = sweep if args.sweep else compare_kinds
            points.append(measure(work, clock, roofs, samples))
        else:
            point = measure_point(work, names, clock, roofs)
            if not at:
                continue
            points.append(point)
            print(line_of(point), flush=True)
        # After every point: a run that is cut off leaves what it has.
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
