"""Bounds on rounding that hold on every machine: in any order of summation, in any batch.

Which order a product of matrices is summed in depends on the BLAS, the CPU that it finds, the
threads, the alignment of memory and the number of rows. So a test asks for equal bits only where
nothing rounds (`fusion_cases.in_whole_numbers`), where nothing is summed, or where one program
runs twice on the same shapes; else it asks for what is derived here.
"""

from __future__ import annotations

import torch

from mmqwen_kernels import ACTIVATIONS, Norm, Projector
from mmqwen_kernels.reference import normalise_torch

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Largest relative error of rounding once to nearest."""

Interval = tuple[torch.Tensor, torch.Tensor]
"""Lowest and highest value of each element, float64."""


def linear_bounds(
    low: torch.Tensor,
    high: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> Interval:
    """What `x @ weight.T + bias` may give where `low <= x <= high`, summed in any order.

    A sum of n terms, each a product, errs by at most n u / (1 - n u) of the sum of their sizes,
    whatever the order and whether products round (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 3.1): u is that of float32, in which the kernels accumulate, or of
    float64. The sum is then rounded to `dtype` once; rounding never swaps two numbers.

    Args:
        low, high: `[R, K]` float64.
        weight: `[N, K]` of `dtype`; `bias`: `[N]` or None.

    Returns:
        Two `[R, N]` float64.
    """
    w = weight.double()
    b = w.new_zeros(len(w)) if bias is None else bias.double()
    middle, radius = (low + high) / 2, (high - low) / 2
    terms = w.shape[1] + 1
    unit = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    sizes = (middle.abs() + radius) @ w.abs().T + b.abs()
    # The second: these very lines are summed in float64.
    share = terms * unit / (1 - terms * unit) + 2 * terms * UNIT[torch.float64]
    reach = radius @ w.abs().T + share * sizes
    center = middle @ w.T + b
    return (center - reach).to(dtype).double(), (center + reach).to(dtype).double()


_ULPS = 16
"""Units of float32 by which an activation's or a norm's own steps may err, of what they are given:
each is some five operations of half a unit, and the GPU's exp, erf and rsqrt err by two."""

_LOWEST = {"gelu": -0.7517916, "gelu_tanh": -0.7524614, "silu": -1.2784645}
"""Where an activation has its minimum; on either side it is monotonic."""


def activation_bounds(low: torch.Tensor, high: torch.Tensor, name: str, unit: float) -> Interval:
    """What an activation of numbers between `low` and `high` may be, not yet rounded."""
    ends = [ACTIVATIONS[name](end) for end in (low, high)]
    below, above = torch.minimum(*ends), torch.maximum(*ends)
    if name in ("relu", "none"):
        return below, above
    lowest = low.new_tensor(_LOWEST[name])
    inside = (low <= lowest) & (lowest <= high)
    below = torch.where(inside, torch.minimum(below, ACTIVATIONS[name](lowest)), below)
    # Of the argument, not of the result: 1 + erf(x) cancels where x is far below zero.
    slack = _ULPS * unit * torch.maximum(low.abs(), high.abs())
    return below - slack, above + slack


def norm_bounds(rows: torch.Tensor, norm: Norm) -> Interval:
    """What a norm of `rows` may give: statistics in float32, in any order, rounded once."""
    unit = UNIT[torch.float64 if rows.dtype == torch.float64 else torch.float32]
    x = rows.double()
    exact = normalise_torch(x, norm._replace(
        weight=norm.weight.double(), bias=None if norm.bias is None else norm.bias.double()
    ))  # fmt: skip
    # The mean errs by at most d units of the mean size, the root by half of what its square does.
    size = x.abs().mean(-1, keepdim=True)
    spread = x.var(-1, correction=0, keepdim=True) if norm.kind == "layer" else x.square().mean(
        -1, keepdim=True
    )  # fmt: skip
    scale = torch.rsqrt(spread + norm.eps) * norm.weight.double().abs()
    terms = rows.shape[-1] + _ULPS
    shift = 0 if norm.bias is None else norm.bias.double().abs()
    reach = unit * (terms * (x.abs() + size) * scale + _ULPS * shift)
    return tuple((exact + sign * reach).to(rows.dtype).double() for sign in (-1, 1))  # type: ignore[return-value]


def projected_bounds(rows: torch.Tensor, projector: Projector) -> Interval:
    """What `W2 act(W1 norm(x) + b1) + b2` may give for `rows` `[R, d]`: two `[R, D]` float64.

    As `project_rows_torch` defines it: sums in float32, each step's result rounded to the rows'
    dtype. A hidden activation that no order can carry over a rounding boundary is one number, so
    in half precision most of the interval is the accumulation's alone.
    """
    dtype = rows.dtype
    low = high = rows.double()
    if projector.norm is not None:
        low, high = norm_bounds(rows, projector.norm)
    if projector.w1 is not None:
        low, high = linear_bounds(low, high, projector.w1, projector.b1, dtype)
        unit = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
        low, high = activation_bounds(low, high, projector.activation, unit)
        low, high = low.to(dtype).double(), high.to(dtype).double()
    return linear_bounds(low, high, projector.w2, projector.b2, dtype)


def assert_within(got: torch.Tensor, bounds: Interval) -> None:
    """Every element lies within its bounds; NaN lies nowhere."""
    low, high = bounds
    found = got.double()
    outside = ~((low <= found) & (found <= high))
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(outside.sum())} of {outside.numel()} elements lie where no order of summation"
            f" leads; the first, {at}, is {found[at].item()!r}, expected"
            f" {low[at].item()!r} to {high[at].item()!r}"
        )


def random_walk(projector: Projector) -> float:
    """Relative Frobenius error that float32 sums of random signs stay below, in any order.

    Each of the d + H additions behind an element errs by at most a unit of its partial sum, whose
    root mean square is below the whole's; errors add up as their squares do. Where sums are too
    long for `linear_bounds`, whose worst case grows with their length, this still tells float32
    from a multiplication in TF32 (2**-11).
    """
    return UNIT[torch.float32] * (projector.width + projector.w2.shape[1]) ** 0.5
