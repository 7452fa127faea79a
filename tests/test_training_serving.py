"""What training writes is served: vLLM's log-probabilities are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engines import TOLERANCE, reference, start, worst_difference
from mmqwen.hf import MultimodalQwen3ForConditionalGeneration
from mmqwen.training import train
from tiny import make_composite
from training_runs import settings_for, write_data

pytest.importorskip("vllm")
pytest.importorskip("peft")

CHANGED = max(1e-2, 10 * TOLERANCE)
"""What training moves a log-probability by at least, beyond what two engines differ by."""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    return make_composite(folder / "model"), write_data(folder / "data"), folder


def ask(llm, seed: int = 0, *, prompt_logprobs: int | None = 1, **options):
    """Outputs for two prompts, and the items of each."""
    from vllm import SamplingParams

    g = torch.Generator().manual_seed(seed)
    items = [
        {"m1": [torch.randn(3, 24, generator=g)]},
        {"m1": [torch.randn(1, 24, generator=g)], "m2": [torch.randn(1, 40, generator=g)]},
    ]
    prompts = [
        {"prompt": "Describe <|m1|> the", "multi_modal_data": items[0]},
        {"prompt": "What <|m1|> <|m2|>?", "multi_modal_data": items[1]},
    ]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=6, logprobs=1, prompt_logprobs=prompt_logprobs, ignore_eos=True
    )
    return zip(llm.generate(prompts, sampling, use_tqdm=False, **options), items, strict=True)


@pytest.mark.parametrize("stage", ["projector", "lora"])
def test_a_trained_checkpoint_is_served(places, stage):
    options = {"lr": 1e-3} if stage == "lora" else {}
    output = train(settings_for(places, f"served-{stage}", stage=stage, **options))
    llm = start(output)
    model, untrained = reference(str(output)), reference(str(places[0]))
    for answer, items in ask(llm):
        assert worst_difference(answer, model, items) <= TOLERANCE
        changed = worst_difference(answer, untrained, items, check_tokens=False)
        assert changed > CHANGED  # so it was the trained weights that were served


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="vLLM's LoRA kernels take no float32 on a GPU; bf16-lora of run_gpu_engine.py",
)
def test_an_adapter_is_served_beside_its_base(places):
    peft = pytest.importorskip("peft")
    from vllm.lora.request import LoRARequest

    settings = settings_for(places, "adapter", stage="lora", merge=False, lr=1e-3, max_steps=12)
    output = train(settings)
    llm = start(output, enable_lora=True, max_lora_rank=16)
    base = MultimodalQwen3ForConditionalGeneration.from_pretrained(output)
    plain = reference(str(output))
    # vLLM 0.32's LoRA logits on the CPU fail where prompt log-probabilities are asked for.
    for answer, items in ask(llm, prompt_logprobs=None):
        assert worst_difference(answer, plain, items) <= TOLERANCE
    adapted = peft.PeftModel.from_pretrained(base, output / "adapter").merge_and_unload().eval()
    request = LoRARequest("trained", 1, str(output / "adapter"))
    for answer, items in ask(llm, prompt_logprobs=None, lora_request=request):
        assert worst_difference(answer, adapted, items) <= TOLERANCE
        changed = worst_difference(answer, plain, items, check_tokens=False)
        assert changed > CHANGED

    connector = write_connector_adapter(output / "connector", base.config)
    # As `/v1/load_lora_adapter` does. (A request that names an adapter which was not added has
    # it loaded in the middle of a step, where vLLM 0.32 does not recover from any adapter's error.)
    with pytest.raises(ValueError, match=r"expected target modules .*projectors.m1.linear_1"):
        llm.llm_engine.add_lora(LoRARequest("connector", 2, str(connector)))
    for answer, items in ask(llm, prompt_logprobs=None, lora_request=request):  # and goes on
        assert worst_difference(answer, adapted, items) <= TOLERANCE


def write_connector_adapter(folder: Path, config: Any) -> Path:
    """A LoRA on a projector's layers, as peft's `save_pretrained` writes it."""
    import peft

    model = MultimodalQwen3ForConditionalGeneration(config)
    layers = ["projectors.m1.linear_1", "projectors.m1.linear_2"]
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=layers)).save_pretrained(folder)
    return folder
