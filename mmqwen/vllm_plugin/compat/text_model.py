"""vLLM's text models from inside: which can be served, how they are built, what vLLM asks them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.platforms import current_platform

from mmqwen.checkpoint.names import ARCHITECTURE, ARCHITECTURES, HYBRID_ARCHITECTURE
from mmqwen.vllm_plugin.modality_table import text_config_of

logger = init_logger("vllm.mmqwen.text_model")

NEEDS_MORE_THAN_EMBEDDINGS = {
    "requires_raw_input_tokens": "it reads token ids beside the embeddings, and rows have none",
    "get_model_state_cls": "it keeps a state of its own for each request",
    "get_kv_cache_groups": "it lays out its own cache",
    "get_mamba_specs_from_config": "its recurrent layers have states of several kinds",
    "is_attention_free": "it has no attention beside its recurrent layers",
}
"""What a vLLM text class may declare that no class of ours hands through, and what it means."""


def text_architectures(text_config: Any) -> list[str]:
    """vLLM's name for the text model: the config's own, or transformers' causal LM of its type.

    Raises:
        ValueError: neither is known.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own = [a for a in getattr(text_config, "architectures", None) or () if a not in ARCHITECTURES]
    if own:
        return own
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config.model_type)
    if name is None:
        raise ValueError(
            f"text model type {text_config.model_type!r} has no causal language model; set "
            "text_config.architectures"
        )
    return [name]


def text_class_of(model_config: Any) -> Any:
    """vLLM's class of the text model.

    Raises:
        ValueError: as `text_architectures`; or vLLM has no such class.
    """
    names = text_architectures(text_config_of(model_config.hf_config))
    try:
        return model_config.registry.resolve_model_cls(names, model_config)[0]
    except ValueError as error:
        if find_spec("torchvision") is None:
            raise ValueError(
                f"{error} torchvision is not installed, and vLLM imports it with the text models "
                "that it keeps beside their vision towers (Qwen3.5); install the build that fits "
                "your torch"
            ) from error
        raise


def refuse_text_class(text_class: type, hybrid: bool) -> None:
    """Refuse a text model that needs of vLLM what the outer class does not hand through.

    vLLM asks the outer class, this package's, for what a model needs: what the text model declares
    would go unheard.

    Args:
        text_class: vLLM's class of the text model.
        hybrid: whether the outer class is the one for recurrent layers.

    Raises:
        ValueError: `text_class` declares such a need, or wants the other outer class.
    """
    for name, reason in NEEDS_MORE_THAN_EMBEDDINGS.items():
        if getattr(text_class, name, False):
            raise ValueError(
                f"text model {text_class.__name__} cannot be served with rows: {reason} "
                f"({name}); expected a text model of attention layers, such as Qwen3"
            )
    recurrent = bool(getattr(text_class, "is_hybrid", False))
    if recurrent is not hybrid:
        has = "has recurrent layers" if recurrent else "has no recurrent layers"
        got, wanted = (ARCHITECTURE, HYBRID_ARCHITECTURE)[:: 1 if recurrent else -1]
        raise ValueError(
            f"text model {text_class.__name__} {has}: got architecture {got!r}, expected "
            f"{wanted!r}, as `mmqwen build` writes it into config.json; set it there or in "
            "hf_overrides"
        )


@contextmanager
def seen_as_text(model_config: Any) -> Iterator[None]:
    """`hf_config` is the text model's meanwhile, which some of vLLM's hooks read directly."""
    outer = model_config.hf_config
    model_config.hf_config = text_config_of(outer)
    try:
        yield
    finally:
        model_config.hf_config = outer


def text_hook(model_config: Any) -> Any:
    """What vLLM would do to the config of the text model served alone, or None.

    vLLM keeps such hooks by the outer architecture: the dtype of recurrent states, positions of
    one dimension for a text model cut out of a vision-language one, and the like.
    """
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    names = text_architectures(text_config_of(model_config.hf_config))
    return next((MODELS_CONFIG_MAP[name] for name in names if name in MODELS_CONFIG_MAP), None)


def settle_recurrent_states(vllm_config: Any) -> None:
    """Keep recurrent states in float32 where vLLM's CPU kernel reads no others: before 0.29.

    vLLM does so itself on a CPU with AMX alone. Elsewhere states took the model's dtype, and each
    request failed with `initial_state dtype mismatch`.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if not model.is_hybrid or current_platform.device_type != "cpu":
        return
    # 0.29 added it with the kernel that reads states of other types.
    if hasattr(importlib.import_module("vllm.platforms.cpu"), "_cpu_mamba_backend"):
        return
    if cache.mamba_ssm_cache_dtype not in ("auto", "float32"):
        logger.warning(
            "mamba_ssm_cache_dtype: got %r, expected 'float32': this vLLM's CPU kernel reads no "
            "other recurrent states; they are kept in float32",
            cache.mamba_ssm_cache_dtype,
        )
    cache.mamba_ssm_cache_dtype = "float32"


def build_text_model(outer: Any, vllm_config: Any, text_config: Any, prefix: str) -> None:
    """Make the text model the part `language_model` of `outer`, known to vLLM as such.

    Raises:
        ValueError: as `text_architectures` and `refuse_text_class`.
    """
    refuse_text_class(text_class_of(vllm_config.model_config), getattr(outer, "is_hybrid", False))
    with outer._mark_language_model(vllm_config):
        outer.language_model = init_vllm_registered_model(
            vllm_config=vllm_config,
            hf_config=text_config,
            prefix=maybe_prefix(prefix, "language_model"),
            architectures=text_architectures(text_config),
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
