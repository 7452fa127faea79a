"""What may be asked of a text's sampling, by either engine. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "do_sample": "temperature: 0 is greedy, more than 0 samples",
    "stop": "stop_strings",
    "stop_strings": "stop",
    "num_return_sequences": "n",
}
"""What a field is called by the other engine, or here."""


def check_limits(max_tokens: Any, temperature: Any) -> tuple[int, float]:
    """Both as Python's own numbers.

    Raises:
        ValueError: no integer of at least 1, or no finite number of at least 0.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, Integral) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}, expected an integer >= 1")
    real = isinstance(temperature, Real) and not isinstance(temperature, bool)
    if not (real and math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature!r}, expected a number >= 0; 0 is greedy")
    return int(max_tokens), float(temperature)


def check_count(fields: Mapping[str, Any]) -> int:
    """How many texts of each input `n` among the fields asks for.

    Raises:
        ValueError: no integer of at least 1, or several where each would be the same.
    """
    count: Any = fields.get("n", 1)
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"n is {count!r}, expected an integer >= 1")
    count = int(count)
    if count > 1 and not fields["temperature"] and (fields.get("num_beams") or 1) < count:
        raise ValueError(f"n={count} with temperature 0 gives {count} times the same; raise it")
    return count


def check_fields(
    fields: Mapping[str, Any], known: Collection[str], one_text: Mapping[str, Any], taker: str
) -> None:
    """Refuse sampling fields that are unknown, or that ask for more than one text an input.

    Args:
        fields: what the caller gave.
        known: fields that the engine takes.
        one_text: fields that ask for more, and the values with which they do not.
        taker: whose fields these are, for the message.

    Raises:
        ValueError: such a field, by name.
    """
    for name, value in fields.items():
        if name in one_text:
            if value not in (one_text[name], None):
                raise ValueError(
                    f"{name}={value!r}: the pipeline gives one text for each input, and what else "
                    "this asks for would be lost; return_full=True gives n texts and the "
                    f"log-probabilities of their tokens, {taker} itself the rest"
                )
        elif name not in known:
            hint = _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, known, 1)), None)
            raise ValueError(
                f"unknown sampling field {name!r}: {taker} has none of this name that the "
                "pipeline passes on" + (f"; did you mean {hint}?" if hint else "")
            )
