"""vLLM's HF renderer with hooks of ours in the place of its private methods."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from vllm.renderers.hf import HfRenderer


class HookedRenderer(HfRenderer):
    """A subclass has the hooks.

    `tokens_looked_at(prompt)`: a context around the processing of a prompt that has become token
    ids; `check_embeds(prompt)`, of one whose tokens are embeddings; `pack(prompt, mm_data, dry)`:
    what the engine gets for a prompt with items, or None for what vLLM makes of it (`dry`: no
    engine will get it); `is_small(prompt)`: whether the event loop may make it itself.
    """

    async def in_a_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """The function's result, without holding up the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, function, *args)

    def _process_tokens(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        with self.tokens_looked_at(prompt):
            return super()._process_tokens(prompt, *args, **kwargs)

    async def _process_tokens_async(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        with self.tokens_looked_at(prompt):
            if self.is_small(prompt):
                return super()._process_tokens(prompt, *args, **kwargs)
            return await super()._process_tokens_async(prompt, *args, **kwargs)

    def _process_embeds(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        self.check_embeds(prompt)
        return super()._process_embeds(prompt, *args, **kwargs)

    def _process_multimodal(self, prompt: Any, mm_data: Any, *args: Any, **kwargs: Any) -> Any:
        packed = self.pack(prompt, mm_data, bool(kwargs.get("skip_mm_cache")))
        if packed is not None:
            return packed
        return super()._process_multimodal(prompt, mm_data, *args, **kwargs)
