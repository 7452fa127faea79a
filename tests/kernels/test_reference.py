"""The torch twins, against a loop over rows in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion_cases import EVERY_SPEC, Case, make_case, spec_name
from rounding import assert_within, projected_bounds

from mmqwen_kernels import Norm, project_rows


def activate(z: torch.Tensor, name: str) -> torch.Tensor:
    """By the formulas of the papers, element by element."""
    formula: dict[str, Callable[[float], float]] = {
        "relu": lambda v: max(v, 0.0),
        "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
        "gelu_tanh": lambda v: (
            v * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        ),
        "silu": lambda v: v / (1 + math.exp(-v)),
        "none": lambda v: v,
    }
    return torch.tensor([formula[name](v) for v in z.tolist()], dtype=z.dtype)


def normalise(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    if norm.kind == "layer":
        assert norm.bias is not None
        x = x - x.mean()
        return x / (x.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def by_hand(case: Case) -> torch.Tensor:
    """The op's definition, one token at a time."""
    rows = [(m, x.double()) for m, item in case.items for x in item]  # type: ignore[misc]
    at = dict(zip(case.slots, rows, strict=True))
    out = torch.zeros(len(case.input_ids), case.columns, dtype=torch.float64)
    for t, token in enumerate(case.input_ids.tolist()):
        if t in at:
            m, x = at[t]
            p = case.projectors[m].map(torch.Tensor.double)
            if p.norm is not None:
                x = normalise(x, p.norm)
            if p.w1 is not None:
                x = activate(p.w1 @ x + (0 if p.b1 is None else p.b1), p.activation)
            out[t] = p.w2 @ x + (0 if p.b2 is None else p.b2)
        elif 0 <= token - case.vocab_start < case.table.shape[0]:
            out[t] = case.table[token - case.vocab_start].double()
    return out


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=spec_name)
def test_twin_equals_the_loop_of_every_projector(spec: dict[str, Any]) -> None:
    case = make_case([24], [5], torch.float64, specs=[spec])
    for got in (by_hand(case), case.exact(), case.run("torch")):
        case.check(got)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spec", EVERY_SPEC, ids=spec_name)
def test_twin_rounds_as_a_torch_module_of_its_dtype(
    spec: dict[str, Any], dtype: torch.dtype
) -> None:
    case = make_case([24], [9], dtype, specs=[spec])
    case.check(case.run("torch"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("widths", "counts", "vocab_start"),
    [([8], [0], 0), ([8], [1], 0), ([8, 33], [5, 7], 0), ([8, 33, 24], [3, 0, 9], 20)],
)
def test_twin_equals_the_loop(
    widths: list[int], counts: list[int], vocab_start: int, bias: bool
) -> None:
    case = make_case(widths, counts, torch.float64, bias=bias, text=20)
    case.vocab_start = vocab_start
    for got in (by_hand(case), case.exact(), case.run("torch")):
        case.check(got)


def test_ids_at_slots_of_rows_do_not_matter() -> None:
    case = make_case([8], [3], torch.float32)
    want = case.run("torch")
    case.input_ids[case.slots] = 10**6
    assert torch.equal(case.run("torch"), want)


def test_project_rows() -> None:
    case = make_case([8], [4], torch.float64, text=0)
    rows = torch.cat([x for _, x in case.items])  # type: ignore[misc]
    low, high = case.bounds()
    assert_within(project_rows(rows, case.projectors[0]), (low[case.slots], high[case.slots]))


def test_nan_rows_stay_in_their_slots() -> None:
    case = make_case([8], [3], torch.float32, item_rows=1)
    case.items[1][1].fill_(float("nan"))  # type: ignore[index]
    out = case.run("torch")
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [case.slots[1]]


def test_gradients_reach_weights_and_rows() -> None:
    case = make_case([8], [3], torch.float64, item_rows=3)
    w1 = case.projectors[0].w1.requires_grad_()
    rows = case.items[0][1].requires_grad_()  # type: ignore[index]
    case.run("torch").sum().backward()
    assert w1.grad is not None
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_bounds_hold_for_every_order_and_for_no_fault(dtype: torch.dtype) -> None:
    """The measure of the other tests: no order of summation fails it, one product left out does."""
    case = make_case([33], [40], dtype, text=0, item_rows=40)
    (_, rows), (w1, b1, w2, b2) = case.items[0], case.projectors[0][:4]  # type: ignore[misc]
    assert b2 is not None
    bounds = projected_bounds(rows, case.projectors[0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def by_columns(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, order: list[int]) -> Any:
        """`x @ w.T + b`, one product at a time."""
        total = torch.zeros(len(x), len(w), dtype=wide)
        for k in order:
            total += x[:, k, None].to(wide) * w[:, k].to(wide)
        return total + b.to(wide)

    def project(first: list[int], second: list[int], rounded: bool = True) -> torch.Tensor:
        hidden = by_columns(rows, w1, b1, first).clamp(min=0)
        return by_columns(hidden.to(dtype) if rounded else hidden, w2, b2, second).to(dtype)

    shuffled = random.Random(0)
    orders = list(range(33)), list(range(96))
    for _ in range(20):
        assert_within(project(*orders), bounds)
        for order in orders:
            shuffled.shuffle(order)
    for fault in (
        project(orders[0][1:], orders[1]),
        project(orders[0], orders[1][1:]),
        project(*orders) * float("nan"),
    ):
        with pytest.raises(AssertionError, match="no order of summation"):
            assert_within(fault, bounds)
    if dtype == torch.float16:
        with pytest.raises(AssertionError, match="no order of summation"):
            assert_within(project(*orders, rounded=False), bounds)
