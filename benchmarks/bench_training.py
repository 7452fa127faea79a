"""Forward and backward of projector and placement: time, peak memory, and what is saved between.

    python benchmarks/bench_training.py                       # H100: the grid of docs/training.md
    python benchmarks/bench_training.py --smoke               # any machine, seconds

Peers compute the same with torch's autograd: `eager` as the transformers model does it, `compile`
through torch.compile. Gradients of each peer are checked against float64 before anything is timed.
Results go to benchmarks/results/training-<device>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
import torch.nn.functional as F

from mmqwen_kernels import Projector
from mmqwen_kernels.autograd import fused_embed
from mmqwen_kernels.reference import project_rows_torch

RESULTS = Path(__file__).parent / "results"
WIDTHS = (768, 512, 1024, 384)
VOCABULARY = 32768
ROWS = (64, 256, 1024, 4096, 16384)
SLACK = 1.1
"""A peer's error against float64 may be this many times eager's."""


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
        g = torch.Generator().manual_seed(0)
        options = {"device": device, "dtype": dtype}

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(**options)

        tokens = 2 * rows
        self.ids = torch.randint(VOCABULARY, (tokens,), generator=g).to(device)
        self.table = draw(VOCABULARY, width, scale=0.02).requires_grad_(train == "full")
        counts = [rows // modalities] * modalities
        order = torch.randperm(tokens, generator=g)[: sum(counts)].sort().values.to(device)
        self.slots = list(order.split(counts))
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


def eager(ids: Any, table: Any, rows: Any, slots: Any, projectors: Any) -> torch.Tensor:
    """What `MultimodalQwen3ForConditionalGeneration.fuse` does."""
    text = F.embedding(ids, table)
    placed = [project_rows_torch(x, p) for x, p in zip(rows, projectors, strict=True)]
    return text.index_put((torch.cat(list(slots)),), torch.cat(placed))


def peers(device: str, compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """Name to function."""

    def with_kernels(*inputs: Any) -> torch.Tensor:
        return fused_embed(*inputs, backend="triton")

    def recomputing(*inputs: Any) -> torch.Tensor:
        return fused_embed(*inputs, backend="torch")

    found: dict[str, Callable[..., torch.Tensor]] = {"eager": eager}
    if compiled:
        found["compile"] = torch.compile(eager, dynamic=False)
    found["fused-torch"] = recomputing
    if device == "cuda":
        found["fused-triton"] = with_kernels
    return found


def step(function: Callable[..., torch.Tensor], case: Case) -> tuple[torch.Tensor, ...]:
    """One forward and backward."""
    out = function(case.ids, case.table, case.rows, case.slots, case.projectors)
    return torch.autograd.grad(out, case.leaves(), case.grad)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def check(functions: dict[str, Callable[..., torch.Tensor]], case: Case) -> dict[str, float]:
    """Largest error of any gradient, relative to eager's error, by peer.

    Raises:
        RuntimeError: a peer is worse than `SLACK` times eager.
    """
    exact = step(eager, case.double())
    errors = {
        name: [
            float((got.double() - want).norm())
            for got, want in zip(step(function, case), exact, strict=True)
        ]
        for name, function in functions.items()
    }
    ratios = {
        name: max(e / max(own, 1e-30) for e, own in zip(error, errors["eager"], strict=True))
        for name, error in errors.items()
    }
    for name, ratio in ratios.items():
        if ratio > SLACK:
            raise RuntimeError(f"{name}: a gradient's error is {ratio:.2f} times eager's")
    return ratios


def saved_bytes(function: Callable[..., torch.Tensor], case: Case) -> int:
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
        out = function(case.ids, case.table, case.rows, case.slots, case.projectors)
    kept.pop(out.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def peak_bytes(function: Callable[..., torch.Tensor], case: Case, device: str) -> int | None:
    """Most memory over a step above what is there before it, gradients included; CUDA only."""
    if device != "cuda":
        return None
    step(function, case)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(function, case)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(
    function: Callable[..., torch.Tensor], case: Case, device: str, repeats: int
) -> dict[str, float]:
    """p20, p50 and p80 of the time of a step, in milliseconds."""
    for _ in range(3):
        step(function, case)
    times = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        step(function, case)
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - begin))
    cuts = quantiles(times, n=10)
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def points(smoke: bool) -> Iterator[tuple[int, int, int, str]]:
    """Rows, modalities, width and what is trained, of each point."""
    if smoke:
        yield from product((16, 64), (1, 4), (32,), ("projector", "full"))
    else:
        yield from product(ROWS, (1, 4), (1024, 4096), ("projector", "full"))


def main(argv: list[str] | None = None) -> Path:
    """Check, measure and write; returns the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, float32, no torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    device = arguments.device
    dtype = torch.float32 if arguments.smoke else torch.bfloat16
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    results = []
    for rows, modalities, width, trained in points(arguments.smoke):
        torch.compiler.reset()
        case = Case(rows, modalities, width, device, dtype, trained)
        functions = peers(device, compiled=not arguments.smoke)
        ratios = check(functions, case)
        for peer, function in functions.items():
            entry = {
                "peer": peer,
                "rows": rows,
                "modalities": modalities,
                "width": width,
                "trained": trained,
                "milliseconds": measure(function, case, device, arguments.repeats),
                "peak_bytes": peak_bytes(function, case, device),
                "saved_bytes": saved_bytes(function, case),
                "gradient_bytes": sum(t.nbytes for t in case.leaves()),
                "error_over_eager": ratios[peer],
            }
            results.append(entry)
            print(json.dumps(entry), flush=True)
    output = arguments.output or RESULTS / f"training-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {"device": name, "dtype": str(dtype), "torch": torch.__version__}
    about["date"] = date.today().isoformat()
    output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return output


if __name__ == "__main__":
    print(main())
