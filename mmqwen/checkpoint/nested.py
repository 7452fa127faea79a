"""Bases whose text model comes inside a vision-language one, as all published Qwen3.5 do."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmqwen.checkpoint.names import LEFT_OUT, NESTED_PREFIX, CheckpointError

TEMPLATE_FILE = "chat_template.json"
"""Where some vision-language checkpoints keep their chat template, beside the tokenizer."""


class LeftOutWarning(UserWarning):
    """Parts of a base, or projectors of a file, were left out of the checkpoint."""


def text_part(config: Any, weight_map: Mapping[str, str]) -> Any:
    """The text model's config: a copy of the one inside, or the config itself where it is one.

    Args:
        config: of the base.
        weight_map: its tensors.

    Raises:
        CheckpointError: the text model inside is none that can be a language model by itself.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner = getattr(config, "text_config", None)
    if inner is None:
        return config
    if inner.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(
            f"{config.model_type!r} holds a text model of type {inner.model_type!r}, which "
            "transformers has no causal language model of; expected a text model, or one inside a "
            "vision-language model such as Qwen3.5"
        )
    text = copy.deepcopy(inner)
    has_head = any(name.startswith("lm_head.") for name in weight_map)
    outer_ties = bool(getattr(config, "tie_word_embeddings", False))
    text.tie_word_embeddings = outer_ties or (not has_head and bool(inner.tie_word_embeddings))
    text.dtype = inner.dtype if inner.dtype is not None else config.dtype
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        text.quantization_config = _of_the_text(quantization)
    return text


def _of_the_text(quantization: Any) -> Any:
    """What a quantization config says of parts, by the names that they have in a text model."""
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    fields = dict(fields)
    for field in ("ignore", "modules_to_not_convert"):
        if fields.get(field):
            kept = [name for name in fields[field] if not name.startswith(LEFT_OUT)]
            fields[field] = [name.replace(NESTED_PREFIX, "model.", 1) for name in kept]
    return fields


def without_left_out(weight_map: Mapping[str, str]) -> dict[str, str]:
    """The tensors that are read, those of a vision tower and a drafter left out with a notice.

    Warns:
        LeftOutWarning: there are such tensors.
    """
    kept = {name: shard for name, shard in weight_map.items() if not name.startswith(LEFT_OUT)}
    parts = sorted({p for p in LEFT_OUT for name in weight_map if name.startswith(p)})
    if parts:
        what = " and ".join(f"{part}*" for part in parts)
        warnings.warn(
            f"the base's {what} ({len(weight_map) - len(kept)} tensors) are left out: rows take "
            "the place of a vision tower, and nothing drafts. The base's files stay as they are",
            LeftOutWarning,
            stacklevel=4,
        )
    return kept


def add_template(tokenizer: Any, folder: Path) -> None:
    """Give a tokenizer without a chat template the one that lies beside it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    file = folder / TEMPLATE_FILE
    if getattr(tokenizer, "chat_template", None) or not file.is_file():
        return
    try:
        tokenizer.chat_template = json.loads(file.read_bytes())["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
