"""The one kind of refusal: where, what was got, what was expected, what to do."""

from __future__ import annotations

from typing import NoReturn

SHOWN = 64
"""Most characters of a caller's own text that a message repeats."""


class EmbeddingError(ValueError):
    """Rows that cannot be served, with the reason.

    Attributes:
        modality: name of the modality, or None where it is not known.
        index: position of the item among its modality's items, or None.
        reason: short code for metrics, e.g. `width`, `rows`, `dims`, `ragged`, `dtype`, `sparse`,
            `type`, `non_finite`, `size`, `encoding`, `field`, `unknown_modality`.
    """

    def __init__(
        self,
        message: str,
        *,
        modality: str | None = None,
        index: int | None = None,
        reason: str = "invalid",
    ) -> None:
        super().__init__(message)
        self.modality = modality
        self.index = index
        self.reason = reason


def refuse(
    reason: str, modality: str | None, index: int | None, got: str, expected: str, remedy: str
) -> NoReturn:
    """Raise the one kind of error of this module: where, got, expected, remedy."""
    where = "embedding rows" if modality is None else f"modality {modality!r}"
    if index is not None:
        where += f", item {index}"
    raise EmbeddingError(
        f"{where}: got {got}, expected {expected}; {remedy}",
        modality=modality,
        index=index,
        reason=reason,
    )


def show(value: object) -> str:
    """A caller's value for a message: short, and never an int too long to print."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = repr(value[: SHOWN + 1] if isinstance(value, str) else value)
        return text if len(text) <= SHOWN else text[:SHOWN] + "..."
    return f"a {type(value).__name__}"
