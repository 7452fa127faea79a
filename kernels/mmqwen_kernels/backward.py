"""Gradients of projection and placement: by the kernels of `backward_kernels.py`, or by torch.

Both read the gradient of the output at the slots, and give the gradients of W1, b1, W2, b2 and of
the rows. Which one runs, whether hidden activations are kept, and how many rows are worked on at a
time are pure functions of shapes, below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from mmqwen_kernels.ops import BackendChoice
from mmqwen_kernels.staging import PerDevice

ENGINES = ("auto", "kernels", "torch")
_RECIPES_KEPT = 4096
GROUP_OF = 4
"""Modalities with rows that share a launch."""
KERNEL_PRODUCT = 2**34
KERNEL_ROWS = 2048
"""Rows times H times D of a modality, and rows, up to which the kernels run. Below, a step waits
for launches and memory, of which the kernels want least; above, for the tensor cores, which cuBLAS
keeps as busy or, for small H and D or very many rows, busier. Kernels and cuBLAS in us, forward and
backward, one modality, H100, 2026-11-24 (benchmarks/results/training_h100_f59081d.json): D = 4096,
256 rows 124 and 140, 1024 rows 240 and 241, 4096 rows 812 and 817, 16384 rows 3719 and 3215; D =
1024, 1024 rows 70 and 83, 4096 rows 180 and 158."""
MOST_ELEMENTS = 2**31
"""Of a tensor that a launch addresses by int32: below this many."""
IN_PLACE_BYTES = 32 * 2**20
"""Hidden activations from this size on are overwritten by their own gradient: one launch more, one
buffer less."""
CHUNK_BYTES = 8 * 2**20
"""Most memory of a temporary of one chunk of rows: 1024 rows of 4096 in bf16."""
SMALL_BYTES = 32 * 2**20
"""Hidden activations up to this size are kept: one product less. By cuBLAS 245 us against 260 at
1024 rows of D = H = 4096, 3.24 ms against 3.39 at 16384 (the same file)."""


def keeps_hidden(rows: int, width: int, units: int, columns: int, itemsize: int) -> bool:
    """Whether forward keeps `[rows, units]` hidden activations for backward, or recomputes them.

    Recomputing is one product more, `2 rows units width` operations beside
    `2 rows units (2 width + 3 columns)`. Kept are few rows, and those whose recomputation would be
    a sixteenth of the work or more (width >= 0.22 columns).
    """
    if rows * units * itemsize <= SMALL_BYTES:
        return True
    return 16 * width >= 2 * width + 3 * columns


def select_backward(
    tensors: Sequence[Any],
    grad: torch.Tensor,
    compute: torch.dtype,
    needs: Sequence[bool],
    engine: str = "auto",
) -> BackendChoice:
    """Say whether a modality's gradients come from the kernels or from torch, and why.

    Args:
        tensors: x, slots, W1, b1, W2, b2.
        grad: `[T, D]`.
        compute: dtype of the products.
        needs: which of `tensors` get a gradient.
        engine: "auto", "kernels" or "torch".

    Raises:
        ValueError: `engine` is none of these, or "kernels" cannot run.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine {engine!r}, expected one of {ENGINES}")
    if engine == "torch":
        return BackendChoice("torch", "asked for")
    refusal = _why_no_kernels(tensors, grad, compute, needs)
    if refusal is not None:
        if engine == "kernels":
            raise ValueError(f"engine 'kernels' cannot run: {refusal}; use 'torch'")
        return BackendChoice("torch", refusal)
    if engine == "kernels":
        return BackendChoice("kernels", "asked for")
    rows = tensors[0].shape[0]
    terms = rows * tensors[4].numel()
    if terms > KERNEL_PRODUCT or rows > KERNEL_ROWS:
        return BackendChoice("torch", f"{rows} rows, products of {terms:.0e} terms: cuBLAS")
    return BackendChoice(
        "kernels", f"{rows} rows, products of {terms:.0e} terms; up to {KERNEL_PRODUCT:.0e}"
    )


def fits_one_launch(groups: Sequence[Sequence[Any]]) -> bool:
    """Whether the hidden activations of these modalities, in one buffer, are addressed by int32."""
    rows = sum(tensors[0].shape[0] for tensors in groups)
    return rows * max(tensors[2].shape[0] for tensors in groups) < MOST_ELEMENTS


