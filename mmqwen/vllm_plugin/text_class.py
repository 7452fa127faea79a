"""Which of vLLM's classes a text model is, and whether it can be served with rows."""

from __future__ import annotations

from typing import Any

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
