"""The vLLM class and its text model: what it calls, what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from torch import nn
from vllm.model_executor.models import ModelRegistry

from mmqwen.checkpoint.names import ARCHITECTURE, HYBRID_ARCHITECTURE
from mmqwen.vllm_plugin import model as plugin
from mmqwen.vllm_plugin.compat.text_model import NEEDS_MORE_THAN_EMBEDDINGS, refuse_text_class
from mmqwen.vllm_plugin.model import MultimodalQwen3Model


@pytest.mark.parametrize("need", NEEDS_MORE_THAN_EMBEDDINGS)
def test_a_text_class_that_needs_more_than_embeddings_is_refused_by_name(need):
    text_class = type("StrangeForCausalLM", (nn.Module,), {need: True})
    with pytest.raises(ValueError, match=rf"StrangeForCausalLM cannot be served.*\({need}\)"):
        refuse_text_class(text_class, hybrid=False)


@pytest.mark.parametrize(
    ("architecture", "hybrid", "message"),
    [
        ("Qwen3ForCausalLM", False, None),
        ("Qwen3MoeForCausalLM", False, None),
        ("Gemma2ForCausalLM", False, None),
        ("Qwen3NextForCausalLM", True, None),
        ("Qwen3NextForCausalLM", False, f"has recurrent layers.*expected '{HYBRID_ARCHITECTURE}'"),
        ("Qwen3ForCausalLM", True, f"has no recurrent layers.*expected '{ARCHITECTURE}'"),
        ("MambaForCausalLM", True, "cannot be served .*no attention beside its recurrent layers"),
    ],
)
def test_vllms_own_text_classes(architecture, hybrid, message):
    text_class = ModelRegistry._try_load_model_cls(architecture)
    if message is None:
        refuse_text_class(text_class, hybrid)
    else:
        with pytest.raises(ValueError, match=rf"{architecture} {message}"):
            refuse_text_class(text_class, hybrid)


def test_the_text_model_itself_runs_not_what_it_wraps():
    """MiniCPM scales what its `.model` returns; Gemma4 hands it more than embeddings."""
    seen = []

    def text_model(*args, **kwargs):
        seen.append((args, kwargs))
        return "hidden"

    model = SimpleNamespace(_prepared=True, language_model=text_model)
    embeds = torch.zeros(2, 4)
    got = MultimodalQwen3Model.forward(model, None, "positions", None, embeds)
    assert got == "hidden"
    assert seen == [((None, "positions", None), {"inputs_embeds": embeds})]


class Embedding(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))

    def embed_input_ids(self, ids):
        return self.weight[ids] * self.scale


@pytest.mark.parametrize(("scale", "gathers"), [(1.0, True), (2.83, False)])
def test_a_scaled_embedding_is_known_by_its_values(scale, gathers, monkeypatch):
    text = Embedding(scale)
    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=40), language_model=text, _ranks=1, _gathers=None
    )
    model._embeds_by_gathering = MultimodalQwen3Model._embeds_by_gathering.__get__(model)
    monkeypatch.setattr(plugin, "plain_table", lambda model: (model.weight, 0))
    table = MultimodalQwen3Model._token_table(model)
    assert (table is not None) is gathers
    text.weight = torch.zeros_like(text.weight)  # weights that are yet to come tell nothing
    assert model._embeds_by_gathering(text.weight, 0) is False
