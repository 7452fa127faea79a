"""vLLM's engines as updates of banks see them: `mmqwen.vllm_plugin.bank_updates.Engine`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class OfflineEngine:
    """The engine of a `vllm.LLM`, used by one thread at a time: no coroutine ever waits.

    Args:
        llm: the `vllm.LLM`.
    """

    settle_seconds = 0.0
    """What is aborted has left the engine when the call returns, or will before the next one."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    @property
    def worker_extension(self) -> str:
        config = self._llm.llm_engine.vllm_config
        return str(config.parallel_config.worker_extension_cls or "")

    async def call(self, method: str, *args: Any) -> list[Any]:
        return list(self._llm.collective_rpc(method, args=args))

    async def in_a_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def live(self) -> set[str]:
        return set(self._llm.llm_engine.output_processor.request_states)


def run_offline(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine of an `OfflineEngine`, also inside an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a coroutine of an offline engine waits for an event loop")


class ServedEngine:
    """The engines of a server's front end.

    Args:
        client: vLLM's `AsyncLLM`.
    """

    settle_seconds = 0.5
    """vLLM aborts a request in its own process first, and awaits between that and telling."""

    def __init__(self, client: Any) -> None:
        self._client = client

    @property
    def worker_extension(self) -> str:
        return str(self._client.vllm_config.parallel_config.worker_extension_cls or "")

    async def call(self, method: str, *args: Any) -> list[Any]:
        core = self._client.engine_core
        engines = getattr(core, "core_engines", ())
        if len(engines) <= 1:
            return list(await self._client.collective_rpc(method, args=args))
        # All are called by vLLM's own method too, but what the first one answers is all it tells.
        call = (None, args, None)
        answers = await asyncio.gather(
            *(
                core._call_utility_async("collective_rpc", method, *call, engine=engine)
                for engine in engines
            )
        )
        return [answer for of_engine in answers for answer in of_engine]

    async def in_a_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.to_thread(function, *args)

    def live(self) -> set[str]:
        return set(self._client.output_processor.request_states)
