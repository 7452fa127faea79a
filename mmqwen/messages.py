"""Chat messages with rows among their parts, read into text and items. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mmqwen.banks.rows import is_named
from mmqwen.misplaced import misplaced_rows
from mmqwen.modalities import ModalityError, ModalitySpec
from mmqwen.references import MAX_TOKEN, REFERENCE_KIND, ChatRows, Turn

TEXT_KINDS = frozenset({"text", "input_text", "output_text"})
"""Types of chat parts whose field `text` is text."""

_MESSAGE_FIELDS = frozenset({"role", "content", "name", "audio", "tool_calls", "function_call"})
"""Fields of chat messages that a modality may be named like."""

PASSED_KINDS = TEXT_KINDS | {"refusal", "thinking", "tool_reference"}
"""Types of chat parts that a message without rows may hold. Others would be fetched, unpickled or
decoded by whatever reads the message next, although no such model takes them."""


class MessageError(ModalityError):
    """A chat message that cannot be read.

    Attributes:
        reason: short code for metrics: `part`, `typed_marker` or `misplaced`.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class WireLimits:
    """What one request may bring over the wire, in decoded bytes."""

    item_bytes: int = 64 * 2**20
    request_bytes: int = 256 * 2**20


def read_messages(
    messages: Sequence[Mapping[str, Any]],
    specs: Mapping[str, ModalitySpec],
    limits: WireLimits | None = None,
    *,
    other_kinds: Collection[str] = (),
    rows_apart: bool = False,
    references: bool = False,
) -> tuple[list[dict[str, Any]], ChatRows]:
    """Turn chat messages with parts of rows into messages of text, with one marker an item.

    A part is `{"type": "text", "text": ...}`; `{"type": NAME, NAME: item}` for a modality NAME and
    an array or `BankRows`; or `{"type": "NAME_embeds", "NAME_embeds": ...}` with the wire format of
    `transport.decode_rows`, or `{"bank": ..., "ids": [...]}`, or "keys". The pieces of a message
    that holds rows are joined as they stand; messages without rows are passed on, less a part's
    `uuid`, which could name another's cache entry. Parts of other types (images, pickled tensors)
    are refused, and so are marker spellings typed into the text of a message: what a user writes
    never becomes a slot.

    Args:
        messages: `[{"role": ..., "content": str or parts}, ...]`.
        specs: the modalities.
        limits: size limits of the wire format.
        other_kinds: further types of parts to pass on, in messages without rows.
        rows_apart: the program that wrote the messages may hand over rows by another way: a part
            may be `{"type": NAME}` alone, and text may spell markers.
        references: a message may give its rows by one part `{"type": "rows_reference",
            "rows_reference": TOKEN}`; its parts of rows then hold null, and stand for places alone.

    Returns:
        The messages, and the items of each modality in order (None where a token stands for them),
        with the messages that they came in.

    Raises:
        MessageError: no list of messages, a part of another type, text that spells a marker, or a
            token that is none, or is not alone.
        EmbeddingError: an item that cannot be decoded, or items over the request's limit.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise MessageError(
            "messages are a list of dicts with 'role' and 'content', got a "
            f"{type(messages).__name__}",
            "part",
        )
    reader = _PartReader(specs, limits or WireLimits(), other_kinds, rows_apart, references)
    return [reader.read(message) for message in messages], reader.items


class _PartReader:
    def __init__(
        self,
        specs: Mapping[str, ModalitySpec],
        limits: WireLimits,
        other_kinds: Collection[str],
        rows_apart: bool,
        references: bool,
    ) -> None:
        self.items = ChatRows()
        self._references = references
        self._read = 0
        self._specs = specs
        self._limits = limits
        self._kinds = {name: name for name in specs} | {f"{name}_embeds": name for name in specs}
        self._passed = PASSED_KINDS.union(other_kinds)
        self._rows_apart = rows_apart
        self._bytes = 0

    def read(self, message: Mapping[str, Any]) -> dict[str, Any]:
        at, self._read = self._read, self._read + 1
        if not isinstance(message, Mapping):
            raise MessageError(
                f"a message is a dict with 'role' and 'content', got a {type(message).__name__}",
                "part",
            )
        self._refuse_misplaced(message, _MESSAGE_FIELDS, "a message")
        content = message.get("content")
        if isinstance(content, str):
            self._check_text(content)
            return dict(message)
        message = listed(message)
        parts = message.get("content") or []
        kinds = [_kind_of(part) for part in parts]
        if not any(kind in self._kinds for kind in kinds):
            passed = [self._pass(kind, part) for kind, part in zip(kinds, parts, strict=True)]
            return {**message, "content": passed} if passed else message
        token = self._token(kinds, parts) if self._references else None
        turn = Turn(at, [self._kinds[kind] for kind in kinds if kind in self._kinds], token)
        self.items.turns.append(turn)
        pieces = [
            self._take(kind, part, token) if kind in self._kinds else self._text(kind, part)
            for kind, part in zip(kinds, parts, strict=True)
            if token is None or kind != REFERENCE_KIND
        ]
        return {**message, "content": "".join(pieces)}

    def _token(self, kinds: Sequence[str], parts: Sequence[Any]) -> str | None:
        """The token that stands for a message's rows, if one does."""
        found = [part for kind, part in zip(kinds, parts, strict=True) if kind == REFERENCE_KIND]
        if not found:
            return None
        token = found[0].get(REFERENCE_KIND)
        if len(found) > 1 or not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN:
            raise MessageError(
                f"a message gives its rows by one part {{'type': {REFERENCE_KIND!r}, "
                f"{REFERENCE_KIND!r}: a token of at most {MAX_TOKEN} characters}}, got "
                f"{len(found)} of them with {type(token).__name__}",
                "reference",
            )
        self._refuse_misplaced(found[0], (REFERENCE_KIND, "type"), f"a {REFERENCE_KIND!r} part")
        return token

    def _pass(self, kind: str, part: Any) -> Any:
        """A part of a message without rows."""
        if kind not in self._passed:
            self._refuse(kind)
        if isinstance(part, str):
            self._check_text(part)
            return part
        self._refuse_misplaced(part, (kind, "text", "type"), f"a part of type {kind!r}")
        text = part.get("text")
        if isinstance(text, str):
            self._check_text(text)
        if "uuid" in part:
            return {key: value for key, value in part.items() if key != "uuid"}
        return part

    def _text(self, kind: str, part: Any) -> str:
        """The text of a part that stands beside rows."""
        text = part if isinstance(part, str) else part.get("text") if kind in TEXT_KINDS else None
        if not isinstance(text, str):
            self._refuse(kind)
        if not isinstance(part, str):
            self._refuse_misplaced(part, ("text", "type"), f"a part of type {kind!r}")
        self._check_text(text)
        return text

    def _check_text(self, text: str) -> None:
        if not self._rows_apart:
            check_typed_text(text, self._specs)

    def _refuse(self, kind: str) -> NoReturn:
        expected = ["text", *(f"{name}_embeds" for name in self._specs)]
        raise MessageError(f"a part of type {kind!r:.60}; expected one of {expected}", "part")

    def _refuse_misplaced(
        self, fields: Mapping[str, Any], known: Collection[str], where: str
    ) -> None:
        found = misplaced_rows(fields, self._specs, known)
        if found is not None:
            name = next(iter(self._specs))
            raise MessageError(
                f"{found!r:.60} is no field of {where}, and what it holds would be dropped; an "
                f"item of modality {name!r} is a part of its own in 'content': {name!r} (an "
                f"array) or {name + '_embeds'!r} (over HTTP), under the field of that name",
                "misplaced",
            )

    def _take(self, kind: str, part: Mapping[str, Any], token: str | None) -> str:
        name = self._kinds[kind]
        if token is not None:
            if part.get(kind) is not None:
                raise MessageError(
                    f"a message has both rows ({kind!r}) and a token that stands for all its rows; "
                    f"leave the rows out ({{'type': {kind!r}, {kind!r}: null}}), or the token",
                    "reference",
                )
            self._refuse_misplaced(part, (kind, "type"), f"a part of type {kind!r}")
            self.items.setdefault(name, []).append(None)
            return self._specs[name].token
        if kind not in part:
            if self._rows_apart:
                return self._specs[name].token
            raise MessageError(f"a part of type {kind!r} lacks the field {kind!r}", "part")
        if len(part) > 2:
            self._refuse_misplaced(part, (kind, "type"), f"a part of type {kind!r}")
        items = self.items.setdefault(name, [])
        items.append(part[kind] if kind == name else self._decode(name, part[kind], len(items)))
        return self._specs[name].token

    def _decode(self, name: str, payload: Any, index: int) -> Any:
        if is_named(payload):
            from mmqwen.banks.catalog import read_fields

            return read_fields(payload, name, index)
        from mmqwen.transport import EmbeddingError, decode_rows

        left = self._limits.request_bytes - self._bytes
        try:
            rows = decode_rows(
                payload,
                self._specs[name],
                index=index,
                max_bytes=min(self._limits.item_bytes, left),
            )
        except EmbeddingError as error:
            if error.reason == "size" and left < self._limits.item_bytes:
                raise EmbeddingError(
                    f"{error}; all items of a request may have {self._limits.request_bytes} bytes, "
                    f"and those before this one have {self._bytes}",
                    modality=name,
                    index=index,
                    reason="request_size",
                ) from None
            raise
        self._bytes += rows.numel() * rows.element_size()
        return rows


