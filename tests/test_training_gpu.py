"""`mmqwen train` on a CUDA GPU: every stage in bfloat16."""

from __future__ import annotations

import pytest
import torch

from mmqwen.hf import MultimodalQwen3ForConditionalGeneration
from mmqwen.training import train
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
