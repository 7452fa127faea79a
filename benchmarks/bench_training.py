"""Forward and backward of projector and placement: time, memory, and what is saved between.

    python benchmarks/bench_training.py --seconds 165        # H100: the grid of docs/training.md
    python benchmarks/bench_training.py --smoke              # any machine, seconds

Peers compute the same with torch's autograd: `eager` as the transformers model does it, `compile`
through torch.compile, compiled once per (modalities, width) with the number of rows dynamic.
`fused` is `fused_embed` as it chooses by itself; `fused-kernels` and `fused-cublas` force the
backward's engine; `torch-saved` and `torch-recomputed` are its torch forward with the hidden
activations kept or not. Gradients of each are checked against float64 before anything is timed.

Times of a step, in milliseconds, p20, p50 and p80:

    device   kernels alone: steps queued behind a pause of the GPU, so that no step waits for Python
    wall     one step from an idle GPU to an idle GPU, Python included

The file of results is written after every point; points that the limit left out are named in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F
from bench_kernels import commit, queued

from mmqwen_kernels import Projector, autograd
from mmqwen_kernels.autograd import fused_embed
from mmqwen_kernels.reference import project_rows_torch

RESULTS = Path(__file__).parent / "results"
WIDTHS = (768, 512, 1024, 384)
VOCABULARY = 32768
ROWS = (64, 256, 1024, 4096, 16384)
BOTH_KEPT = (1024, 16384)
"""Rows at which `torch-saved` and `torch-recomputed` are compared."""
SLACK = 1.1
"""A gradient's error against float64 may be this many times eager's."""
STEPS_QUEUED = 10
PAUSE_CYCLES = 40_000_000
"""About 20 ms: longer than Python takes for `STEPS_QUEUED` steps, most of the time."""
Step = Callable[..., torch.Tensor]


class Case:
    """Inputs of one point: `rows` rows over `modalities` modalities, as many text tokens.

    Args:
        rows: R, of all modalities.
        modalities: how many.
        width: D, which is also H.
        device: where.
        dtype: of everything.
        train: "projector" (gradients of the weights), or "full" (also of table and rows).
    """

    def __init__(
        self, rows: int, modalities: int, width: int, device: str, dtype: torch.dtype, train: str
    ) -> None:
        g = torch.Generator(device).manual_seed(0)
        options = {"device": device, "generator": g}

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, **options).mul_(scale).to(dtype)

        tokens = 2 * rows
        self.ids = torch.randint(VOCABULARY, (tokens,), **options)
        self.table = draw(VOCABULARY, width, scale=0.02).requires_grad_(train == "full")
        counts = [rows // modalities] * modalities
        order = torch.randperm(tokens, **options)[: sum(counts)].sort().values
        self.slots = [part.clone() for part in order.split(counts)]
        self.rows = [
            draw(n, d).requires_grad_(train == "full") for n, d in zip(counts, WIDTHS, strict=False)
        ]
        self.projectors = [
            Projector(
                *(
                    draw(*shape, scale=scale).requires_grad_()
                    for shape, scale in (
                        ((width, d), d**-0.5),
                        ((width,), 0.1),
                        ((width, width), width**-0.5),
                        ((width,), 0.1),
                    )
                )
            )
            for d in WIDTHS[:modalities]
        ]
        self.grad = draw(tokens, width)

    def leaves(self) -> list[torch.Tensor]:
        """Everything that a gradient is asked of."""
        every = [self.table, *self.rows, *(w for p in self.projectors for w in p)]
        return [tensor for tensor in every if tensor.requires_grad]

    def double(self) -> Case:
        """The same case in float64."""
        other = object.__new__(Case)
        other.ids, other.slots = self.ids, self.slots

        def raised(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().double().requires_grad_(tensor.requires_grad)

        other.table, other.grad = raised(self.table), self.grad.double()
        other.rows = [raised(x) for x in self.rows]
        other.projectors = [Projector(*map(raised, p)) for p in self.projectors]
        return other

    def mark_rows_dynamic(self) -> None:
        """Tell torch.compile that the numbers of rows and tokens change from call to call."""
        for tensor in (self.ids, *self.slots, *self.rows):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def eager(ids: Any, table: Any, rows: Any, slots: Any, projectors: Any) -> torch.Tensor:
    """What `MultimodalQwen3ForConditionalGeneration.fuse` does."""
    text = F.embedding(ids, table)
    placed = [project_rows_torch(x, p) for x, p in zip(rows, projectors, strict=True)]
    return text.index_put((torch.cat(list(slots)),), torch.cat(placed))


@contextmanager
def keeping(hidden: bool) -> Iterator[None]:
    """Hidden activations are kept, or not, whatever the rule says."""
    own = autograd.keeps_hidden
    autograd.keeps_hidden = lambda *_: hidden
    try:
        yield
    finally:
        autograd.keeps_hidden = own


def peers(device: str, compiled: Step | None, rows: int) -> dict[str, Step]:
    """Name to function."""

    def engine(name: str) -> Step:
        return lambda *inputs: fused_embed(*inputs, backend="triton", engine=name)

    def kept(hidden: bool) -> Step:
        def run(*inputs: Any) -> torch.Tensor:
            with keeping(hidden):
                return fused_embed(*inputs, backend="torch")

        return run

    found: dict[str, Step] = {"eager": eager}
    if compiled is not None:
        found["compile"] = compiled
    found["fused"] = fused_embed
    if device == "cuda":
        found["fused-kernels"] = engine("kernels")
        found["fused-cublas"] = engine("torch")
    if rows in BOTH_KEPT or device != "cuda":
        found["torch-saved"], found["torch-recomputed"] = kept(True), kept(False)
    return found


def forward(function: Step, case: Case) -> torch.Tensor:
    """One forward."""
    return function(case.ids, case.table, case.rows, case.slots, case.projectors)


def step(function: Step, case: Case) -> tuple[torch.Tensor, ...]:
    """One forward and backward."""
    return torch.autograd.grad(forward(function, case), case.leaves(), case.grad)


def errors(function: Step, case: Case, exact: tuple[torch.Tensor, ...]) -> list[float]:
    """Norm of each gradient's error."""
    return [
        float((got.double() - want).norm())
        for got, want in zip(step(function, case), exact, strict=True)
    ]


