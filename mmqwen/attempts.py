"""One input or a list of them: each step's results, and what failed in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmqwen.banks.rows import is_named
from mmqwen.inputs import Prompt
from mmqwen.modalities import ModalitySpec

Attempt = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def listed(inputs: Any) -> tuple[bool, list[Any]]:
    """Whether one input was given, not several; and a list of what was given.

    Raises:
        ValueError: neither.
    """
    single = isinstance(inputs, (str, Mapping))
    if not single and (isinstance(inputs, bytes) or not isinstance(inputs, Iterable)):
        raise ValueError(
            f"inputs are a str, a dict, or a list of these, got {type(inputs).__name__}"
        )
    return single, [inputs] if single else list(inputs)


def attempts(on_error: str, single: bool) -> Attempt:
    """What applies a step to each of some results; what it raises is raised, or stands there.

    Raises:
        ValueError: `on_error` is neither `"raise"` nor `"return"`.
    """
    if on_error not in ("raise", "return"):
        raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'return'")

    def attempt(step: Callable[[Any], Any], results: Sequence[Any]) -> list[Any]:
        done: list[Any] = []
        for index, value in enumerate(results):
            try:
                done.append(value if isinstance(value, Exception) else step(value))
            except ValueError as error:
                if on_error == "raise":
                    if not single:
                        error.add_note(f"in input {index} of {len(results)}")
                    raise
                done.append(error)
        return done

    return attempt


def add_widths(prompt: Prompt, widths: dict[str, int]) -> Prompt:
    """Note the names and widths of a prompt's modalities that are not yet among `widths`.

    Returns:
        The prompt.

    Raises:
        ValueError: a name that cannot be a modality's, or an item whose width cannot be told.
    """
    from mmqwen.transport import as_items

    found: dict[str, int] = {}
    for name, value in prompt.items.items():
        members = [item for item in as_items(value, name) if not is_named(item)]
        if not members:
            continue
        first = members[0]
        shape = getattr(first, "shape", None)
        if shape is None and isinstance(first, (list, tuple)) and first:
            inner = first[0] if isinstance(first[0], (list, tuple)) else first
            shape = (len(inner),)
        if not shape:
            raise ValueError(f"modality {name!r}: its width cannot be read off {first!r:.40}")
        found[name] = ModalitySpec(name=name, dim=int(shape[-1])).dim
    widths.update({name: dim for name, dim in found.items() if name not in widths})
    return prompt


def only(results: list[Any], single: bool) -> Any:
    return results[0] if single else results


def joined(
    results: Sequence[Any], good: Sequence[int], pieces: Iterator[tuple[int, str]], single: bool
) -> Iterator[Any]:
    """What could not be served, then the pieces of the others, numbered as the inputs are."""
    try:
        for index, result in enumerate(results):
            if isinstance(result, Exception):
                yield result if single else (index, result)
        for at, text in pieces:
            yield text if single else (good[at], text)
    finally:
        close = getattr(pieces, "close", None)
        if close is not None:
            close()
