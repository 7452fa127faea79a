"""vLLM's text models from inside: built, looked into, and where their weights come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix


def text_class(model_config: Any, architectures: list[str]) -> type:
    """vLLM's class of a text model."""
    found: type = model_config.registry.resolve_model_cls(architectures, model_config)[0]
    return found


def build_text_model(
    outer: Any, vllm_config: Any, text_config: Any, architectures: list[str], prefix: str
) -> None:
    """Make the text model the part `language_model` of `outer`, known to vLLM as such."""
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
    if (
        not isinstance(weight, torch.Tensor)
        or not weight.is_floating_point()
        or weight.ndim != 2
        or weight.shape[1] != layer.embedding_dim
    ):
        return None
    return weight, layer.shard_indices.org_vocab_start_index


class DiskMark:
    """The further sources of a checkpoint that vLLM's loader asks a model for: there are none.

    The loader walks them after the checkpoint's own files, so `walked` tells a checkpoint that is
    read from disk from weights that somebody hands over.
    """

    def __init__(self) -> None:
        self.walked = False

    def __iter__(self) -> Iterator[Any]:
        self.walked = True
        return iter(())
