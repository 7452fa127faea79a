"""vLLM's cache of processed items, of which the engine's half holds packs that tokens stand for.

vLLM keeps what items the front end has sent in two halves: the front end's knows their hashes and
sizes, the engine's has the items. A request may name an item without its data; where the engine has
it no more, the request ends with an error, and the front end is told to forget the item.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any, Protocol

import vllm.multimodal.cache as vllms
from vllm.multimodal.cache import BaseMultiModalProcessorCache
from vllm.utils.cache import CacheInfo

from mmqwen.vllm_plugin.compat import _attribute


class Held(Protocol):
    """What the front end knows of the packs that were sent."""

    hits: int
    total: int

    def has(self, digest: str) -> bool: ...
    def drop(self, digest: str) -> None: ...
    def clear(self) -> None: ...


def engine_half(vllm_config: Any) -> bool:
    """Whether the engine can keep packs for the front end, and says so when it has not.

    Not before 0.28, where a missing item ends the engine; not with several front ends or engines,
    of which each would have to know what the others sent; not in this process, where nothing is
    sent anyway and nobody hears of a missing item.
    """
    import vllm.envs as envs

    parallel = vllm_config.parallel_config
    alone = parallel.data_parallel_size == 1 or parallel.data_parallel_external_lb
    kind = getattr(vllm_config.model_config.multimodal_config, "mm_processor_cache_type", None)
    return bool(
        hasattr(vllms, "MultiModalCacheMissError")
        and envs.VLLM_ENABLE_V1_MULTIPROCESSING
        and front_ends(vllm_config) == 1
        and alone
        and kind == "lru"
    )


def front_ends(vllm_config: Any) -> int:
    """How many processes render prompts."""
    return int(getattr(vllm_config.parallel_config, "_api_process_count", 1))


class SenderHalf(BaseMultiModalProcessorCache):  # type: ignore[misc]
    """The front end's half, which is told what the engine has not.

    Packs never go through it: they are sent with their data, or named.
    """

    def __init__(self, held: Held) -> None:
        super().__init__()
        self._held = held
        self._seen = CacheInfo(0, 0)

    def is_cached_item(self, mm_hash: str) -> bool:
        return self._held.has(mm_hash)

    def get_and_update_item(self, mm_item: Any, mm_hash: str) -> Any:
        return mm_item

    def touch_sender_cache_item(self, mm_hash: str) -> None:
        pass

    def invalidate(self, mm_hash: str) -> None:
        self._held.drop(mm_hash)

    def clear_cache(self) -> None:
        self._held.clear()

    def make_stats(self, *, delta: bool = False) -> CacheInfo:
        now = CacheInfo(self._held.hits, self._held.total)
        before, self._seen = (self._seen, now) if delta else (CacheInfo(0, 0), self._seen)
        return CacheInfo(now.hits - before.hits, now.total - before.total)


def use_sender_half(renderer: Any, half: SenderHalf) -> None:
    """Put our half in the place of vLLM's: the renderer's from 0.31 on, its processor's before."""
    if hasattr(renderer, "_mm_processor_cache"):
        renderer._mm_processor_cache = half
    elif renderer.mm_processor is not None:
        renderer.mm_processor.cache = half


def raise_lost(key: str) -> None:
    """Let a server's requests whose named items the engine has not end with an error of ours.

    vLLM would answer 500. A prompt holds under `key` a function that gives the reason; it is raised
    as what vLLM expects of its engine, and says without a traceback.
    """
    module = sys.modules.get("vllm.v1.engine.async_llm")
    if module is None:
        return  # no server
    engine = module.AsyncLLM
    if not hasattr(engine.generate, "_mmqwen"):
        engine.generate = _raising(engine.generate, key)


def _raising(generate: Callable[..., Any], key: str) -> Callable[..., Any]:
    @wraps(generate)
    def generate_or_raise(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = generate(self, prompt, *args, **kwargs)
        lost = prompt.get(key) if isinstance(prompt, dict) else None
        return outputs if lost is None else _until_lost(outputs, lost)

    generate_or_raise._mmqwen = True  # type: ignore[attr-defined]
    return generate_or_raise


GENERATION_ERROR = ("vllm.exceptions", "vllm.entrypoints.openai.engine.protocol")
"""Where the error of a request that failed in the engine is, from 0.29 on and before."""


async def _until_lost(outputs: Any, lost: Callable[[], Exception]) -> Any:
    try:
        async for output in outputs:
            if is_lost(output):
                error = _attribute("GenerationError", *GENERATION_ERROR)(str(lost()))
                error.status_code = HTTPStatus.CONFLICT
                raise error
            yield output
    finally:
        await outputs.aclose()  # a client that left: the request is aborted at once


def is_lost(output: Any) -> bool:
    """Whether a request ended in an error before it had a token."""
    return bool(output.finished) and any(
        part.finish_reason == "error" and not part.token_ids for part in output.outputs
    )
