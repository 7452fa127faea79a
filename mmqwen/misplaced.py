"""Rows where nothing reads them, found so that they are refused and not dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mmqwen.modalities import ModalitySpec

_ROW_FIELDS = frozenset(
    {
        *("multimodaldata", "multimodalembeddings", "multimodalembeds", "multimodalinputs"),
        *("multimodalitems", "mmdata", "mmembeddings", "mmembeds", "mminputs", "mmitems"),
        *("embeddings", "embeds", "rows", "promptembeds", "promptembeddings", "inputembeds"),
        *("inputsembeds",),
    }
)
"""Names under which rows are handed over, right ones and near misses, in lower case and without
underscores and hyphens."""


def misplaced_rows(
    fields: Mapping[str, Any], specs: Mapping[str, ModalitySpec], known: Collection[str] = ()
) -> str | None:
    """The first field that seems to hold rows although nothing reads it there.

    What reads prompts and requests skips fields that it does not know, so rows under another
    spelling would be dropped and the rest answered as text. A field is taken for rows if its name
    says so, if it is named like a modality and holds a list, a dict or an array, or if it holds
    arrays or fields of that kind, whatever its name.

    Args:
        fields: a prompt, a request, a message or a part.
        specs: the modalities.
        known: fields that are read, whatever they hold.
    """
    if isinstance(known, frozenset) and fields.keys() <= known:
        return None
    unknown = {key: fields[key] for key in fields if key not in known and isinstance(key, str)}
    if not unknown:
        return None
    names = {_plain(name + end) for name in specs for end in ("", "_embeds", "_embeddings")}
    for key, value in unknown.items():
        empty = value is None or (isinstance(value, (str, list, tuple, Mapping)) and not value)
        if not empty and (_plain(key) in _ROW_FIELDS or _holds_rows(key, value, names)):
            return key
    return None


def _holds_rows(key: str, value: Any, names: Collection[str], depth: int = 3) -> bool:
    if getattr(value, "dtype", None) is not None and len(getattr(value, "shape", ())):
        return True
    if not isinstance(value, (list, tuple, Mapping)):
        return False
    if _plain(key) in names or _plain(key) in _ROW_FIELDS:
        return True
    if not depth:
        return False
    if isinstance(value, Mapping):
        return any(
            _holds_rows(inner, member, names, depth - 1)
            for inner, member in value.items()
            if isinstance(inner, str)
        )
    # Items of one list are alike: the first tells.
    return any(_holds_rows("", member, names, depth - 1) for member in value[:1])


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
