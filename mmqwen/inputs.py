"""What users hand over as a prompt, read into one form. No torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

EMBEDDINGS_KEY = "multimodal_embeddings"


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: the text, or None where token ids were given.
        token_ids: the ids, or None where text was given.
        items: modality to whatever the user gave for it, not yet checked.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    items: Mapping[str, Any] = field(default_factory=dict)


def read_prompt(value: Any) -> Prompt:
    """Read a string, the plain dict, or vLLM's dict.

    Args:
        value: `"text"`; `{"text": ..., "multimodal_data": {"multimodal_embeddings": {...}}}`;
            `{"prompt": ... or "prompt_token_ids": [...], "multi_modal_data": {...}}`.

    Raises:
        ValueError: anything else; text that is no Unicode; an id that is no integer.
    """
    if isinstance(value, str):
        return Prompt(text=check_unicode(value))
    if not isinstance(value, Mapping):
        raise ValueError(
            f"a prompt is a str or a dict, got {type(value).__name__}; token ids go into "
            '{"prompt_token_ids": [...]}'
        )
    known = {"text", "multimodal_data", "prompt", "prompt_token_ids", "multi_modal_data"}
    unknown = set(value) - known
    if unknown:
        raise ValueError(f"unknown fields {sorted(map(str, unknown))}; expected {sorted(known)}")
    given = [key for key in ("text", "prompt", "prompt_token_ids") if value.get(key) is not None]
    if len(given) != 1:
        raise ValueError(
            f"a prompt has exactly one of 'text', 'prompt' and 'prompt_token_ids', got {given}"
        )
    nested, plain = (_dict_of(value, key) for key in ("multimodal_data", "multi_modal_data"))
    if nested and plain:
        raise ValueError("items were given twice: 'multimodal_data' and 'multi_modal_data'")
    if set(nested) - {EMBEDDINGS_KEY}:
        raise ValueError(f"'multimodal_data' is a dict with the one field {EMBEDDINGS_KEY!r}")
    items = _dict_of(nested, EMBEDDINGS_KEY) or plain
    body = value[given[0]]
    if given[0] == "prompt_token_ids":
        return Prompt(token_ids=read_ids(body), items=items)
    if not isinstance(body, str):
        raise ValueError(f"{given[0]!r} is a str, got {type(body).__name__}")
    return Prompt(text=check_unicode(body), items=items)


def _dict_of(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A field that holds a dict; None and a field left out are an empty one."""
    found = value.get(key)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{key!r} is a dict, got {type(found).__name__}; items are given as "
            '{"name": [item, ...]}'
        )
    return found


def read_ids(ids: Any) -> list[int]:
    """Token ids as a list of Python's integers: of a list, a tuple, or an array of one dimension.

    Raises:
        ValueError: no list, or a member that is no integer (a bool is none).
    """
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if not isinstance(ids, (list, tuple)):
        raise ValueError(f"'prompt_token_ids' is a list of ids, got {type(ids).__name__}")
    if set(map(type, ids)) <= {int}:
        return list(ids)
    for at, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise ValueError(
                f"token id {at} of the prompt is {token!r:.40}, expected an integer; write text "
                "as 'text' or 'prompt'"
            )
    return [int(token) for token in ids]


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Refuse token ids for which the model has no embedding.

    Raises:
        ValueError: an id below 0, or not below `vocab_size`.
    """
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        at, token = next((at, token) for at, token in enumerate(ids) if not 0 <= token < vocab_size)
        raise ValueError(
            f"token id {at} of the prompt is {token}, expected 0 to {vocab_size - 1}; the ids "
            "come from another model's tokenizer"
        )


def check_unicode(text: str) -> str:
    """The text, unless it holds half of a surrogate pair, which no tokenizer takes.

    Raises:
        ValueError: it does; the message names the position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate "
            f"{text[error.start]!r}, which is no Unicode text; remove it, or decode its source "
            "with errors='replace'"
        ) from None
    return text
