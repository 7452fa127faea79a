"""MultimodalQwen3Config: nesting, mirrored fields, round trips, refusals."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from mmqwen.hf import MultimodalQwen3Config, register_auto_classes
from mmqwen.modalities import ModalityError, ModalitySpec

MODALITIES = {"m1": {"dim": 24, "token_id": 300}, "m2": {"dim": 40, "hidden_dim": 7}}


def text_config(cls=Qwen3Config, **fields):
    return cls(**{"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, **fields})


@pytest.mark.parametrize("cls", [Qwen3Config, Qwen3MoeConfig, Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_by_auto_config(tmp_path, cls, tied):
    text = text_config(
        cls, tie_word_embeddings=tied, eos_token_id=[5, 6], pad_token_id=7, dtype="bfloat16"
    )
    config = MultimodalQwen3Config(text_config=text, modalities=MODALITIES)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is MultimodalQwen3Config
    assert type(again.text_config) is cls
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert again.get_text_config(decoder=True) is again.text_config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "multimodal_qwen3"
    assert raw["architectures"] == ["MultimodalQwen3ForConditionalGeneration"]
    assert raw["tie_word_embeddings"] is tied is again.tie_word_embeddings
    assert raw["eos_token_id"] == [5, 6]
    assert raw["dtype"] == "bfloat16"
    assert raw["modalities"]["m1"] == {
        "dim": 24,
        "hidden_dim": 64,
        "token": "<|m1|>",
        "token_id": 300,
        "max_rows": 1024,
    }


def test_text_config_as_a_dict_of_another_family():
    config = MultimodalQwen3Config(text_config=text_config(Qwen3MoeConfig).to_dict())
    assert type(config.text_config) is Qwen3MoeConfig
    assert (config.vocab_size, config.hidden_size) == (400, 64)


def test_default_is_qwen3_without_modalities():
    config = MultimodalQwen3Config()
    assert type(config.text_config) is Qwen3Config
    assert config.modality_specs == {}


def test_specs_keep_their_order_and_resolve_the_hidden_width():
    config = MultimodalQwen3Config(
        text_config=text_config(), modalities={"z": 3, "a": ModalitySpec("a", 4, hidden_dim=5)}
    )
    assert [(s.name, s.dim, s.hidden_dim) for s in config.modality_specs.values()] == [
        ("z", 3, 64),
        ("a", 4, 5),
    ]


def test_quantization_config_is_hoisted(tmp_path):
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    text = text_config(quantization_config=quantization)
    config = MultimodalQwen3Config(text_config=text, modalities=MODALITIES)
    assert config.quantization_config == quantization
    config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["quantization_config"] == quantization
    assert "quantization_config" not in raw["text_config"]
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == quantization


def test_a_config_that_is_nested_is_left_as_it_was():
    """It may be a model's own, which goes on with it."""
    text = text_config(quantization_config={"quant_method": "fp8"}, attn_implementation="sdpa")
    assert text._attn_implementation == "sdpa"
    before = copy.deepcopy(vars(text))
    MultimodalQwen3Config(text_config=text, modalities=MODALITIES)
    assert vars(text) == before


def test_configs_compare_by_content():
    first = MultimodalQwen3Config(text_config=text_config(), modalities=MODALITIES)
    assert first == MultimodalQwen3Config(text_config=text_config(), modalities=MODALITIES)
    assert first != MultimodalQwen3Config(text_config=text_config(), modalities={"m1": 24})
    assert first != MultimodalQwen3Config(
        text_config=text_config(hidden_size=32), modalities=MODALITIES
    )


@pytest.mark.parametrize(
    ("modalities", "words"),
    [
        ({"m1": {"dim": 0}}, "dim is 0"),
        ({"m1": {}}, "'dim'"),
        ({"m1": {"dim": 4, "width": 3}}, "width"),
        ({"image": 4}, "reserved"),
        ({"m1": {"dim": 4, "token_id": 400}}, "400 rows"),
        ({"m1": {"dim": 4, "token_id": 3}, "m2": {"dim": 4, "token_id": 3}}, "share a token_id"),
    ],
)
def test_bad_modalities_are_refused(modalities, words):
    with pytest.raises(ModalityError, match=words):
        MultimodalQwen3Config(text_config=text_config(), modalities=modalities)


def test_bad_text_configs_are_refused():
    with pytest.raises(ValueError, match="no_such_model"):
        MultimodalQwen3Config(text_config={"model_type": "no_such_model"})
    with pytest.raises(ValueError, match="nested in itself"):
        MultimodalQwen3Config(text_config={"model_type": "multimodal_qwen3"})
    with pytest.raises(TypeError, match="got int"):
        MultimodalQwen3Config(text_config=3)


def test_registering_again_is_harmless():
    register_auto_classes()
    register_auto_classes()
