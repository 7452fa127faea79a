"""Tiles of the backward's kernels, tried on this GPU: where `backward.py`'s tables come from.

    python benchmarks/sweep_backward.py --seconds 100

For each point the time of one backward by the kernels (device alone, p50) with every tile of B1 and
B2, the others as chosen, then with every tile of B3; best first. Results are checked for finiteness
only: `tests/kernels/test_autograd_gpu.py` has the numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_kernels import queued
from bench_training import RESULTS, Case, about

from mmqwen_kernels import backward
from mmqwen_kernels.backward import Tile, backward_kernels

POINTS = (
    # rows, modalities, width
    (64, 1, 4096),
    (64, 4, 4096),
    (1024, 1, 4096),
    (1024, 4, 4096),
    (16384, 1, 4096),
    (1024, 1, 1024),
    (16384, 1, 1024),
    (256, 1, 4096),
    (4096, 4, 4096),
)
ROW_TILES = (
    Tile(16, 64, 128, 4, 4, 1, True),
    Tile(16, 64, 64, 4, 6, 1, True),
    Tile(32, 64, 128, 4, 4, 1, True),
    Tile(64, 64, 64, 4, 4, 4),
    Tile(64, 128, 64, 4, 4, 4),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
)
WEIGHT_TILES = (
    Tile(128, 64, 16, 4, 2),
    Tile(128, 64, 32, 4, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(128, 128, 32, 8, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 64, 8, 5),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 5),
)


def time_of(case: Case, repeats: int = 10) -> float:
    """Milliseconds of one backward on the GPU alone."""
    groups = [(x, at, *p) for x, at, p in zip(case.rows, case.slots, case.projectors, strict=True)]
    launcher = backward_kernels(case.grad.device)

    def step() -> Any:
        return launcher.gradients(case.grad, groups, [False] * len(groups))

    with torch.no_grad():
        for gradients in (step(), step()):
            for own in gradients:
                if not all(bool(g.isfinite().all()) for g in own if g is not None):
                    raise RuntimeError("a gradient is not finite")
        return median(queued([step] * repeats, 1, 10_000_000)[0])


def fits(tile: Tile, rows: int) -> bool:
    """Whether a tile is worth trying: not for many rows if it is for few, nor the reverse."""
    if rows <= 64:
        return tile.a <= 64
    return tile.a >= 64


def main() -> None:
    """Try, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=100, help="no trial begins after this")
    parser.add_argument("--output", type=Path, default=RESULTS / "sweep-backward.json")
    arguments = parser.parse_args()
    start = time.perf_counter()
    report: dict[str, Any] = {**about("cuda", torch.bfloat16), "results": []}
    chosen = {"row_tile": backward.row_tile, "weight_tile": backward.weight_tile}
    for rows, modalities, width in POINTS:
        case = Case(rows, modalities, width, "cuda", torch.bfloat16, "projector")
        most = rows // modalities
        for kind, tiles in (("row_tile", ROW_TILES), ("weight_tile", WEIGHT_TILES)):
            found: dict[str, float | str] = {}
            for tile in (None, *tiles):
                if time.perf_counter() - start > arguments.seconds:
                    break
                if kind == "row_tile" and tile is not None and not fits(tile, most):
                    continue
                if tile is not None:
                    setattr(backward, kind, lambda *_, tile=tile: tile)
                name = "as chosen" if tile is None else str(tuple(tile))
                backward_kernels(case.grad.device)._facts.clear()  # which hold earlier choices
                try:
                    found[name] = round(time_of(case), 5)
                except Exception as error:  # a tile that does not fit the GPU
                    found[name] = f"{type(error).__name__}: {error}"[:200]
                setattr(backward, kind, chosen[kind])
            ranked = sorted((v, k) for k, v in found.items() if isinstance(v, float))
            where = {"rows": rows, "modalities": modalities, "width": width, "tiles": kind}
            report["results"].append({**where, "milliseconds": found})
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
            best = ", ".join(f"{name} {value:.4f}" for value, name in ranked[:3])
            print(f"{where}: as chosen {found.get('as chosen')}; best {best}", flush=True)
        del case
        torch.cuda.empty_cache()
    print(arguments.output)


if __name__ == "__main__":
    main()