def check(name: str, own: list[float], peer: list[float]) -> float:
    """Largest error of any gradient of `name`, relative to eager's error.

    Raises:
        RuntimeError: one of ours is worse than `SLACK` times eager.
    """
    ratio = max(e / max(base, 1e-30) for e, base in zip(own, peer, strict=True))
    if not ratio <= SLACK and name not in ("eager", "compile"):
        raise RuntimeError(f"a gradient's error is {ratio:.2f} times eager's")
    return ratio


def saved_bytes(function: Step, case: Case) -> int:
    """Bytes kept from forward to backward, beyond the inputs themselves."""
    own = [case.ids, *case.slots, *case.rows, case.table, *(w for p in case.projectors for w in p)]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(function, case)
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(function: Step, case: Case, gradients: int) -> dict[str, int]:
    """Most memory above what was there before, on CUDA.

    `step` counts everything; `activations` leaves out the gradients of the weights (but not those
    of the activations), which any way of computing them has to give.
    """
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward(function, case)
    ahead = torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(out, case.leaves(), case.grad)
    back = torch.cuda.max_memory_allocated() - before
    return {"step": max(ahead, back), "activations": max(ahead, back - gradients)}


def percentiles(times: list[float]) -> dict[str, float]:
    """p20, p50 and p80."""
    cuts = quantiles(times, n=10)
    return {"p20": round(cuts[1], 5), "p50": round(cuts[4], 5), "p80": round(cuts[7], 5)}


def wall_times(function: Step, case: Case, device: str, repeats: int) -> list[float]:
    """Milliseconds of steps, each from an idle device to an idle device."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step(function, case)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def device_times(function: Step, case: Case, batches: int = 2) -> list[float]:
    """Milliseconds of steps on the GPU alone."""
    steps = [lambda: step(function, case)] * STEPS_QUEUED
    return queued(steps, batches, PAUSE_CYCLES)[0]


def measure(function: Step, case: Case, device: str, repeats: int) -> dict[str, Any]:
    """Times and memory of one peer at one point, after warming up."""
    for _ in range(5):
        step(function, case)
    gradients = sum(tensor.nbytes for tensor in case.leaves())
    entry: dict[str, Any] = {"gradient_bytes": gradients}
    if device == "cuda":
        torch.cuda.synchronize()
        entry["device_ms"] = percentiles(device_times(function, case))
        entry["peak_bytes"] = peak_bytes(function, case, gradients)
    entry["wall_ms"] = percentiles(wall_times(function, case, device, repeats))
    return entry


def points(smoke: bool) -> list[tuple[int, int, int, str]]:
    """(rows, modalities, width, what is trained), those with one compilation together."""
    if smoke:
        return list(product((16, 64), (1, 4), (32,), ("projector", "full")))
    grid = [
        (rows, modalities, width, "projector")
        for modalities, width in product((1, 4), (4096, 1024))
        for rows in ROWS
    ]
    return [*grid, (1024, 1, 1024, "full"), (1024, 4, 4096, "full")]


def about(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what."""
    found: dict[str, Any] = {"device": platform.machine(), "dtype": str(dtype)}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found |= {"torch": torch.__version__, "commit": commit(), "date": date.today().isoformat()}
    return found


