"""All that differs between vLLM 0.26 and 0.33, in one place."""

from __future__ import annotations

from typing import Any


def prompt_token_ids(inputs: Any, info: Any) -> list[int]:
    """The prompt's token ids: 0.26 may hand over a string, later releases always hand over ids."""
    prompt = inputs.prompt
    if isinstance(prompt, str):
        kwargs = dict(getattr(inputs, "tokenization_kwargs", None) or {})
        return list(info.get_tokenizer().encode(prompt, **kwargs))
    return list(prompt)
