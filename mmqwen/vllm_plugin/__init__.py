"""The vLLM plugin: `LLM(model=CHECKPOINT)` and `vllm serve CHECKPOINT` just work.

vLLM calls `register()` through the entry point `vllm.general_plugins` in each of its processes.
"""

from __future__ import annotations

import importlib.util

from mmqwen.checkpoint.names import ARCHITECTURE, HYBRID_ARCHITECTURE

_CLASSES = {
    ARCHITECTURE: "mmqwen.vllm_plugin.model:MultimodalQwen3Model",
    HYBRID_ARCHITECTURE: "mmqwen.vllm_plugin.hybrid:MultimodalQwen3HybridModel",
}


def register() -> None:
    """Make vLLM know the model, its config, renderer, engine settings and the check of requests.

    Cheap, lazy, re-entrant.

    Does nothing where vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    from mmqwen.hf import register_auto_classes
    from mmqwen.vllm_plugin import compat
    from mmqwen.vllm_plugin.engine_config import settle

    register_auto_classes()
    for architecture, place in _CLASSES.items():
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, place)
        compat.settle_engines(architecture, settle)
    compat.use_renderer("mmqwen.vllm_plugin.renderer", "MultimodalQwen3Renderer")
    compat.guard_http("mmqwen.vllm_plugin.door", "Door")
