"""The vLLM model class for text models that mix attention with recurrent layers (Qwen3.5).

vLLM asks the outer class, before any model exists, whether a model is hybrid, and for the shapes
and types of its recurrent states: the flags stand here, the answers are the text class's.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMRoPE
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmqwen.vllm_plugin.compat.text_model import seen_as_text, text_class_of
from mmqwen.vllm_plugin.model import MultimodalQwen3Model
from mmqwen.vllm_plugin.parsing import DummyInputs, ProcessingInfo
from mmqwen.vllm_plugin.processing import PackingProcessor


@MULTIMODAL_REGISTRY.register_processor(
    PackingProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs
)
class MultimodalQwen3HybridModel(MultimodalQwen3Model, HasInnerState, IsHybrid, SupportsMRoPE):
    """Serves checkpoints of architecture `MultimodalQwen3HybridForConditionalGeneration`."""

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> Any:
        """The text model's."""
        with seen_as_text(vllm_config.model_config):
            text_class = text_class_of(vllm_config.model_config)
            return text_class.get_mamba_state_dtype_from_config(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> Any:
        """The text model's."""
        with seen_as_text(vllm_config.model_config):
            text_class = text_class_of(vllm_config.model_config)
            return text_class.get_mamba_state_shape_from_config(vllm_config)

    # vLLM's runners ask the model, not its class, so that these can be the instance's.
    def get_mamba_state_copy_func(self) -> Any:  # type: ignore[override]
        """The text model's; asked for before vLLM 0.31."""
        return self.language_model.get_mamba_state_copy_func()

    def get_mamba_state_copy_funcs(self, mamba_types: Any) -> Any:  # type: ignore[override]
        """The text model's; asked for from vLLM 0.31 on."""
        return self.language_model.get_mamba_state_copy_funcs(mamba_types)

    def get_mrope_input_positions(
        self, input_tokens: list[int], *_: Any, **__: Any
    ) -> tuple[torch.Tensor, int]:
        """A row stands in line as a token does: all three positions count along."""
        return torch.arange(len(input_tokens)).expand(3, -1), 0
