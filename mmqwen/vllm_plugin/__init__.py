"""The vLLM plugin: `LLM(model=CHECKPOINT)` and `vllm serve CHECKPOINT` just work.

vLLM calls `register()` through the entry point `vllm.general_plugins` in each of its processes.
"""

from __future__ import annotations

import importlib.util

ARCHITECTURE = "MultimodalQwen3ForConditionalGeneration"
"""The name under `architectures` in `config.json` that selects the model class."""

PACK_MODALITY = "mmqwen_pack"
"""vLLM's name for the one item that carries a message's rows; users never see it."""


def register() -> None:
    """Make vLLM know the model, its config, renderer, engine settings and the check of requests.

    Cheap, lazy, re-entrant.

    Does nothing where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY

    from mmqwen.hf.configuration import MODEL_TYPE, MultimodalQwen3Config
    from mmqwen.vllm_plugin.compat import guard_http
    from mmqwen.vllm_plugin.engine_config import EngineConfig

    AutoConfig.register(MODEL_TYPE, MultimodalQwen3Config, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "mmqwen.vllm_plugin.model:MultimodalQwen3Model")
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineConfig
    # Not .register(): it warns that "hf" is taken, at every start, although the subclass acts on
    # our architecture alone.
    RENDERER_REGISTRY.renderers["hf"] = ("mmqwen.vllm_plugin.renderer", "MultimodalQwen3Renderer")
    guard_http("mmqwen.vllm_plugin.door", "Door")
