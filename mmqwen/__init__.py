"""Serve a Qwen3-family LLM on prompts that mix text with arbitrary embeddings.

Importing this package loads none of torch, transformers and vLLM; each public name is resolved
when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmqwen._version import __version__

if TYPE_CHECKING:
    from mmqwen.checkpoint import build_checkpoint
    from mmqwen.hf.configuration import MultimodalQwen3Config
    from mmqwen.hf.modeling import MultimodalQwen3ForConditionalGeneration
    from mmqwen.hf.processing import MultimodalQwen3Processor
    from mmqwen.hf.projector import MultiModalProjector
    from mmqwen.modalities import ModalityError
    from mmqwen.pipeline import MultimodalQwen3Pipeline
    from mmqwen.transport import EmbeddingError
    from mmqwen.vllm_plugin.model import MultimodalQwen3Model

_HOMES = {
    "EmbeddingError": "mmqwen.transport",
    "ModalityError": "mmqwen.modalities",
    "MultiModalProjector": "mmqwen.hf",
    "MultimodalQwen3Config": "mmqwen.hf",
    "MultimodalQwen3ForConditionalGeneration": "mmqwen.hf",
    "MultimodalQwen3Model": "mmqwen.vllm_plugin.model",
    "MultimodalQwen3Pipeline": "mmqwen.pipeline",
    "MultimodalQwen3Processor": "mmqwen.hf",
    "build_checkpoint": "mmqwen.checkpoint",
}

__all__ = [
    "EmbeddingError",
    "ModalityError",
    "MultiModalProjector",
    "MultimodalQwen3Config",
    "MultimodalQwen3ForConditionalGeneration",
    "MultimodalQwen3Model",
    "MultimodalQwen3Pipeline",
    "MultimodalQwen3Processor",
    "__version__",
    "build_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmqwen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
