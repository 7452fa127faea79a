"""Gradients of the fused path on a GPU: `pytest tests/kernels/test_autograd_gpu.py -m gpu`."""

from __future__ import annotations

import pytest
import torch
from test_autograd import eager, leaves

from mmqwen_kernels import Projector, autograd, backward, fuse_embeddings
from mmqwen_kernels.autograd import fused_embed
from mmqwen_kernels.backward import Tile

pytestmark = pytest.mark.gpu

HALVES = (torch.bfloat16, torch.float16)
WIDTHS = (768, 512, 1024, 384)


@pytest.fixture(autouse=True)
def _full_precision() -> None:
    """torch's own products without split accumulation in 16 bits: a fair measure of error."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def make(counts, shape=(None, 1024, 1024), dtype=torch.bfloat16, text=50, vocab=500, seed=0):
    """ids, table, rows, slots, projectors on the GPU; every floating tensor wants a gradient."""
    g = torch.Generator("cuda").manual_seed(seed)
    width, hidden, out = shape

    def draw(*size, scale=1.0):
        values = torch.randn(*size, generator=g, device="cuda") * scale
        return values.to(dtype).requires_grad_()

    tokens = sum(counts) + text
    ids = torch.randint(vocab, (tokens,), generator=g, device="cuda")
    order = torch.randperm(tokens, generator=g, device="cuda")
    slots = [part.clone() for part in order[: sum(counts)].split(list(counts))]
    widths = WIDTHS[: len(counts)] if width is None else [width + 8 * m for m in range(len(counts))]
    rows = [draw(n, d) for n, d in zip(counts, widths, strict=True)]
    projectors = [
        Projector(
            draw(hidden, d, scale=d**-0.5),
            draw(hidden, scale=0.1),
            draw(out, hidden, scale=hidden**-0.5),
            draw(out, scale=0.1),
        )
        for d in widths
    ]
    return ids, draw(vocab, out, scale=0.02), rows, slots, projectors


def double(inputs):
    def raised(tensor):
        return tensor.detach().double().requires_grad_()

    ids, table, rows, slots, projectors = inputs
    projectors = [Projector(*map(raised, p)) for p in projectors]
    return ids, raised(table), [raised(x) for x in rows], slots, projectors


def run(function, inputs, grad, **options):
    out = function(*inputs, **options)
    wanted = leaves(inputs[1], inputs[2], inputs[4])
    return out, torch.autograd.grad(out, wanted, grad.to(out.dtype))


def check(inputs, **options):
    """Error against float64 within 1.1 times eager torch's, for the output and each gradient."""
    ids, table = inputs[:2]
    g = torch.Generator("cuda").manual_seed(1)
    grad = torch.randn(len(ids), table.shape[1], generator=g, device="cuda").to(table.dtype)
    want = run(eager, double(inputs), grad)
    own = run(eager, inputs, grad)
    got = run(fused_embed, inputs, grad, **options)
    every = [(f[0], *f[1]) for f in (got, own, want)]
    for at, (mine, theirs, true) in enumerate(zip(*every, strict=True)):
        assert mine.dtype == theirs.dtype
        assert mine.shape == true.shape
        error, bound = ((x.double() - true).norm() for x in (mine, theirs))
        assert error <= 1.1 * bound + 1e-9 * true.norm(), (at, float(error), float(bound))
    return got


COUNTS = [(1,), (33,), (64,), (300,), (2000,)]
COUNTS += [(5, 0, 130), (16, 16, 16, 16), (0, 0)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("engine", ["kernels", "torch"])
def test_gradients_are_no_worse_than_torch(counts, engine):
    check(make(counts), backend="triton", engine=engine)


@pytest.mark.parametrize("engine", ["kernels", "torch"])
def test_float16(engine):
    check(make((40, 300), dtype=torch.float16), backend="triton", engine=engine)


@pytest.mark.parametrize("rows", [64, 1024, 9000])
def test_full_size(rows):
    """D = H = 4096; the last one in place and, for torch, in chunks."""
    inputs = make((rows,), (768, 4096, 4096), text=rows)
    for engine in ("kernels", "torch"):
        check(inputs, backend="triton", engine=engine)
        torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(384, 1000, 520), (770, 130, 264), (24, 40, 48), (7, 33, 17)])
def test_odd_sizes(shape, dtype):
    """Multiples of 8 and others, each by what "auto" picks."""
    check(make((37, 5), shape, dtype=dtype), backend="triton")


