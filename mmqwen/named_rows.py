"""Conversations of the pipeline: rows that the engine has are named, not packed again.

A conversation is given whole at each turn. Its rows are known again by a digest of their bytes as
they came, so that an array that was changed in place is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmqwen.references import ChatRows, RowsMissing, TokenBook, fast_digest
from mmqwen.vllm_plugin.compat.processor_cache import is_lost
from mmqwen.vllm_plugin.references import LOST

__all__ = ["NamedRows", "is_lost"]


class NamedRows:
    """What an engine in this process has issued tokens for."""

    def __init__(self) -> None:
        self._book = TokenBook()

    def render(
        self, items: ChatRows, make: Callable[[ChatRows], Any]
    ) -> tuple[Any, Callable[[], Any] | None]:
        """A prompt that names what it can.

        Args:
            items: a conversation's, all of them.
            make: a prompt of such items.

        Returns:
            The prompt; and what makes it of all rows, where the engine might have lost some.
        """
        digests = {at: digest for at, digest in enumerate(_digests(items)) if digest is not None}
        messages = [turn.message for turn in items.turns]
        tokens: dict[int, str] = {}
        for at, digest in digests.items():
            token = self._book.find(digest)
            if token is not None:
                tokens[messages[at]] = token

        def with_tokens(tokens: dict[int, str]) -> Any:
            rows = items.by_reference(tokens)
            prompt = make(rows)
            for at, digest in digests.items():
                if messages[at] in rows.issued:
                    self._book.learn(digest, rows.issued[messages[at]])
            return prompt

        try:
            prompt = with_tokens(tokens)
        except RowsMissing as error:
            self._book.forget(error.tokens)
            return with_tokens({}), None
        lost = prompt.get(LOST)
        if lost is None:
            return prompt, None

        def again() -> Any:
            self._book.forget(lost().tokens)
            return with_tokens({})

        return prompt, again


def _digests(items: ChatRows) -> list[bytes | None]:
    """Of the rows of each message, None where they are of a kind that is not looked into."""
    left = {name: iter(members) for name, members in items.items()}
    found: list[bytes | None] = []
    for turn in items.turns:
        digest: Any = fast_digest()()
        for name in turn.names:
            raw = _bytes_of(next(left[name]))
            if digest is None or raw is None:
                digest = None
                continue
            kind, data = raw
            digest.update(f"{name} {kind} {len(data)} ".encode())
            digest.update(data)
        found.append(None if digest is None else digest.digest())
    return found


def _bytes_of(item: Any) -> tuple[str, Any] | None:
    """What an item is, and its bytes; of arrays and tensors in host memory alone."""
    if type(item) is np.ndarray and item.dtype.kind == "f":
        array = np.ascontiguousarray(item)
        return f"{array.dtype.str} {item.shape}", array.reshape(-1).view(np.uint8).data
    import torch

    if (
        type(item) is not torch.Tensor
        or item.device.type != "cpu"
        or item.layout is not torch.strided
        or not item.is_floating_point()
        or item.is_neg()
        or not item.numel()
    ):
        return None
    flat = item.detach().contiguous().reshape(-1).view(torch.uint8)
    return f"{item.dtype} {tuple(item.shape)}", flat.numpy().data