def _why_no_kernels(
    tensors: Sequence[Any], grad: torch.Tensor, compute: torch.dtype, needs: Sequence[bool]
) -> str | None:
    device = grad.device
    if device.type != "cuda":
        if not _interpreting():
            return f"rows on {device.type}"
    elif not _has_tensor_cores(device.index):
        return "the GPU is older than sm_80"
    if compute not in (torch.bfloat16, torch.float16) and not _interpreting():
        return f"products in {compute}"
    step = 16 // compute.itemsize
    if grad.dtype != compute:
        return f"products in {compute}, but an output in {grad.dtype}"
    if grad.numel() >= 1 << 31 or grad.stride(1) != 1 or grad.stride(0) % step:
        return "the output's gradient is too large, or not in rows aligned to 16 bytes"
    if grad.data_ptr() % 16:
        return "the output's gradient is not aligned to 16 bytes"
    x, _, w1, b1, w2, b2 = tensors
    units, width = w1.shape
    if width % step and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a width whose weights are copied, while a graph is captured"
    if not (needs[2] and needs[3] and needs[4] and (b2 is None or needs[5])):
        return "some weights are frozen"
    if not (units and width and w2.shape[0]):
        return "empty weights"
    if units % step or w2.shape[0] % step:
        return f"hidden units or outputs that are no multiples of {step}"
    if not w1.dtype == b1.dtype == w2.dtype:
        return "weights of several dtypes"
    for weight in (w2,) if width % step else (w1, w2):  # W1 of such a width is copied
        if weight.dtype == compute and (weight.stride(0) % step or weight.data_ptr() % 16):
            return "weights that are not aligned to 16 bytes"
    if x.shape[0] * max(units, x.stride(0), _aligned(width, step)) >= MOST_ELEMENTS:
        return "too many rows"
    return None


