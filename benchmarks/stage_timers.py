"""Timers around vLLM's and this package's stages, in any of an engine's processes.

Stages nest (`add_request` holds `process_inputs`), run in several threads, and some wait for a
lock or for the GPU: read them as wall time inside a call, not as a sum.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

STAGES = (
    # front end
    "vllm.renderers.base:BaseRenderer.process_for_engine",
    "mmqwen.vllm_plugin.renderer:MultimodalQwen3Renderer._process_multimodal",
    "mmqwen.vllm_plugin.processing:PackingProcessor.join",
    "mmqwen.vllm_plugin.processing:PackingProcessor.pack",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.engine.llm_engine:LLMEngine.add_request",
    "vllm.v1.engine.llm_engine:LLMEngine.step",
    "vllm.v1.engine.core_client:SyncMPClient.add_request",
    "vllm.v1.engine.core_client:SyncMPClient.get_output",
    "vllm.v1.serial_utils:MsgpackEncoder.encode",
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs",
    # engine core
    "vllm.v1.serial_utils:MsgpackDecoder.decode",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request",
    "vllm.v1.engine.core:EngineCore.add_request",
    "vllm.v1.engine.core:EngineCore.step",
    "vllm.v1.engine.core:EngineCore.step_with_batch_queue",
    "vllm.v1.core.sched.scheduler:Scheduler.schedule",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output",
    # worker
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
    "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.execute_mm_encoder",
    "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.gather_mm_embeddings",
    "vllm.v1.worker.gpu.mm.encoder_runner:EncoderRunner.get_inputs_embeds",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._execute_mm_encoder",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._gather_mm_embeddings",
    "mmqwen.vllm_plugin.model:MultimodalQwen3Model.embed_multimodal",
    "mmqwen.vllm_plugin.model:MultimodalQwen3Model.embed_input_ids",
    "mmqwen.vllm_plugin.model:plan_rows",
    "mmqwen.vllm_plugin.model:fuse_embeddings",
)

NOT_FOUND: list[str] = []
_TOTALS: dict[str, list[float]] = {}  # seconds, calls
_LOCK = threading.Lock()


def install() -> list[str]:
    """Put a timer around each stage that this process knows; the names of the others."""
    NOT_FOUND.clear()
    for stage in STAGES:
        module, path = stage.split(":")
        try:
            holder: Any = importlib.import_module(module)
            *outer, name = path.split(".")
            for step in outer:
                holder = getattr(holder, step)
            function = getattr(holder, name)
        except (ImportError, AttributeError):
            NOT_FOUND.append(stage)
            continue
        if not hasattr(function, "_stage"):
            setattr(holder, name, _timed(function, path))
    return list(NOT_FOUND)


def _timed(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent = time.perf_counter() - begin
            with _LOCK:
                entry = _TOTALS.setdefault(stage, [0.0, 0])
                entry[0] += spent
                entry[1] += 1

    timed._stage = stage  # type: ignore[attr-defined]
    return timed


def take() -> dict[str, dict[str, float]]:
    """Milliseconds and calls of each stage since the last `take`."""
    with _LOCK:
        found = {
            stage: {"ms": round(1e3 * seconds, 3), "calls": calls}
            for stage, (seconds, calls) in _TOTALS.items()
        }
        _TOTALS.clear()
    return found


def remote(worker: Any, source: str, action: str) -> Any:
    """Run `install` or `take` in a worker, which need not find this file."""
    import sys
    import types

    module = sys.modules.get("mmqwen_stage_timers")
    if module is None:
        module = types.ModuleType("mmqwen_stage_timers")
        sys.modules["mmqwen_stage_timers"] = module
        exec(compile(source, "stage_timers.py", "exec"), module.__dict__)
    return getattr(module, action)()


remote.__module__ = "__main__"  # cloudpickle then sends it by value
