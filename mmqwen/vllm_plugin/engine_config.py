"""What an engine that serves our models is told beside what its user says."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig


class EngineConfig(VerifyAndUpdateConfig):
    """vLLM's hook into the config of engines of one architecture, before any process starts."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Turn vLLM's processor cache off, and let packs in for every step in flight."""
        multimodal = vllm_config.model_config.multimodal_config
        if multimodal is not None:
            # It spares a second conversion and transfer of equal items. Packs never take part, so
            # its other half, in the engine core, would only keep up to 4 GiB of them, and count
            # their bytes at each request (docs/adr/0003-packs-outside-the-processor-cache.md).
            multimodal.mm_processor_cache_gb = 0.0
        widen_encoder_cache(vllm_config)


def widen_encoder_cache(vllm_config: Any) -> None:
    """Let the scheduler admit packs for every step that may be in flight, and one more.

    vLLM counts a pack's rows from when a step is scheduled until its result is in, and allows as
    many as one step has tokens: with two steps in flight, requests of more rows than text wait for
    each other, and a batch takes more steps than the same tokens as text. That limit protects GPU
    memory, of which packs take none. They lie in host memory as long as their requests do, and
    what is kept for reuse is bounded by this size.
    """
    scheduler = vllm_config.scheduler_config
    steps = vllm_config.parallel_config.pipeline_parallel_size + 2
    rows = steps * scheduler.max_num_batched_tokens
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, rows)
