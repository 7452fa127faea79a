"""Rows of a bank, named. The standard library only: every door reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class BankRows:
    """One item: rows of a bank, by their numbers or by their keys, in the order given.

    Checked where a prompt is read, as a tensor in its place is.

    Attributes:
        bank: the bank's name.
        ids: numbers of rows from 0 on: a list, or an integer array or tensor of one dimension.
        keys: strings of the bank's keys file, instead of `ids`.
    """

    bank: str
    ids: Any = None
    keys: Sequence[str] | None = None


def may_name(items: Any) -> bool:
    """Whether any of a modality's items may name rows: a quick look at their types."""
    if not isinstance(items, (list, tuple)):
        return is_named(items)
    return not _NAMING.isdisjoint(map(type, items))


_NAMING = {BankRows, dict}


def is_named(item: Any) -> bool:
    """Whether an item names rows: `BankRows`, or its form in JSON."""
    return isinstance(item, BankRows) or (isinstance(item, Mapping) and "bank" in item)