def listed(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a message whose parts are a list: a server may hand over a one-time iterator.

    Raises:
        MessageError: the content is neither text nor parts.
    """
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if isinstance(content, (Mapping, bytes)) or not isinstance(content, Iterable):
        raise MessageError(
            f"a message's content is text or a list of parts, got {type(content).__name__}", "part"
        )
    return {**message, "content": list(content)}


def _kind_of(part: Any) -> str:
    """The type of a part; a bare string is a text.

    Raises:
        MessageError: it is neither a string nor an object with a type.
    """
    if isinstance(part, str):
        return "text"
    kind = part.get("type", "") if isinstance(part, Mapping) else None
    if isinstance(kind, str):
        return kind
    wrong = f"a type that is a {type(kind).__name__}"
    raise MessageError(
        "a part of a message is text or an object whose 'type' is a string, got "
        + (wrong if isinstance(part, Mapping) else f"a {type(part).__name__}"),
        "part",
    )


def wire_characters(messages: Sequence[Mapping[str, Any]]) -> int:
    """Characters of base64 that the messages hold, roughly, without reading them."""
    total = 0
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            for payload in part.values() if isinstance(part, Mapping) else ():
                data = payload.get("data") if isinstance(payload, Mapping) else None
                total += len(data) if isinstance(data, str) else 0
    return total


def check_typed_text(text: str, specs: Mapping[str, ModalitySpec]) -> None:
    """Refuse text of a chat message that spells a placeholder token.

    Raises:
        MessageError: it does.
    """
    for spec in specs.values():
        if spec.token in text:
            raise MessageError(
                f"a message's text spells {spec.token}, the placeholder of modality "
                f"{spec.name!r}; send items as parts of their own, and write the text without it",
                "typed_marker",
            )
