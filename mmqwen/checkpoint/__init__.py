"""Composite checkpoints: a text model's files under their own names, and projectors beside them.

A composite directory holds `config.json`, the tokenizer with its placeholder tokens, the base's
shards as `base-*.safetensors`, `projectors.safetensors`, and `model.safetensors.index.json`.
What needs torch or transformers is resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmqwen.checkpoint.names import CheckpointError
from mmqwen.checkpoint.nested import LeftOutWarning
from mmqwen.checkpoint.trained import UntrainedProjectorsWarning
from mmqwen.text_models import UntestedTextModelWarning

if TYPE_CHECKING:
    from mmqwen.checkpoint.build import (
        build_checkpoint,
        extract_projector,
        extract_text,
        read_config,
    )
    from mmqwen.checkpoint.projectors import load_projectors, save_projectors

_HOMES = {
    "build_checkpoint": "mmqwen.checkpoint.build",
    "extract_projector": "mmqwen.checkpoint.build",
    "extract_text": "mmqwen.checkpoint.build",
    "load_projectors": "mmqwen.checkpoint.projectors",
    "read_config": "mmqwen.checkpoint.build",
    "save_projectors": "mmqwen.checkpoint.projectors",
}

__all__ = [
    "CheckpointError",
    "LeftOutWarning",
    "UntestedTextModelWarning",
    "UntrainedProjectorsWarning",
    "build_checkpoint",
    "extract_projector",
    "extract_text",
    "load_projectors",
    "read_config",
    "save_projectors",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmqwen.checkpoint' has no attribute {name!r}")
