"""The fused function's gradients: exact in float64, and no worse than torch's own in less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmqwen_kernels import autograd, backward
from mmqwen_kernels.autograd import FusedProjectorFunction, fused_embed, select_training_path
from mmqwen_kernels.reference import Projector, fuse_embeddings_torch, project_rows_torch

SHAPES = [(7, 5, 3), (24, 33, 17), (40, 64, 48)]  # d, H, D: odd ones too


def make(counts, shape=(7, 5, 3), tokens=19, vocab=11, dtype=torch.float64, seed=0, width_step=1):
    """ids, table, rows, slots, projectors; every floating tensor requires a gradient."""
    g = torch.Generator().manual_seed(seed)
    width, hidden, out = shape

    def draw(*size, scale=1.0):
        return (torch.randn(*size, generator=g, dtype=torch.float64) * scale).to(dtype)

    ids = torch.randint(vocab, (tokens,), generator=g)
    order = torch.randperm(tokens, generator=g)
    rows, slots, projectors, at = [], [], [], 0
    for m, count in enumerate(counts):
        d = width + m * width_step
        rows.append(draw(count, d).requires_grad_())
        slots.append(order[at : at + count])
        at += count
        weights = (draw(hidden, d, scale=d**-0.5), draw(hidden), draw(out, hidden), draw(out))
        projectors.append(Projector(*(w.requires_grad_() for w in weights)))
    return ids, draw(vocab, out).requires_grad_(), rows, slots, projectors


def leaves(table, rows, projectors):
    return [table, *rows, *(w for p in projectors for w in p)]


def eager(ids, table, rows, slots, projectors, padding_idx=None):
    """What the HF model does, with torch's own autograd."""
    out = torch.nn.functional.embedding(ids, table, padding_idx=padding_idx)
    placed = [project_rows_torch(x, p).to(out.dtype) for x, p in zip(rows, projectors, strict=True)]
    return out.index_put((torch.cat(slots),), torch.cat(placed))


def gradients(function, inputs, weight, **options):
    out = function(*inputs, **options)
    loss = (out.double() * weight).sum()
    return out, torch.autograd.grad(loss, leaves(inputs[1], inputs[2], inputs[4]))


@pytest.mark.parametrize("counts", [(4,), (3, 5), (0, 4), (1, 0, 2), (0, 0)])
def test_gradcheck(counts):
    ids, table, rows, slots, projectors = make(counts)

    def run(*flat):
        weights = iter(flat[1 + len(rows) :])
        rebuilt = [Projector(*(next(weights) for _ in range(4))) for _ in projectors]
        return fused_embed(ids, flat[0], flat[1 : 1 + len(rows)], slots, rebuilt)

    assert torch.autograd.gradcheck(run, leaves(table, rows, projectors))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_against_float64_are_no_worse_than_torch(shape, dtype):
    inputs = make((50, 30), shape, tokens=200, vocab=40, dtype=dtype)
    exact = make((50, 30), shape, tokens=200, vocab=40, dtype=dtype)
    exact = (
        exact[0],
        exact[1].detach().double().requires_grad_(),
        [x.detach().double().requires_grad_() for x in exact[2]],
        exact[3],
        [Projector(*(w.detach().double().requires_grad_() for w in p)) for p in exact[4]],
    )
    weight = torch.randn(200, shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = weight.double()
    want_out, want = gradients(eager, exact, weight)
    got_out, got = gradients(fused_embed, inputs, weight)
    own_out, own = gradients(eager, inputs, weight)
    assert torch.equal(got_out, own_out)
    for mine, theirs, true in zip(got, own, want, strict=True):
        error = (mine.double() - true).norm()
        assert error <= 1.1 * (theirs.double() - true).norm() + 1e-12
    assert (got_out.double() - want_out).norm() <= 1.1 * (
        own_out.double() - want_out
    ).norm() + 1e-12


def test_forward_is_the_twin():
    ids, table, rows, slots, projectors = make((4, 3), dtype=torch.float32)
    got = fused_embed(ids, table, rows, slots, projectors)
    with torch.no_grad():
        want = fuse_embeddings_torch(ids, table.clone(), rows, slots, projectors)
    assert torch.equal(got, want)


def test_an_item_used_twice_gets_the_sum():
    ids, table, (x,), (at,), projectors = make((3,), tokens=19)
    more = torch.tensor([t for t in range(19) if t not in at.tolist()][:3])
    weight = torch.randn(19, 3, dtype=torch.float64)

    def gradient(function):
        out = function(ids, table, [torch.cat([x, x])], [torch.cat([at, more])], projectors)
        return torch.autograd.grad((out * weight).sum(), x)[0]

    torch.testing.assert_close(gradient(fused_embed), gradient(eager))


@pytest.mark.parametrize("wanted", ["table", "rows", "w1", "b1", "w2", "b2", "weights"])
def test_frozen_parts_are_skipped(wanted, monkeypatch):
    ids, table, rows, slots, projectors = make((4, 3))
    parts = {"table": [table], "rows": rows, "weights": [w for p in projectors for w in p]}
    parts |= {name: [getattr(p, name) for p in projectors] for name in Projector._fields}
    weight = torch.randn(19, 3, dtype=torch.float64)
    want = torch.autograd.grad(
        (eager(ids, table, rows, slots, projectors) * weight).sum(), parts[wanted]
    )
    for tensor in leaves(table, rows, projectors):
        tensor.requires_grad_(False)
    for tensor in parts[wanted]:
        tensor.requires_grad_(True)
    seen = []
    original = FusedProjectorFunction.backward

    def spy(ctx, grad):
        seen.extend(original(ctx, grad))
        return tuple(seen)

    monkeypatch.setattr(FusedProjectorFunction, "backward", staticmethod(spy))
    (fused_embed(ids, table, rows, slots, projectors) * weight).sum().backward()
    assert sum(g is not None for g in seen) == len(parts[wanted])
    for tensor, true in zip(parts[wanted], want, strict=True):
        torch.testing.assert_close(tensor.grad, true)


def test_nothing_to_learn_makes_no_graph():
    ids, table, rows, slots, projectors = make((4,))
    for tensor in leaves(table, rows, projectors):
        tensor.requires_grad_(False)
    assert not fused_embed(ids, table, rows, slots, projectors).requires_grad


def test_a_modality_without_rows_gets_zeros():
    ids, table, rows, slots, projectors = make((4, 0))
    fused_embed(ids, table, [rows[0], None], [slots[0], None], projectors).sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in projectors[1])


