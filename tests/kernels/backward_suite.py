"""The backward's kernels under Triton's interpreter: `test_autograd.py` runs it with
TRITON_INTERPRET=1. float16 and float32: the interpreter's `tl.dot` on bfloat16 returns garbage.
"""

from __future__ import annotations

import pytest
import torch
from test_autograd import gradients, leaves, make

from mmqwen_kernels import autograd, backward
from mmqwen_kernels.autograd import fused_embed
from mmqwen_kernels.backward import Tile


def both(inputs, **options):
    """Outputs and gradients with the kernels' backward, and with torch's."""
    table = inputs[1]
    weight = torch.randn(inputs[0].shape[0], table.shape[1], dtype=torch.float64)
    torch.manual_seed(0)
    return [
        gradients(fused_embed, inputs, weight, backend="triton", engine=engine, **options)
        for engine in ("kernels", "torch")
    ]


def check(inputs, **options) -> None:
    got, want = both(inputs, **options)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3}[inputs[1].dtype]
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        scale = theirs.double().norm() + 1e-9
        assert (mine.double() - theirs.double()).norm() <= tolerance * scale


@pytest.mark.parametrize("counts", [(1,), (4, 3), (20, 0, 33), (3, 17, 2, 40)], ids=str)
def test_counts(counts):
    check(make(counts, (24, 40, 48), tokens=130, dtype=torch.float32, width_step=8))


def test_float16():
    check(make((0, 37), (24, 40, 48), tokens=130, dtype=torch.float16, width_step=8))


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("place", ["in place", "apart"])
def test_tiles(swap, place, monkeypatch):
    """Several tiles in each direction, sizes that are no multiples of them, both orders."""
    monkeypatch.setattr(
        backward.backward_kernels, "made", {}
    )  # what was chosen before is remembered
    monkeypatch.setattr(backward, "row_tile", lambda *_: Tile(16, 32, 32, 4, 2, 2, swap))
    monkeypatch.setattr(backward, "weight_tile", lambda *_: Tile(32, 16, 16, 4, 2, 3))
    monkeypatch.setattr(backward, "IN_PLACE_BYTES", 0 if place == "in place" else 1 << 40)
    check(make((70, 35), (40, 104, 88), tokens=150, dtype=torch.float32, width_step=16))


def test_five_modalities():
    check(make((2,) * 5, (24, 40, 48), tokens=30, dtype=torch.float32, width_step=8))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_odd_widths_beside_even_ones(kept, dtype, monkeypatch):
    """24, 25 and 26 wide; with hidden activations kept by forward, and computed again."""
    monkeypatch.setattr(autograd, "keeps_hidden", lambda *_: kept)
    recomputed = []
    original = backward.BackwardKernels.gradients

    def noting(self, grad, tensors, need_x, hidden=None):
        recomputed.append(hidden is None)
        return original(self, grad, tensors, need_x, hidden)

    monkeypatch.setattr(backward.BackwardKernels, "gradients", noting)
    check(make((4, 3, 5), (24, 40, 48), tokens=30, dtype=dtype))
    assert recomputed == [not kept]


def test_odd_hidden_units_beside_even_ones():
    """By torch, while the others go by the kernels."""
    inputs = make((4, 3), (24, 40, 48), tokens=30, dtype=torch.float32)
    odd = make((5,), (24, 42, 48), tokens=30, dtype=torch.float32)
    slots = [*inputs[3], torch.arange(30)[~torch.isin(torch.arange(30), torch.cat(inputs[3]))][:5]]
    inputs = (inputs[0], inputs[1], [*inputs[2], *odd[2]], slots, [*inputs[4], *odd[4]])
    weight = torch.randn(30, 48, dtype=torch.float64)
    got = gradients(fused_embed, inputs, weight, backend="triton")
    want = gradients(fused_embed, inputs, weight, backend="triton", engine="torch")
    torch.testing.assert_close(got, want)


def test_no_output_bias_and_strided_rows():
    ids, table, _, slots, (p,) = make((9,), (24, 40, 48), tokens=30, dtype=torch.float32)
    wide = torch.randn(9, 48, requires_grad=True)
    p = p._replace(b2=None)
    weight = torch.randn(30, 48)
    results = []
    for engine in ("kernels", "torch"):
        out = fused_embed(ids, table, [wide[:, :24]], slots, [p], backend="triton", engine=engine)
        wanted = [wide, p.w1, p.b1, p.w2]
        results.append(torch.autograd.grad((out * weight).sum(), wanted))
    torch.testing.assert_close(*results)


def test_slots_that_are_a_column_of_something():
    ids, table, rows, slots, projectors = make((9,), (24, 40, 48), tokens=30, dtype=torch.float32)
    apart = torch.stack([slots[0], torch.full_like(slots[0], 10**6)], dim=1)[:, 0]
    assert not apart.is_contiguous()
    results = []
    for at, engine in ((apart, "kernels"), (slots[0], "torch")):
        out = fused_embed(ids, table, rows, [at], projectors, backend="triton", engine=engine)
        results.append(torch.autograd.grad(out.square().sum(), [*rows, *projectors[0]]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_frozen_weights_and_odd_units_are_left_to_torch():
    inputs = make((4,), (24, 40, 48), tokens=30, dtype=torch.float32)
    inputs[4][0].b1.requires_grad_(False)
    weight = torch.randn(30, 48, dtype=torch.float64)
    out = fused_embed(*inputs, backend="triton", engine="kernels")
    with pytest.raises(ValueError, match="some weights are frozen"):
        torch.autograd.grad((out * weight).sum(), inputs[4][0].w1)
    odd = make((4,), (24, 42, 48), tokens=30, dtype=torch.float32)
    with pytest.raises(ValueError, match="no multiples of 4"):
        both(odd)


def test_float32_weights_get_float32_gradients():
    """Master weights under autocast: products in float16, gradients never rounded to it."""
    ids, table, rows, slots, projectors = make(
        (9, 5), (24, 40, 48), 30, dtype=torch.float32, width_step=8
    )
    table = table.detach().half().requires_grad_()
    rows = [x.detach().half().requires_grad_() for x in rows]
    weight = torch.randn(30, 48).half()
    results = []
    for engine in ("kernels", "torch"):
        with torch.autocast("cpu", torch.float16):
            out = fused_embed(ids, table, rows, slots, projectors, backend="triton", engine=engine)
        results.append(torch.autograd.grad(out, leaves(table, rows, projectors), weight))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        scale = theirs.double().norm() + 1e-9
        assert (mine.double() - theirs.double()).norm() <= 4e-3 * scale


def test_runs_are_the_same_bits():
    inputs = make((33, 2), (24, 40, 48), tokens=60, dtype=torch.float32, width_step=8)
    weight = torch.randn(60, 48, dtype=torch.float64)
    first, second = (
        gradients(fused_embed, inputs, weight, backend="triton", engine="kernels")[1]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
