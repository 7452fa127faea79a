"""`mmqwen train` on a CUDA GPU: every stage in bfloat16."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from mmqwen.hf import MultimodalQwen3ForConditionalGeneration
from mmqwen.training import attention, train
from tiny import make_composite
from training_runs import losses, settings_for, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

STEPS = 20


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return make_composite(folder / "model", dtype="bfloat16"), write_data(folder / "data"), folder


def on_gpu(places, name, **options):
    options = {"cpu": False, "bf16": True, "max_steps": STEPS, "save_steps": STEPS, **options}
    return train(settings_for(places, name, **options))


def attention_reference(query, key, value, bounds, window):
    """Each sample for itself, in float64."""
    query, key, value = (t.double().transpose(0, 1) for t in (query, key, value))
    key, value = (t.repeat_interleave(query.shape[0] // t.shape[0], 0) for t in (key, value))
    parts = []
    for begin, end in itertools.pairwise(bounds):
        scores = query[:, begin:end] @ key[:, begin:end].mT / query.shape[-1] ** 0.5
        behind = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = ((behind < 0) | (behind >= (window or 10**9))).to(scores.device)
        parts.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[:, begin:end])
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (16, 8), (14, 2)])
@pytest.mark.parametrize("window", [None, 7])
def test_attention_by_variable_length(heads, key_heads, window):
    """Output and gradients beside float64, no further off than bfloat16's own rounding."""
    attention.register()
    bounds = [0, 1, 40, 41, 300, 428, 428, 428]  # the last ones are empty
    draw = torch.Generator("cuda").manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16, "generator": draw}
    qkv = [torch.randn(428, h, 64, **shape) for h in (heads, key_heads, key_heads)]
    given = [t.clone().requires_grad_() for t in qkv]
    out, _ = attention._varlen(
        None,
        *(t.transpose(0, 1)[None] for t in given),
        None,
        scaling=64**-0.5,
        sliding_window=window,
        cu_seq_lens_q=torch.tensor(bounds, device="cuda", dtype=torch.int32),
        max_length_q=300,
    )
    weight = torch.randn(out.shape[1:], **shape)
    (out[0] * weight).sum().backward()
    wanted = [t.double().requires_grad_() for t in qkv]
    reference = attention_reference(*wanted, bounds, window)
    (reference * weight.double()).sum().backward()
    pairs = [(out[0], reference), *((a.grad, b.grad) for a, b in zip(given, wanted, strict=True))]
    for got, want in pairs:
        error = (got.double() - want).norm() / want.norm()
        assert error < 8 * 2**-9  # a few roundings to 8 bits


@pytest.mark.parametrize("liger", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_each_way_learns_the_same(places, compiled, liger):
    """float32 by sdpa on the GPU, against bfloat16 by variable length, Liger and compilation."""
    if liger:
        pytest.importorskip("liger_kernel")
    name = f"way-{compiled}-{liger}"
    way = on_gpu(places, name, max_steps=8, compile=compiled, liger=liger, lr=1e-3)
    plain = on_gpu(places, f"plain-{name}", max_steps=8, bf16=False, lr=1e-3)
    # 8 bits of a loss of some 6, through a few layers.
    assert losses(way) == pytest.approx(losses(plain), rel=0.02)
    report = json.loads((way / "training.json").read_text())
    assert report["attention"] == attention.VARLEN
    assert report["compiled"] == compiled
    assert bool(report["liger"]) == liger


def test_a_step_does_not_wait_for_the_gpu(places):
    """After the first steps nothing synchronizes but what is logged.

    Without Liger, whose loss counts its targets on the host once a pass.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("error" if state.global_step >= 2 else "default")

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    try:
        settings = settings_for(
            places,
            "sync",
            cpu=False,
            bf16=True,
            max_steps=6,
            log_steps=6,
            save_steps=6,
            liger=False,
        )
        train(settings, callbacks=[Watch()])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_projectors_learn_in_bfloat16(places):
    curve = losses(on_gpu(places, "projector"))
    assert len(curve) == STEPS
    assert sum(curve[-3:]) < 0.7 * sum(curve[:3])


@pytest.mark.parametrize("stage", ["lora", "full"])
def test_stages_in_bfloat16_with_gradient_checkpointing(stage, places):
    output = on_gpu(places, stage, stage=stage, lr=1e-3, gradient_checkpointing=True)
    curve = losses(output)
    assert len(curve) == STEPS
    assert sum(curve[-3:]) < sum(curve[:3])
    MultimodalQwen3ForConditionalGeneration.from_pretrained(output)


def test_a_run_goes_on_from_its_checkpoint(places):
    whole = losses(on_gpu(places, "whole"))

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STEPS - 4:
                raise Stop

    settings = settings_for(places, "cut", cpu=False, bf16=True, max_steps=STEPS, save_steps=5)
    with pytest.raises(Stop):
        train(settings, callbacks=[StopAt()])
    assert losses(train(settings)) == pytest.approx(whole, rel=0.05, abs=0.02)