@lru_cache(maxsize=1)
def _interpreting() -> bool:
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=16)
def _has_tensor_cores(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 8


def hidden_of(x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor) -> torch.Tensor:
    """`relu(x W1ᵀ + b1)` `[R, H]`; on CUDA one launch, the ReLU in cuBLAS's epilogue."""
    if x.is_cuda and x.dtype != torch.float64:
        return torch._addmm_activation(b1, x, w1.t())
    return F.linear(x, w1, b1).relu_()


# -- torch -----------------------------------------------------------------------------------------


def modality_by_torch(
    grad: torch.Tensor,
    tensors: Sequence[Any],
    needs: Sequence[bool],
    compute: torch.dtype,
    hidden: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """Gradients of x, slots (None), W1, b1, W2 and b2 of one modality, in the dtype of each.

    Alive at most, beside the gradients: hidden activations and their gradient in one buffer (two
    where they were saved), `[R, D]` for the product of W2 alone, and one chunk.

    Args:
        grad: `[T, D]`.
        tensors: x, slots, W1, b1, W2, b2; at least one row.
        needs: which of them get a gradient.
        compute: dtype of the products.
        hidden: what forward kept, or None to recompute it.
    """
    x, at, w1, b1, w2, b2 = tensors
    need_x, _, need_w1, need_b1, need_w2, need_b2 = needs
    below = need_x or need_w1 or need_b1
    of_x = of_w1 = of_b1 = of_w2 = of_b2 = None
    at = at.long()
    rows = x.to(compute)
    first = w1.to(compute)
    recomputed = hidden is None
    if recomputed and (below or need_w2):
        hidden = hidden_of(rows, first, b1.to(compute))
    count = x.shape[0]
    chunk = max(1, CHUNK_BYTES // max(1, max(w1.shape[0], grad.shape[1]) * compute.itemsize))
    g: torch.Tensor | None = None
    if need_w2 or need_b2 or count <= chunk:
        g = grad.index_select(0, at).to(compute)
        if need_b2:
            of_b2 = g.sum(0, dtype=b2.dtype)
        if need_w2 and hidden is not None:
            of_w2 = (g.t() @ hidden).to(w2.dtype)
    if below and hidden is not None:
        second = w2.to(compute)
        if g is not None and count <= chunk:
            of_hidden = g @ second
            torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
        else:
            g = None
            of_hidden = hidden if recomputed else torch.empty_like(hidden)
            for begin in range(0, count, chunk):
                end = min(begin + chunk, count)
                part = grad.index_select(0, at[begin:end]).to(compute) @ second
                torch.ops.aten.threshold_backward.grad_input(
                    part, hidden[begin:end], 0, grad_input=of_hidden[begin:end]
                )
            del part
        del hidden
        if need_w1:
            of_w1 = (of_hidden.t() @ rows).to(w1.dtype)
        if need_b1:
            of_b1 = of_hidden.sum(0, dtype=b1.dtype)
        if need_x:
            of_x = (of_hidden @ first).to(x.dtype)
    return [of_x, None, of_w1, of_b1, of_w2, of_b2]


# -- kernels ---------------------------------------------------------------------------------------


def _aligned(width: int, step: int) -> int:
    return -(-width // step) * step


def _readable(x: torch.Tensor, dtype: torch.dtype, step: int) -> torch.Tensor:
    """Rows in `dtype`, each aligned to 16 bytes; the same tensor where they are.

    Where their width is no multiple of that they come widened by zeros.
    """
    x = x if x.dtype == dtype else x.to(dtype)
    if x.shape[1] % step:
        return F.pad(x, (0, -x.shape[1] % step))
    aligned = x.stride(1) == 1 and not x.stride(0) % step and not x.data_ptr() % 16
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


class Tile(NamedTuple):
    """A block of one product, and how it is run; `swap`: weight rows fill the MMA's M."""

    a: int
    b: int
    k: int
    warps: int
    stages: int
    group: int = 8
    swap: bool = False


# Rows x units x depth: of those tried the best, or within 4% of it, at up to 1,024 rows of D = H =
# 4096 (H100, 2026-11-24, benchmarks/results/training_sweep_backward_h100_4412564.json).
FEW_ROWS = ((16, Tile(16, 64, 128, 4, 4, 1, True)), (64, Tile(32, 64, 128, 4, 4, 1, True)))
ROW_TILES = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 64, 64, 4, 4, 4))
FULL = 0.9
"""The first of which there are nearly as many as multiprocessors, else the last. 1024 rows of D = H
= 4096 are 128 tiles of 128x256: 185 us on 132 multiprocessors, 192 by twice as many of 128x128."""
# Few rows: writing the gradients is all the work, so several programs on a multiprocessor.
WEIGHT_TILES = (
    (16, Tile(128, 64, 16, 4, 2)),
    (32, Tile(128, 64, 32, 4, 2)),
    (128, Tile(128, 64, 64, 4, 3)),
    (512, Tile(128, 128, 64, 4, 4)),
)
WEIGHT_TILE_LARGE = Tile(128, 256, 64, 8, 5)
NARROW = 2
"""Weight tiles are 64 x 64 where there are fewer large ones than this many a multiprocessor."""


def row_tile(counts: Sequence[int], units: Sequence[int], num_sms: int, itemsize: int) -> Tile:
    """The tile of B1 and B2, by the rows of the largest modality and the number of tiles."""
    most = max(counts)
    tile = next((tile for limit, tile in FEW_ROWS if most <= limit), None)
    if tile is None:
        many = (tile for tile in ROW_TILES if _tiles(tile, counts, units) >= FULL * num_sms)
        tile = next(many, ROW_TILES[-1])
    return tile if itemsize == 2 else Tile(16, 32, 32, 4, 2, 1, tile.swap)


def weight_tile(
    counts: Sequence[int], sizes: Sequence[tuple[int, int]], num_sms: int, itemsize: int
) -> Tile:
    """The tile of B3, by the rows of the largest modality and the number of tiles."""
    most = max(counts)
    tile = next((tile for limit, tile in WEIGHT_TILES if most <= limit), WEIGHT_TILE_LARGE)
    tiles = sum(math.ceil(a / tile.a) * math.ceil(b / tile.b) for a, b in sizes)
    if tile.b == 256 and tiles < NARROW * num_sms:
        tile = Tile(128, 128, 64, 8, 5)
        tiles = sum(math.ceil(a / 128) * math.ceil(b / 128) for a, b in sizes)
    if tiles < NARROW * num_sms:
        tile = Tile(64, 64, tile.k, 4, 3)
    return tile if itemsize == 2 else Tile(32, 32, 16, 4, 2)


def _tiles(tile: Tile, counts: Sequence[int], columns: Sequence[int]) -> int:
    return sum(
        math.ceil(n / tile.a) * math.ceil(m / tile.b) for n, m in zip(counts, columns, strict=True)
    )


class _Launch(NamedTuple):
    """A launch but for its tensors and numbers; constexprs in the order of the parameters."""

    programs: int
    constants: tuple[Any, ...]
    warps: int
    stages: int


class _Recipe(NamedTuple):
    """The launches of one backward; `before`: W2's half where hidden will be overwritten."""

    hidden: _Launch
    before: _Launch | None
    below: _Launch
    after: _Launch


class _Facts(NamedTuple):
    """The device table of some projectors, and the parts of their gradients' buffer."""

    table: torch.Tensor
    size: int
    places: list[tuple[tuple[int, ...], tuple[int, ...], int]]  # shape, strides, offset
    with_b2: list[bool]
    units: list[int]
    recipes: dict[tuple[Any, ...], _Recipe]


class BackwardKernels:
    """Launches the kernels of `backward_kernels.py` on one device.

    Holds small tables of weights' addresses (not the weights) and compiled kernels.
    """

    def __init__(self, device: torch.device) -> None:
        from mmqwen_kernels import backward_kernels

        self._kernels = backward_kernels
        self._device = device
        self._on_gpu = device.type == "cuda"
        self.num_sms = 4
        if self._on_gpu:
            self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._facts: dict[tuple[Any, ...], _Facts] = {}
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def gradients(
        self,
        grad: torch.Tensor,
        tensors: Sequence[Sequence[Any]],
        need_x: Sequence[bool],
        hidden: torch.Tensor | None = None,
    ) -> list[list[torch.Tensor | None]]:
        """Gradients of up to four modalities, all of whose weights want one.

        Args:
            grad: `[T, D]` in the dtype of the products.
            tensors: per modality with rows: x, slots, W1, b1, W2, b2. x and weights are read in
                the dtype of `grad`; gradients are given in that of the weights, which is one.
            need_x: which of the rows want a gradient.
            hidden: `[R, stride]` hidden activations of all modalities in their order, or None.

        Returns:
            Per modality, as `modality_by_torch`.
        """
        dtype = grad.dtype
        itemsize = dtype.itemsize
        xs = [_readable(t[0], dtype, 16 // itemsize) for t in tensors]
        first = [t[2] if t[2].dtype == dtype else t[2].to(dtype) for t in tensors]
        second = [t[4] if t[4].dtype == dtype else t[4].to(dtype) for t in tensors]
        biases = [t[3] if t[3].dtype == dtype else t[3].to(dtype) for t in tensors]
        first = [w if w.stride(1) == 1 else w.contiguous() for w in first]
        second = [w if w.stride(1) == 1 else w.contiguous() for w in second]
        widths = [x.shape[1] for x in xs]
        read = first
        if hidden is None:
            read = [_readable(w, dtype, 16 // itemsize) for w in first]
        facts = self._facts_of(read, widths, biases, second, tensors)
        slots = tensors[0][1].contiguous()
        if len(tensors) > 1:
            slots = torch.cat([t[1] for t in tensors])
        counts = tuple([x.shape[0] for x in xs])
        units = facts.units
        stride = max(units) if hidden is None else hidden.stride(0)
        total = sum(counts)
        recomputed = hidden is None
        in_place = recomputed and total * stride * itemsize >= IN_PLACE_BYTES
        how = facts.recipes.get((counts, in_place))
        if how is None:
            how = self._recipe(counts, in_place, units, widths, grad.shape[1], itemsize)
            if len(facts.recipes) >= _RECIPES_KEPT:
                facts.recipes.clear()
            facts.recipes[counts, in_place] = how
        entries, spare = len(xs), GROUP_OF - len(xs)
        x_args = (*xs, *xs[:1] * spare, *[x.stride(0) for x in xs], *[0] * spare)
        n_args = (*counts, *[0] * spare)
        kernels = self._kernels
        if hidden is None:
            hidden = torch.empty(total, stride, dtype=dtype, device=grad.device)
            self._launch(
                kernels._hidden_kernel,
                how.hidden,
                (facts.table, hidden, stride, *x_args, *n_args),
                dtype,
            )
        flat = torch.empty(facts.size, dtype=tensors[0][2].dtype, device=grad.device)
        below = hidden if in_place else torch.empty_like(hidden)
        sources = (facts.table, grad, grad.stride(0), grad.shape[1], slots, hidden, below, stride)
        dtypes = (dtype, slots.dtype, flat.dtype)
        weights = (*sources, *x_args, *n_args, flat)
        if how.before is not None:
            self._launch(kernels._weight_gradient_kernel, how.before, weights, dtypes)
        self._launch(kernels._hidden_gradient_kernel, how.below, (*sources, *n_args), dtypes)
        self._launch(kernels._weight_gradient_kernel, how.after, weights, dtypes)

        parts = iter([flat.as_strided(*place) for place in facts.places])
        result: list[list[torch.Tensor | None]] = []
        row = 0
        for m in range(entries):
            of_w1, of_b1, of_w2 = next(parts), next(parts), next(parts)
            of_b2 = next(parts) if facts.with_b2[m] else None
            of_x = None
            if need_x[m]:
                of_x = below[row : row + counts[m], : units[m]] @ first[m]
                of_x = of_x.to(tensors[m][0].dtype)
            row += counts[m]
            result.append([of_x, None, of_w1, of_b1, of_w2, of_b2])
        return result

    def _recipe(
        self,
        counts: Sequence[int],
        in_place: bool,
        units: Sequence[int],
        widths: Sequence[int],
        columns: int,
        itemsize: int,
    ) -> _Recipe:
        """The launches for these numbers of rows."""
        entries, step = len(counts), 16 // itemsize
        tile = row_tile(counts, units, self.num_sms, itemsize)
        shape = (entries, tile.a, tile.b, tile.k, tile.group, step)
        programs = _tiles(tile, counts, units)
        even = all(width % tile.k == 0 for width in widths)

        def launch(constants: tuple[Any, ...], programs: int, tile: Tile) -> _Launch:
            return _Launch(programs, constants, tile.warps, tile.stages)

        def weights(with_first: bool, with_second: bool) -> _Launch:
            sizes: list[tuple[int, int]] = []
            for hidden, width in zip(units, widths, strict=True):
                if with_second:
                    sizes.append((columns, hidden))
                if with_first:
                    sizes.append((hidden, width))
            t = weight_tile(counts, sizes, self.num_sms, itemsize)
            if not with_second:  # no slots to look up, which take a stage
                t = t._replace(stages=max(t.stages - 1, 2))
            programs = sum(math.ceil(a / t.a) * (math.ceil(b / t.b) + 1) for a, b in sizes)
            constants = (entries, with_first, with_second, t.a, t.b, t.k, 64, t.group, step)
            return launch(constants, programs, t)

        return _Recipe(
            launch((*shape, even, tile.swap), programs, tile),
            weights(False, True) if in_place else None,
            launch((*shape, columns % tile.k == 0, tile.swap), programs, tile),
            weights(True, not in_place),
        )

    def _facts_of(
        self,
        first: Sequence[torch.Tensor],
        widths: Sequence[int],
        biases: Sequence[torch.Tensor],
        second: Sequence[torch.Tensor],
        tensors: Sequence[Sequence[Any]],
    ) -> _Facts:
        """The table of these weights; `widths` are those of the rows as they are read."""
        shapes = [t[2].shape for t in tensors]
        with_b2 = [t[5] is not None for t in tensors]
        key = tuple(
            (
                w1.data_ptr(), w1.stride(0), shape, b1.data_ptr(),
                w2.data_ptr(), w2.shape, w2.stride(0), b2,
            )
            for w1, shape, b1, w2, b2 in zip(first, shapes, biases, second, with_b2, strict=True)
        )  # fmt: skip
        found = self._facts.get(key)
        if found is None:
            table: list[list[int]] = []
            places: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
            at = 0
            for w1, read, shape, b1, w2, b2 in zip(
                first, widths, shapes, biases, second, with_b2, strict=True
            ):
                (units, width), columns = shape, w2.shape[0]
                own = [units * read, units, columns * units] + [columns] * b2
                offsets = [at, at + own[0], at + own[0] + own[1], at + sum(own[:3]) if b2 else -1]
                table.append(
                    [read, units, w1.data_ptr(), w1.stride(0), b1.data_ptr(), w2.data_ptr()]
                    + [w2.stride(0), *offsets]
                    + [0] * (self._kernels.FACTS - 11)
                )
                places.append(((units, width), (read, 1), offsets[0]))
                places.append(((units,), (1,), offsets[1]))
                places.append(((columns, units), (units, 1), offsets[2]))
                if b2:
                    places.append(((columns,), (1,), offsets[3]))
                at += sum(own)
            host = torch.tensor(table, dtype=torch.int64)
            if self._on_gpu:
                if torch.cuda.is_current_stream_capturing():
                    raise RuntimeError(
                        "these projectors are new to the backward: run it once before capturing it"
                    )
                host = host.to(self._device)  # the host waits: other streams may be next
            found = _Facts(host, at, places, with_b2, [units for units, _ in shapes], {})
            while len(self._facts) >= 64:
                self._facts.pop(next(iter(self._facts)))
            self._facts[key] = found
        return found

    def _launch(self, kernel: Any, how: _Launch, args: tuple[Any, ...], dtypes: Any) -> None:
        """Launch; from the second time on without Triton's handling of each argument."""
        key = (kernel, how.constants, how.warps, how.stages, dtypes)
        grid = (how.programs, 1, 1)
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args, *how.constants)
            return
        compiled = kernel[grid](*args, *how.constants, num_warps=how.warps, num_stages=how.stages)
        if self._on_gpu and compiled is not None:
            self._compiled[key] = compiled


backward_kernels = PerDevice(BackwardKernels)