def test_padding_gets_no_gradient():
    ids, table, rows, slots, projectors = make((4,))
    pad = int(ids[next(t for t in range(19) if t not in slots[0].tolist())])
    weight = torch.randn(19, 3, dtype=torch.float64)
    got = gradients(fused_embed, (ids, table, rows, slots, projectors), weight, padding_idx=pad)
    want = gradients(eager, (ids, table, rows, slots, projectors), weight, padding_idx=pad)
    assert not got[1][0][pad].any()
    torch.testing.assert_close(got[1], want[1])


def test_strided_rows_and_no_output_bias():
    ids, table, _, slots, (projector,) = make((4,))
    wide = torch.randn(4, 14, dtype=torch.float64, requires_grad=True)
    projector = projector._replace(b2=None)
    fused_embed(ids, table, [wide[:, ::2]], slots, [projector]).sum().backward()
    other = wide.detach().clone().requires_grad_()
    eager(ids, table, [other[:, ::2]], slots, [projector]).sum().backward()
    torch.testing.assert_close(wide.grad, other.grad)


@pytest.mark.parametrize("keep", [True, False])
def test_hidden_activations_are_kept_by_the_rule(keep, monkeypatch):
    asked = []
    monkeypatch.setattr(autograd, "keeps_hidden", lambda *shape: asked.append(shape) or keep)
    ids, table, rows, slots, projectors = make((12,), (7, 1000, 3), dtype=torch.float32)
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    own = {t.data_ptr() for t in [ids, *slots, *leaves(table, rows, projectors)]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = fused_embed(ids, table, rows, slots, projectors)
    assert asked == [(12, 7, 1000, 3, 4)]
    assert [t.shape for t in kept if t.data_ptr() not in own] == [(12, 1000)] * keep
    weight = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves(table, rows, projectors), weight)
    peer = eager(ids, table, rows, slots, projectors)
    want = torch.autograd.grad(peer, leaves(table, rows, projectors), weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_rule_of_what_is_kept():
    assert backward.keeps_hidden(64, 64, 4096, 4096, 2)  # half a MiB
    assert backward.keeps_hidden(16384, 1024, 4096, 4096, 2)  # a fifteenth of the work
    assert not backward.keeps_hidden(16384, 768, 4096, 4096, 2)


@pytest.mark.parametrize(
    ("rows", "size", "name"),
    [
        (1024, 4096, "kernels"),
        (1025, 4096, "torch"),
        (2048, 1024, "kernels"),
        (2049, 1024, "torch"),
    ],
)
def test_the_rule_of_the_backward(rows, size, name, monkeypatch):
    monkeypatch.setattr(backward, "_why_no_kernels", lambda *_: None)
    tensors = [torch.empty(rows, 8, device="meta"), None, None, None]
    tensors.append(torch.empty(size, size, device="meta"))
    chosen = backward.select_backward(tensors, tensors[0], torch.bfloat16, [True])
    assert chosen.name == name
    assert str(rows) in chosen.reason


def test_the_tiles_of_the_backward():
    """The winners of training_sweep_backward_h100_4412564.json, on 132 multiprocessors."""

    def tile(counts, units):
        found = backward.row_tile(counts, [units] * len(counts), 132, 2)
        return found.a, found.b

    assert tile([16], 4096) == tile([16] * 4, 4096) == (16, 64)
    assert tile([64], 4096) == (32, 64)
    assert tile([256], 4096) == (64, 64)
    assert tile([896], 4096) == (128, 128)
    assert tile([1024], 4096) == tile([256] * 4, 4096) == (128, 256)
    assert tile([1024], 1024) == (64, 64)


def test_backward_may_run_twice():
    """What forward kept is not overwritten."""
    inputs = make((12, 5), dtype=torch.float32)
    out = fused_embed(*inputs)
    weight = torch.randn_like(out)
    wanted = leaves(inputs[1], inputs[2], inputs[4])
    first = torch.autograd.grad(out, wanted, weight, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, wanted, weight)))


