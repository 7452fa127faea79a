"""Items that name rows of banks: put into a message's pack, and known as long as it is used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mmqwen.banks.catalog import Life, NamedRows
from mmqwen.packs import bank_group, write_ids
from mmqwen.vllm_plugin.parsing import ModalityItems

Grouped = tuple[int, NamedRows | None]
"""Of one item: its group in the pack, and the rows of a bank that it names, if it does."""


class NamedItems:
    """A prompt's items, taken in the order of the prompt.

    Args:
        items: by modality.
        index: of each modality.
    """

    def __init__(self, items: Mapping[str, ModalityItems], index: Mapping[str, int]) -> None:
        self._items = items
        self._index = index
        self._next = dict.fromkeys(items, 0)

    def take(self, names: Sequence[str]) -> list[Grouped]:
        """The next items of these modalities."""
        taken: list[Grouped] = []
        for name in names:
            entry, at, modality = self._items[name], self._next[name], self._index[name]
            self._next[name] += 1
            named = entry.named[at] if entry.named else None
            group = modality if named is None else bank_group(modality, named.source.number)
            taken.append((group, named))
        return taken


def write_named(pack: torch.Tensor, items: Sequence[Grouped]) -> None:
    """Write the ids of all items that name rows into their pack."""
    by_group: dict[int, list[NamedRows]] = {}
    for group, named in items:
        if named is not None:
            by_group.setdefault(group, []).append(named)
    for group, members in by_group.items():
        ids = [member.ids for member in members]
        joined = ids[0] if len(ids) == 1 else np.concatenate(ids)
        write_ids(pack, group, joined, members[0].source.bank.version)


class InUse:
    """The versions of banks that a prompt names: they live as long as what was made of it.

    It is no part of that, so it does not travel: another process gets an empty one.
    """

    __slots__ = ("lives",)

    def __init__(self, lives: frozenset[Life] = frozenset()) -> None:
        self.lives = lives

    def __reduce__(self) -> Any:
        return InUse, ()


def in_use(named: Iterable[NamedRows | None]) -> InUse | None:
    """The versions that a prompt's items name; None where they name none."""
    lives = frozenset(one.source.life for one in named if one is not None)
    return InUse(lives) if lives else None


def hold(item: Any, banks: InUse) -> None:
    """Let versions live as long as vLLM's item of a pack does."""
    item.mmqwen_banks = banks


def held_by(item: Any) -> InUse | None:
    """What `hold` said of an item of vLLM's."""
    return getattr(item, "mmqwen_banks", None)
