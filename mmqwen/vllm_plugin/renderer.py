"""vLLM's HF renderer, plus what this package's models need; other models see no difference."""

from __future__ import annotations

from typing import Any

from vllm.renderers.hf import HfRenderer

from mmqwen.modalities import check_no_markers
from mmqwen.vllm_plugin.modality_table import (
    add_placeholder_tokens,
    is_ours,
    modality_table,
)


class MultimodalQwen3Renderer(HfRenderer):
    """Refuses placeholders without items, which vLLM would take for plain text."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self._specs = {}
        if is_ours(config.model_config) and tokenizer is not None:
            self._specs = modality_table(config.model_config)
            add_placeholder_tokens(tokenizer, self._specs)
        super().__init__(config, tokenizer)

    def _process_tokens(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        self._check(prompt)
        return super()._process_tokens(prompt, *args, **kwargs)

    async def _process_tokens_async(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        self._check(prompt)
        return await super()._process_tokens_async(prompt, *args, **kwargs)

    def _check(self, prompt: Any) -> None:
        if self._specs and not prompt.get("multi_modal_data"):
            check_no_markers(prompt["prompt_token_ids"], self._specs)