@pytest.mark.parametrize("keep", [True, False])
def test_chunks_of_rows_change_nothing(keep, monkeypatch):
    monkeypatch.setattr(autograd, "keeps_hidden", lambda *_: keep)
    inputs = make((33, 20), (24, 33, 17), tokens=60)
    weight = torch.randn(60, 17, dtype=torch.float64)
    want = gradients(fused_embed, inputs, weight)
    monkeypatch.setattr(backward, "CHUNK_BYTES", 7 * 33 * 8)
    got = gradients(fused_embed, inputs, weight)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("counts", [(4, 3), (4, 0)])
def test_compiled(counts):
    torch._dynamo.reset()
    inputs = make(counts, dtype=torch.float32)
    weight = torch.randn(19, 3, dtype=torch.float64)
    compiled = torch.compile(fused_embed, backend="aot_eager", fullgraph=True)
    got = gradients(compiled, inputs, weight)
    want = gradients(fused_embed, inputs, weight)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_autocast_equals_torch():
    inputs = make((4, 3), (24, 33, 17), dtype=torch.float32)
    weight = torch.randn(19, 17, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(fused_embed, inputs, weight)
        want = gradients(eager, inputs, weight)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_float32_projector_beside_a_bfloat16_table():
    ids, table, rows, slots, projectors = make((4,), (24, 33, 17), dtype=torch.float32)
    table = table.detach().bfloat16().requires_grad_()
    weight = torch.randn(19, 17, dtype=torch.float64)
    got = gradients(fused_embed, (ids, table, rows, slots, projectors), weight)
    want = gradients(eager, (ids, table, rows, slots, projectors), weight)
    assert got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def test_what_does_not_fit_is_refused():
    ids, table, rows, slots, projectors = make((4,))
    with pytest.raises(ValueError, match=r"expected \[R, 7\] and \[R\]"):
        fused_embed(ids, table, [rows[0][:, :5]], slots, projectors)
    with pytest.raises(ValueError, match="rows without slots"):
        fused_embed(ids, table, rows, [None], projectors)
    with pytest.raises(ValueError, match="one of each per modality"):
        fused_embed(ids, table, rows, slots, [])


def test_the_rule_says_why():
    embedding, linear = torch.nn.Embedding(4, 3), torch.nn.Linear(2, 3)
    choice = select_training_path(embedding, [linear])
    assert choice.name == "torch"
    assert "cpu" in choice.reason
    assert select_training_path(embedding, [linear], "fused").name == "fused"
    with pytest.raises(ValueError, match="expected 'auto', 'fused' or 'torch'"):
        select_training_path(embedding, [linear], "fast")
    linear.register_forward_hook(lambda *_: None)
    assert select_training_path(embedding, [linear]).reason == "a Linear has hooks"
    with pytest.raises(ValueError, match="has hooks; use path='torch'"):
        select_training_path(embedding, [linear], "fused")
    adapted = torch.nn.Sequential(torch.nn.Linear(2, 3))
    assert "Sequential stands where" in select_training_path(embedding, [adapted]).reason


def test_kernel_forward_under_the_interpreter(tmp_path):
    """The Triton forward gives torch's values and its gradients the same backward."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    code = """
import sys, torch
sys.path[:0] = [sys.argv[1]]
from test_autograd import make, gradients, fused_embed
for counts in [(4, 3), (0, 5), (0, 0)]:
    inputs = make(counts, (24, 32, 16), dtype=torch.float32)
    weight = torch.randn(19, 16, dtype=torch.float64)
    got = gradients(fused_embed, inputs, weight, backend="triton")
    want = gradients(fused_embed, inputs, weight, backend="torch")
    torch.testing.assert_close(got, want)
inputs = make((4, 3), (24, 32, 16), dtype=torch.float32)
table = inputs[1].detach().half().requires_grad_()
with torch.autocast("cpu", torch.float16):  # fp32 weights, projected in the table's dtype
    inputs = (inputs[0], table, *inputs[2:])
    weight = torch.randn(19, 16, dtype=torch.float64)
    got = gradients(fused_embed, inputs, weight, backend="triton")
    want = gradients(fused_embed, inputs, weight, backend="torch")
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env=environment, cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]


def test_kernel_backward_under_the_interpreter():
    pytest.importorskip("triton")
    suite = Path(__file__).parent / "backward_suite.py"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=suite.parents[2],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]


def test_a_plan_without_rows_lies_where_its_tokens_do():
    """Found on a GPU: its tables lay on the CPU, and the backend refused them."""
    from mmqwen_kernels.autograd import _plan_on_device

    rows = [torch.empty(0, 8, device="meta"), torch.empty(0, 16, device="meta")]
    slots = [torch.empty(0, dtype=torch.int64, device="meta")] * 2
    plan = _plan_on_device(rows, slots, 5)
    assert plan.tables.buffer.device == plan.buffer.device == torch.device("meta")
