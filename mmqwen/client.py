"""What an API client needs, and nothing heavier than numpy: embeddings as chat message parts.

from openai import OpenAI
from mmqwen.client import RowsChat, embeds_part

chat = RowsChat(OpenAI(base_url=...))
content = [embeds_part("m1", rows), {"type": "text", "text": "What is this?"}]
chat.create(model=..., messages=[{"role": "user", "content": content}])

Parts go into `client.chat.completions.create` as well; `RowsChat` sends no rows twice that the
server has (`mmqwen serve --row-references`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmqwen.references import REFERENCE_KIND, TokenBook, fast_digest
from mmqwen.transport import encode_rows

__all__ = ["RowsChat", "embeds_part"]

HEADER = "mmqwen-references"
"""Of an answer: `0=TOKEN,2=TOKEN`, from a message's position to what stands for its rows."""


def embeds_part(modality: str, rows: Any, dtype: str | None = None) -> dict[str, Any]:
    """One item of a modality as a part of a chat message's content.

    Args:
        modality: the modality's name, e.g. `"m1"`.
        rows: a `[d]` vector or `[n, d]` matrix: numpy, torch, or nested lists.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` on the wire; left out, the rows' own
            (float32 for float64 and for lists). A half-width dtype halves the request.

    Returns:
        `{"type": "m1_embeds", "m1_embeds": {"data": ..., "dtype": ..., "shape": [n, d]}}`.

    Raises:
        mmqwen.transport.EmbeddingError: the rows are not dense, floating and finite.
    """
    kind = f"{modality}_embeds"
    return {"type": kind, kind: encode_rows(rows, dtype, modality=modality)}


class RowsChat:
    """Chat completions in which rows that the server has are named, not sent again.

    Conversations are given whole each time, rows and all; what the server has is found by the rows
    themselves. Where it has them no more, they are sent again, unasked. With a server that names no
    rows this is the client alone.

    Args:
        client: an `openai.OpenAI` or `openai.AsyncOpenAI`.
        remembered: how many messages' tokens are kept, about 200 bytes each.
    """

    def __init__(self, client: Any, remembered: int = 4096) -> None:
        self._completions = client.chat.completions.with_raw_response
        self._book = TokenBook(remembered)

    def create(self, *, messages: Sequence[Any], **fields: Any) -> Any:
        """`client.chat.completions.create`; with an `AsyncOpenAI` an awaitable of it.

        Raises:
            openai.APIError: as the client.
        """
        turns = _Conversation(messages, fields)
        short, used = turns.shortened(self._book)
        answer = None
        try:
            answer = self._completions.create(messages=short, **fields)
        except Exception as error:
            if not self._forget(error, used):
                raise
            answer = self._completions.create(messages=messages, **fields)
        if hasattr(answer, "__await__"):
            return self._finish(answer, turns, messages, fields, used)
        return self._read(answer, turns)

    async def _finish(
        self, answer: Any, turns: _Conversation, messages: Any, fields: Any, used: list[str]
    ) -> Any:
        try:
            raw = await answer
        except Exception as error:
            if not self._forget(error, used):
                raise
            raw = await self._completions.create(messages=messages, **fields)
        return self._read(raw, turns)

    def _forget(self, error: Exception, used: list[str]) -> bool:
        """Whether an error may be about tokens: they are dropped then, and the rows are sent.

        A server that was started anew without row references does not know such parts: 400.
        """
        if not used or getattr(error, "status_code", None) not in (400, 409):
            return False
        body = getattr(error, "body", None)
        missing = body.get("missing") if isinstance(body, Mapping) else None
        self._book.forget(missing if isinstance(missing, list) else used)
        return True

    def _read(self, raw: Any, turns: _Conversation) -> Any:
        for pair in filter(None, raw.headers.get(HEADER, "").split(",")):
            position, _, token = pair.partition("=")
            if position.isdecimal() and token:
                self._book.learn(turns.digests.get(int(position)), token)
        return raw.parse()


class _Conversation:
    """The messages of a request, those with rows known by a digest."""

    def __init__(self, messages: Sequence[Any], fields: Mapping[str, Any]) -> None:
        # A token is good for one server and tenant: other salts are other rows.
        salt = (fields.get("extra_body") or {}).get("cache_salt")
        self._messages = messages
        self.digests: dict[int, bytes] = {}
        for position, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            parts = content if isinstance(content, (list, tuple)) else ()
            rows = [part for part in parts if _is_rows(part)]
            if rows:
                digest = fast_digest()()
                digest.update(repr(salt).encode())
                for part in rows:
                    payload = part[part["type"]]
                    shape = [part["type"], payload["dtype"], payload["shape"], len(payload["data"])]
                    digest.update(repr(shape).encode())
                    digest.update(payload["data"].encode())
                self.digests[position] = digest.digest()

    def shortened(self, book: TokenBook) -> tuple[list[Any], list[str]]:
        """The messages with tokens in the place of rows, and the tokens."""
        short = list(self._messages)
        used = []
        for position, digest in self.digests.items():
            token = book.find(digest)
            if token is None:
                continue
            used.append(token)
            message = short[position]
            content: list[Any] = [{"type": REFERENCE_KIND, REFERENCE_KIND: token}]
            for part in message["content"]:
                kind = part["type"] if _is_rows(part) else None
                content.append(part if kind is None else {"type": kind, kind: None})
            short[position] = {**message, "content": content}
        return short, used


def _is_rows(part: Any) -> bool:
    """Whether a part is one of `embeds_part`'s."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    payload = part.get(kind) if isinstance(kind, str) and kind.endswith("_embeds") else None
    return (
        isinstance(payload, Mapping)
        and isinstance(payload.get("data"), str)
        and {"dtype", "shape"} <= payload.keys()
    )
