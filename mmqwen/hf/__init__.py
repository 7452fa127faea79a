"""The transformers trio: configuration, model and processor of `multimodal_qwen3`.

Importing this package registers the three with transformers' Auto classes.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from mmqwen.hf.configuration import MultimodalQwen3Config
from mmqwen.hf.modeling import MultimodalQwen3ForConditionalGeneration
from mmqwen.hf.processing import MultimodalQwen3Processor
from mmqwen.hf.projector import MultiModalProjector

__all__ = [
    "MultiModalProjector",
    "MultimodalQwen3Config",
    "MultimodalQwen3ForConditionalGeneration",
    "MultimodalQwen3Processor",
    "register_auto_classes",
]


def register_auto_classes() -> None:
    """Make `AutoConfig`, `AutoModelForCausalLM` and `AutoProcessor` know the trio.

    May be called any number of times; `import mmqwen.hf` calls it.
    """
    AutoConfig.register(MultimodalQwen3Config.model_type, MultimodalQwen3Config, exist_ok=True)
    AutoModelForCausalLM.register(
        MultimodalQwen3Config, MultimodalQwen3ForConditionalGeneration, exist_ok=True
    )
    AutoProcessor.register(MultimodalQwen3Config, MultimodalQwen3Processor, exist_ok=True)


register_auto_classes()
