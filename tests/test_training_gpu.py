"""`mmqwen train` on a CUDA GPU: every stage in bfloat16, projectors through the kernels."""

from __future__ import annotations

import pytest
import torch

from mmqwen.hf import MultimodalQwen3ForConditionalGeneration
from mmqwen.training import train
from mmqwen_kernels import autograd
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


@pytest.fixture
def kernels(monkeypatch):
    """How often the kernels' forward and backward were called."""
    count = {"forward": 0, "backward": 0}
    forward, backward = autograd._forward_triton, autograd.backward_kernels

    def counted_forward(*args):
        count["forward"] += 1
        return forward(*args)

    def counted_backward(*args):
        count["backward"] += 1
        return backward(*args)

    monkeypatch.setattr(autograd, "_forward_triton", counted_forward)
    monkeypatch.setattr(autograd, "backward_kernels", counted_backward)
    return count


def on_gpu(places, name, **options):
    options = {"cpu": False, "bf16": True, "max_steps": STEPS, "save_steps": STEPS, **options}
    return train(settings_for(places, name, **options))


def test_projectors_train_alike_by_kernels_and_by_modules(places, kernels):
    by_kernels = losses(on_gpu(places, "kernels", training_path="auto"))
    assert kernels == {"forward": STEPS, "backward": STEPS}
    by_modules = losses(on_gpu(places, "modules"))
    assert kernels == {"forward": STEPS, "backward": STEPS}
    assert by_kernels == pytest.approx(by_modules, rel=0.05, abs=0.02)
    assert sum(by_kernels[-3:]) < 0.7 * sum(by_kernels[:3])


@pytest.mark.parametrize("stage", ["lora", "full"])
def test_stages_in_bfloat16_with_gradient_checkpointing(stage, places):
    options = {"lr": 1e-3, "gradient_checkpointing": True, "training_path": "auto"}
    output = on_gpu(places, stage, stage=stage, **options)
    curve = losses(output)
    assert len(curve) == STEPS
    assert sum(curve[-3:]) < sum(curve[:3])
    MultimodalQwen3ForConditionalGeneration.from_pretrained(output)


def test_a_run_goes_on_from_its_checkpoint(places):
    whole = losses(on_gpu(places, "whole", training_path="auto"))

    class Stop(Exception):
        pass

    from transformers import TrainerCallback

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == STEPS - 4:
                raise Stop

    settings = settings_for(
        places, "cut", cpu=False, bf16=True, max_steps=STEPS, save_steps=5, training_path="auto"
    )
    with pytest.raises(Stop):
        train(settings, callbacks=[StopAt()])
    assert losses(train(settings)) == pytest.approx(whole, rel=0.05, abs=0.02)
