"""vLLM's text models from inside: which can be served, and how they are built."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

from mmqwen.checkpoint.names import ARCHITECTURE

NEEDS_MORE_THAN_EMBEDDINGS = {
    "requires_raw_input_tokens": "it reads token ids beside the embeddings, and rows have none",
    "get_model_state_cls": "it keeps a state of its own for each request",
    "get_kv_cache_groups": "it lays out its own cache",
    "get_mamba_specs_from_config": "it has recurrent layers",
    "has_inner_state": "it has recurrent layers",
    "is_hybrid": "it has recurrent layers",
}
"""What a vLLM text class may declare that this class does not hand through, and what it means."""


def text_architectures(text_config: Any) -> list[str]:
    """vLLM's name for the text model: the config's own, or transformers' causal LM of its type.

    Raises:
        ValueError: neither is known.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = [a for a in getattr(text_config, "architectures", None) or () if a != ARCHITECTURE]
    if own:
        return own
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config.model_type)
    if name is None:
        raise ValueError(
            f"text model type {text_config.model_type!r} has no causal language model; set "
            "text_config.architectures"
        )
    return [name]


def refuse_text_class(text_class: type) -> None:
    """Refuse a text model that needs more of vLLM than embeddings and attention.

    vLLM asks the outer class, this package's, for what a model needs: what the text model declares
    would go unheard.

    Raises:
        ValueError: `text_class` declares such a need.
    """
    for name, reason in NEEDS_MORE_THAN_EMBEDDINGS.items():
        if getattr(text_class, name, False):
            raise ValueError(
                f"text model {text_class.__name__} cannot be served with rows: {reason} "
                f"({name}); expected a text model of attention layers, such as Qwen3"
            )


def build_text_model(outer: Any, vllm_config: Any, text_config: Any, prefix: str) -> None:
    """Make the text model the part `language_model` of `outer`, known to vLLM as such.

    Raises:
        ValueError: as `text_architectures` and `refuse_text_class`.
    """
    model_config = vllm_config.model_config
    architectures = text_architectures(text_config)
    refuse_text_class(model_config.registry.resolve_model_cls(architectures, model_config)[0])
    with outer._mark_language_model(vllm_config):
        outer.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=text_config,
            prefix=maybe_prefix(prefix, "language_model"),
            architectures=architectures,
        )


def plain_table(text_model: nn.Module) -> tuple[torch.Tensor, int] | None:
    """The token table (or this rank's shard) and its first id, if it is a plain matrix."""
    layer: Any = getattr(getattr(text_model, "model", None), "embed_tokens", None)
    if type(layer) is not VocabParallelEmbedding:
        return None
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if weight.ndim != 2 or weight.shape[1] != layer.embedding_dim:
        return None
    return weight, layer.shard_indices.org_vocab_start_index