def test_tiles_of_every_kind(monkeypatch):
    """Each tile that a launch may choose, on sizes that are no multiples of it."""
    inputs = make((200, 77), (768, 1064, 1032))
    narrow = Tile(64, 64, 64, 4, 3)
    for tile in (*[t for _, t in backward.FEW_ROWS], *backward.ROW_TILES):
        monkeypatch.setattr(
            backward.backward_kernels, "made", {}
        )  # what was chosen before is remembered
        monkeypatch.setattr(backward, "row_tile", lambda *_, tile=tile: tile)
        check(inputs, backend="triton", engine="kernels")
    monkeypatch.undo()
    wide = [t for _, t in backward.WEIGHT_TILES] + [backward.WEIGHT_TILE_LARGE]
    for tile in (*wide, narrow):
        monkeypatch.setattr(backward.backward_kernels, "made", {})
        monkeypatch.setattr(backward, "weight_tile", lambda *_, tile=tile: tile)
        for limit in (0, 1 << 40) if tile == backward.WEIGHT_TILE_LARGE else (1 << 40,):
            monkeypatch.setattr(backward, "IN_PLACE_BYTES", limit)
            check(inputs, backend="triton", engine="kernels")


def test_a_modality_without_rows_gets_zeros():
    inputs = make((40, 0))
    _, (_, *rest) = check(inputs, backend="triton")
    assert all(not gradient.any() for gradient in rest[2 + 4 :])


def test_runs_are_the_same_bits():
    inputs = make((300, 64))
    grad = torch.randn(len(inputs[0]), 1024, device="cuda")
    first, second = (
        run(fused_embed, inputs, grad, backend="triton", engine="kernels") for _ in range(2)
    )
    # The table's gradient is torch's own, summed with atomics where an id is often used.
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1][1:], second[1][1:]))


def test_auto_runs_the_kernels(monkeypatch):
    ran = []
    own = autograd.backward_kernels
    monkeypatch.setattr(autograd, "backward_kernels", lambda d: ran.append(d) or own(d))
    inputs = make((40, 5))
    run(fused_embed, inputs, torch.randn(len(inputs[0]), 1024, device="cuda"))
    assert len(ran) == 1
    inputs = make((40, 5), dtype=torch.float32)
    run(fused_embed, inputs, torch.randn(len(inputs[0]), 1024, device="cuda"))
    assert len(ran) == 1  # float32 is left to torch


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(dtype):
    """float32 projectors beside a table in 16 bits, as stage `projector` trains them."""
    ids, table, rows, slots, projectors = make((40, 300), dtype=torch.float32)
    table = table.detach().to(dtype).requires_grad_()
    inputs = (ids, table, rows, slots, projectors)
    grad = torch.randn(len(ids), 1024, device="cuda")
    exact = run(eager, double(inputs), grad)[1]
    with torch.autocast("cuda", dtype):
        got = run(fused_embed, inputs, grad, backend="triton", engine="kernels")[1]
        own = run(eager, inputs, grad)[1]
    for mine, theirs, true in zip(got, own, exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, bound = ((x.double() - true).norm() for x in (mine, theirs))
        assert error <= 1.1 * bound + 1e-9 * true.norm()


def test_autocast_of_a_float32_model_is_left_to_torch():
    inputs = make((40,), dtype=torch.float32)
    grad = torch.randn(len(inputs[0]), 1024, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        got, own = run(fused_embed, inputs, grad), run(eager, inputs, grad)
        with pytest.raises(ValueError, match="one dtype"):
            fused_embed(*inputs, backend="triton")
    torch.testing.assert_close(got, own, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("counts", [(40, 300), (40, 0)], ids=str)
def test_compiled(counts):
    torch._dynamo.reset()
    inputs = make(counts)
    grad = torch.randn(len(inputs[0]), 1024, device="cuda").bfloat16()
    compiled = torch.compile(fused_embed, fullgraph=True, backend="aot_eager")
    got = run(compiled, inputs, grad, backend="triton")
    want = run(fused_embed, inputs, grad, backend="triton")
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("counts", [(1,), (40, 300), (5, 0, 1030), (16, 16, 16, 16)], ids=str)
def test_forward_is_the_op_that_serves(counts, dtype):
    """Bit for bit: training sees what serving will compute."""
    ids, table, rows, slots, projectors = make(counts, dtype=dtype)
    trained = fused_embed(ids, table, rows, slots, projectors, backend="triton")
    items = [(m, x.detach()) for m, x in enumerate(rows) if len(x)]
    with torch.no_grad():
        served = fuse_embeddings(
            ids, table, items, projectors, slots=torch.cat(slots).cpu(), backend="triton"
        )
    assert torch.equal(trained, served)
