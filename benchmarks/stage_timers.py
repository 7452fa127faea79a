"""Timers around vLLM's and this package's stages, in any of an engine's processes.

Stages nest (`add_request` holds `process_inputs`), run in several threads, and some wait for a
lock or for the GPU: read them as wall time inside a call, not as a sum; "cpu_ms" is what the
calling thread worked. `gpu_begin` and `gpu_end` tell how long the GPU was busy.
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
    "mmqwen.vllm_plugin.model:MultimodalQwen3Model.forward",
    "mmqwen.vllm_plugin.model:MultimodalQwen3Model.embed_multimodal",
    "mmqwen.vllm_plugin.model:MultimodalQwen3Model.embed_input_ids",
    "mmqwen.vllm_plugin.model:plan_rows",
    "mmqwen.vllm_plugin.model:fuse_embeddings",
)

NOT_FOUND: list[str] = []
_TOTALS: dict[str, list[float]] = {}  # seconds, the thread's CPU seconds, calls
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
        begin, worked = time.perf_counter(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent, worked = time.perf_counter() - begin, time.thread_time() - worked
            with _LOCK:
                entry = _TOTALS.setdefault(stage, [0.0, 0.0, 0])
                entry[0] += spent
                entry[1] += worked
                entry[2] += 1

    timed._stage = stage  # type: ignore[attr-defined]
    return timed


def take() -> dict[str, dict[str, float]]:
    """Milliseconds and calls of each stage since the last `take`."""
    with _LOCK:
        found = {
            stage: {"ms": round(1e3 * spent, 3), "cpu_ms": round(1e3 * worked, 3), "calls": calls}
            for stage, (spent, worked, calls) in _TOTALS.items()
        }
        _TOTALS.clear()
    return found


_PROFILERS: list[Any] = []


def gpu_begin() -> None:
    """Record the GPU's kernels and copies from now on."""
    import torch

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.start()
    _PROFILERS.append(profiler)


def gpu_end() -> dict[str, float]:
    """Milliseconds in which at least one kernel or copy ran since `gpu_begin`, and their number."""
    import torch

    torch.cuda.synchronize()
    profiler = _PROFILERS.pop()
    profiler.stop()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if str(event.device_type).endswith("CUDA")
    )
    busy = last = 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    return {"busy_ms": round(busy / 1e3, 3), "events": len(spans)}


def remote(worker: Any, source: str, action: str) -> Any:
    """Run a function of this file in a worker, which need not find the file."""
    import sys
    import types

    module = sys.modules.get("mmqwen_stage_timers")
    if module is None:
        module = types.ModuleType("mmqwen_stage_timers")
        sys.modules["mmqwen_stage_timers"] = module
        exec(compile(source, "stage_timers.py", "exec"), module.__dict__)
    return getattr(module, action)()


remote.__module__ = "__main__"  # cloudpickle then sends it by value