def table(results: list[dict[str, Any]]) -> list[str]:
    """A line a point: `fused` over the best peer in time and memory, and its engines."""
    by_point: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in results:
        key = (r["trained"], r["modalities"], r["width"], r["rows"])
        by_point.setdefault(key, {})[r["peer"]] = r
    lines = [
        "| trained | modalities | D = H | rows | clock | best peer, ms | fused | kernels | cublas "
        "| activations | peak |",
        "|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for key, found in by_point.items():
        rivals = [found[name] for name in ("eager", "compile") if name in found]
        if "fused" not in found or not rivals:
            continue
        for clock in ("device_ms", "wall_ms"):
            if clock not in rivals[0]:
                continue
            best = min(r[clock]["p50"] for r in rivals)
            cells = [*map(str, key), clock[:-3], f"{best:.4f}"]
            for name in ("fused", "fused-kernels", "fused-cublas"):
                one = found.get(name)
                cells.append(f"{one[clock]['p50'] / best:.2f}" if one else "")
            for what in ("activations", "step"):
                if "peak_bytes" not in rivals[0]:
                    cells.append("")
                    continue
                least = min(r["peak_bytes"][what] for r in rivals)
                cells.append(f"{found['fused']['peak_bytes'][what] / max(least, 1):.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> Path:
    """Check, measure and write; returns the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, float32, no torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=165, help="no point begins after this")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    device = arguments.device
    dtype = torch.float32 if arguments.smoke else torch.bfloat16
    output = arguments.output or RESULTS / f"training-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**about(device, dtype), "results": [], "failed": [], "not_run": []}
    compiled: Step | None = None
    kind: tuple[Any, ...] | None = None
    for rows, modalities, width, trained in points(arguments.smoke):
        where = {"rows": rows, "modalities": modalities, "width": width, "trained": trained}
        if time.perf_counter() - start > arguments.seconds:
            report["not_run"].append(where)
            continue
        case = Case(rows, modalities, width, device, dtype, trained)
        if not (arguments.smoke or arguments.no_compile):
            if kind != (modalities, width, trained):
                torch.compiler.reset()
                compiled = torch.compile(eager)
                kind = (modalities, width, trained)
            case.mark_rows_dynamic()
        functions = peers(device, compiled, rows)
        exact = step(eager, case.double())
        eager_errors = errors(eager, case, exact)
        for peer, function in functions.items():
            entry: dict[str, Any] = {"peer": peer, **where}
            try:
                begin = time.perf_counter()
                ratio = check(peer, errors(function, case, exact), eager_errors)
                entry["check_s"] = round(time.perf_counter() - begin, 2)  # with any compilation
                entry["error_over_eager"] = round(ratio, 4)
                entry |= measure(function, case, device, arguments.repeats)
                if peer != "compile":  # hooks would compile it anew
                    entry["saved_bytes"] = saved_bytes(function, case)
                report["results"].append(entry)
            except Exception as error:  # the others are worth having
                entry["error"] = f"{type(error).__name__}: {error}"[:2000]
                report["failed"].append(entry)
            print(json.dumps(entry), flush=True)
        report["seconds"] = round(time.perf_counter() - start, 1)
        output.write_text(json.dumps(report, indent=1) + "\n")
        del case, functions, exact
        if device == "cuda":
            torch.cuda.empty_cache()
    output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(report["results"])))
    print(f"{len(report['failed'])} failed, {len(report['not_run'])} not run", flush=True)
    return output


if __name__ == "__main__":
    print(main())
