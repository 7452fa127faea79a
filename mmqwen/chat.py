"""From chat messages to the text of a prompt, as vLLM's server renders them. No torch, no vLLM."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mmqwen.inputs import check_unicode
from mmqwen.messages import MessageError
from mmqwen.modalities import ModalityError, ModalitySpec, check_marker_count

_FIELDS = {"refusal": "refusal", "thinking": "thinking", "tool_reference": "name"}
"""Fields that hold the text of a part, by its type; `text` elsewhere."""

_PROBE = "probe5e1f"

_TAKES: WeakKeyDictionary[Any, dict[tuple[str, str], tuple[bool, bool]]] = WeakKeyDictionary()
"""What `_takes` found, by tokenizer, then template and role: a dataset asks at each sample."""


def shape_messages(
    tokenizer: Any,
    messages: Iterable[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    tools: Any = None,
) -> list[dict[str, Any]]:
    """Give each message the content that a chat template reads: a string, or a list of parts.

    Templates that expect one print the other as an empty string, or as Python code. Which one a
    template expects is found by trying, for each role. Texts of several parts are joined by
    newlines where it expects strings, as vLLM joins them; arguments of tool calls that came as
    JSON become dicts, which templates expect.

    Args:
        tokenizer: renders templates; its own is taken where none is given.
        messages: from `messages.read_messages`: rows have become markers.
        chat_template: a template, or the name of one of the tokenizer's.
        tools: as for `apply_chat_template`; tokenizers may choose a template by them.

    Raises:
        MessageError: a message without a role, or a part whose text is none.
        ValueError: the tokenizer has no chat template; text that is no Unicode.
    """
    template = tokenizer.get_chat_template(chat_template, tools=tools)
    takes = _TAKES.setdefault(tokenizer, {})
    shaped = []
    for message in messages:
        role = message.get("role")
        for text in _strings(message):
            check_unicode(text)
        if not isinstance(role, str):
            raise MessageError(f"a message's role is a string, got {type(role).__name__}", "part")
        if (template, role) not in takes:
            takes[template, role] = _takes(tokenizer, template, role)
        shaped.append(_shape(message, *takes[template, role]))
    return shaped


def _strings(value: Any) -> Iterator[str]:
    """All text that a message holds, at whatever depth."""
    pending = [value]
    while pending:
        inner = pending.pop()
        if isinstance(inner, str):
            yield inner
        elif isinstance(inner, Mapping):
            pending.extend(inner.values())
        elif isinstance(inner, (list, tuple)):
            pending.extend(inner)


def render_chat(
    tokenizer: Any,
    messages: Iterable[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    **options: Any,
) -> str:
    """The text of a conversation.

    Args:
        tokenizer, messages, chat_template: see `shape_messages`.
        **options: passed on to the template: `add_generation_prompt`, `tools`, `enable_thinking`...

    Raises:
        MessageError: see `shape_messages`; also messages that the template refuses.
    """
    from jinja2 import TemplateError

    shaped = shape_messages(
        tokenizer, messages, chat_template=chat_template, tools=options.get("tools")
    )
    try:
        return tokenizer.apply_chat_template(
            shaped, chat_template=chat_template, tokenize=False, **options
        )
    except TemplateError as error:
        raise MessageError(f"the chat template refuses the messages: {error}", "part") from error


def check_parts_kept(
    token_ids: Sequence[int], specs: Mapping[str, ModalitySpec], counts: Mapping[str, int]
) -> None:
    """Refuse a rendered conversation that lacks the marker of a part.

    Elsewhere, items without any marker go before the text; here each had its place.

    Args:
        token_ids: the rendered conversation, not yet expanded.
        specs: the modalities.
        counts: parts of each modality.

    Raises:
        ModalityError: fewer or more markers than parts.
    """
    for name, count in counts.items():
        spec = specs[name]
        found = sum(token == spec.token_id for token in token_ids)
        if found != count:
            check_marker_count(spec, found, count)
            raise ModalityError(
                f"modality {name!r}: the rendered prompt holds none of the messages' "
                f"{count} part(s); the chat template, or truncation, dropped them"
            )


def _takes(tokenizer: Any, template: str, role: str) -> tuple[bool, bool]:
    """Whether a template reads strings, and whether it reads lists of parts, in this role."""
    from jinja2 import TemplateError

    def render(wrap: bool) -> str:
        def message(role: str, text: str) -> dict[str, Any]:
            return {"role": role, "content": [{"type": "text", "text": text}] if wrap else text}

        talk = [message(role, _PROBE)]
        if role in ("system", "developer"):
            talk.append(message("user", "?"))
        elif role != "user":
            talk.insert(0, message("user", "?"))
        try:
            return tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False)
        except (TemplateError, TypeError, AttributeError, KeyError):
            return ""

    as_text, as_parts = render(wrap=False), render(wrap=True)
    reads_text = _PROBE in as_text
    if reads_text:
        return True, as_parts == as_text
    printed = any(f"{quote}{_PROBE}{quote}" in as_parts for quote in "'\"")
    return False, _PROBE in as_parts and not printed


def _shape(message: Mapping[str, Any], reads_text: bool, reads_parts: bool) -> dict[str, Any]:
    content = message.get("content")
    shaped = dict(message)
    if message["role"] == "assistant":
        calls = shaped.pop("tool_calls", None)
        if isinstance(calls, list):
            calls = [_parse_arguments(call) for call in calls]
        if calls:  # templates take a field that is there, even an empty one, for a tool's call
            shaped["tool_calls"] = calls
    if content is None:
        content = ""
    if isinstance(content, str):
        if reads_parts and not reads_text:
            content = [{"type": "text", "text": content}]
        return {**shaped, "content": content}
    parts = [part for part in map(_read_part, content) if part is not None]
    # What a tool answers becomes a string where a template reads both, as vLLM does it.
    if reads_parts and not (reads_text and message["role"] == "tool"):
        return {**shaped, "content": parts}
    return {
        **shaped,
        "content": "\n".join(part[_FIELDS.get(part["type"], "text")] for part in parts),
    }


def _read_part(part: Any) -> dict[str, Any] | None:
    """`{"type": "text", "text": ...}` of any part that holds text; None of one without any."""
    kind = "text" if isinstance(part, str) else part["type"]
    text = part if isinstance(part, str) else part.get(_FIELDS.get(kind, "text"))
    if text is None:
        return None
    if not isinstance(text, str):
        raise MessageError(f"a part's text is a string, got {type(text).__name__}", "part")
    return (
        {"type": kind, "name": text} if kind == "tool_reference" else {"type": "text", "text": text}
    )


def _parse_arguments(call: Any) -> Any:
    """A tool call whose arguments are a dict; what is no JSON object becomes an empty one."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {}
    arguments = arguments if isinstance(arguments, Mapping) else {}
    return {**call, "function": {**function, "arguments": arguments}}
