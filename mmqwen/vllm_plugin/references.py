"""Rows by reference in a vLLM front end: prompts made of packs that are held.

See docs/adr/0008-rows-by-reference.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.inputs import mm_input
from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

from mmqwen.banks.rows import BankRows
from mmqwen.messages import MessageError
from mmqwen.modalities import ModalityError, ModalitySpec
from mmqwen.references import ChatRows, PackName, RowsMissing, Signer, Turn
from mmqwen.vllm_plugin.held_packs import HeldPacks
from mmqwen.vllm_plugin.metrics import count_references
from mmqwen.vllm_plugin.processing import PACK_MODALITY

LOST = "mmqwen_lost"
"""Key of a rendered prompt that names packs whose data the engine is to have: a function that gives
the error to raise where it has not."""

BANKS = "mmqwen_banks"
"""Key of such a prompt: the versions of banks that these packs name, which must not go before."""


@dataclass
class Ledger:
    """What a request's prompts say of references, for the answer to its client."""

    conversations: list[ChatRows] = field(default_factory=list)

    @property
    def issued(self) -> dict[int, str]:
        """Position of a message to its token; a request of several conversations gets none."""
        return self.conversations[0].issued if len(self.conversations) == 1 else {}

    @property
    def missing(self) -> list[str]:
        """Tokens of the request that stood for nothing."""
        return [token for rows in self.conversations for token in rows.missing]

    def look_again(self) -> None:
        """Ask what became missing after the prompt was made."""
        for rows in self.conversations:
            if rows.look_again is not None:
                rows.look_again()

    @property
    def asks(self) -> bool:
        """Whether the request gives rows by reference."""
        return any(rows.tokens for rows in self.conversations)


LEDGER: ContextVar[Ledger | None] = ContextVar("mmqwen_ledger", default=None)
"""Of the HTTP request that is being served."""


Pack = Callable[[Sequence[int], Mapping[str, list[Any]]], Any]


class References:
    """Makes a prompt of a conversation, message by message, so that each has packs of its own.

    Args:
        specs: the modalities.
        signer: of tokens.
        held: the packs that tokens may stand for.
        max_length: most tokens of a prompt.
    """

    def __init__(
        self,
        specs: Mapping[str, ModalitySpec],
        signer: Signer,
        held: HeldPacks,
        max_length: int,
    ) -> None:
        self.held = held
        self._signer = signer
        self._max_length = max_length
        self._names = list(specs)
        self._index = {name: at for at, name in enumerate(specs)}
        self._by_id = {spec.token_id: name for name, spec in specs.items()}

    def render(
        self, token_ids: Sequence[int], rows: ChatRows, pack: Pack, *, dry: bool = False
    ) -> Any:
        """vLLM's input of a conversation, with rows taken from what is held where tokens say so.

        Args:
            token_ids: the prompt, one marker an item.
            rows: the items; what is issued is written there, and what is missing.
            pack: makes vLLM's input of a stretch of the prompt, whose rows came with it.
            dry: the prompt goes to no engine: nothing is held, nothing issued.

        Raises:
            RowsMissing: tokens that stand for nothing, all of them named.
            ModalityError: markers, messages and tokens do not match, or the prompt is too long.
            EmbeddingError: rows that cannot be served.
        """
        named = self._look_up(rows)
        marks = [at for at, token in enumerate(token_ids) if token in self._by_id]
        order = [self._by_id[token_ids[at]] for at in marks]
        if order != [name for turn in rows.turns for name in turn.names]:
            if rows.tokens:
                raise MessageError(
                    "the chat template moves rows to another place than their messages, so that no "
                    "token can stand for them; send the rows",
                    "reference",
                )
            return pack(token_ids, rows)
        made = _Made()
        left = {name: iter(members) for name, members in rows.items()}
        done = 0
        for turn, found in zip(rows.turns, named, strict=True):
            first, done = done, done + len(turn.names)
            begin = marks[first] if first else 0
            end = marks[done] if done < len(marks) else len(token_ids)
            given: dict[str, list[Any]] = {}
            for name in turn.names:
                given.setdefault(name, []).append(next(left[name]))
            if found is None:
                packs = self._add_rows(made, pack(token_ids[begin:end], given), turn, given)
                if not dry:
                    self._hold(made, packs, turn, rows)
            else:
                self._add_named(made, token_ids, begin, marks[first:done], found)
                made.token_ids += token_ids[marks[done - 1] + 1 : end]
        if len(made.token_ids) > self._max_length:
            raise ModalityError(
                f"the prompt is {len(made.token_ids)} tokens long with its rows; expected at most "
                f"{self._max_length} (max_model_len)"
            )
        prompt: Any = mm_input(
            prompt_token_ids=made.token_ids,
            mm_kwargs=MultiModalKwargsItems({PACK_MODALITY: made.items}),
            mm_hashes={PACK_MODALITY: made.digests},
            mm_placeholders={PACK_MODALITY: made.ranges},
        )
        if rows.tokens and not self.held.keep:
            # The engine has the packs: nothing else here holds the banks that they name.
            prompt[BANKS] = self.held.banks_of(made.digests)
            rows.look_again = lambda: self._lost(rows)
            prompt[LOST] = lambda: RowsMissing(self._lost(rows) or self._all_lost(rows))
        return prompt

    def _look_up(self, rows: ChatRows) -> list[list[tuple[PackName, Any]] | None]:
        """For each message the packs that its token stands for, with what is held of them."""
        named: list[list[tuple[PackName, Any]] | None] = []
        missing: list[str] = []
        for turn in rows.turns:
            if turn.token is None:
                named.append(None)
                continue
            packs = self._signer.read(turn.token, rows.tenant)
            items = packs and self.held.find([pack.digest for pack in packs], rows.tenant)
            if not packs or items is None:
                missing.append(turn.token)
                continue
            self._check_layout(turn, packs)
            named.append(list(zip(packs, items, strict=True)))
        count_references("hit", len(rows.tokens) - len(missing))
        if missing:
            count_references("missing", len(missing))
            rows.missing = missing
            raise RowsMissing(missing)
        return named

    def _check_layout(self, turn: Turn, packs: Sequence[PackName]) -> None:
        found = [self._names[index] for pack in packs for index, _ in pack.items]
        if found != turn.names:
            raise MessageError(
                f"message {turn.message} has places for rows of {turn.names!r:.200}, and its token "
                f"stands for rows of {found!r:.200}, in this order; leave the parts of rows as "
                "they were sent, each with null",
                "reference",
            )

    def _add_rows(
        self, made: _Made, prompt: Any, turn: Turn, given: Mapping[str, list[Any]]
    ) -> list[PackName]:
        """Add a message whose rows came with it; its packs' names."""
        offset = len(made.token_ids)
        ranges = prompt["mm_placeholders"][PACK_MODALITY]
        digests = prompt["mm_hashes"][PACK_MODALITY]
        made.token_ids += prompt["prompt_token_ids"]
        made.items += prompt["mm_kwargs"][PACK_MODALITY]
        made.digests += digests
        members = {name: iter(items) for name, items in given.items()}
        items = ((self._index[name], _rows_of(next(members[name]))) for name in turn.names)
        packs = []
        for digest, place in zip(digests, ranges, strict=True):
            made.ranges.append(
                PlaceholderRange(
                    offset=place.offset + offset, length=place.length, is_embed=place.is_embed
                )
            )
            left = place.length if place.is_embed is None else int(place.is_embed.sum())
            inside = []
            while left > 0:
                inside.append(next(items))
                left -= inside[-1][1]
            packs.append(PackName(digest, tuple(inside)))
        return packs

    def _add_named(
        self,
        made: _Made,
        token_ids: Sequence[int],
        begin: int,
        marks: Sequence[int],
        named: Sequence[tuple[PackName, Any]],
    ) -> None:
        """Add a message, up to its last item, whose token stands for these packs."""
        out = made.token_ids
        left = iter(marks)
        for pack, item in named:
            places = []
            for _, rows in pack.items:
                at = next(left)
                if begin < at:
                    out += token_ids[begin:at]
                begin = at + 1
                places.append((len(out), rows))
                if rows == 1:
                    out.append(token_ids[at])
                else:
                    out += [token_ids[at]] * rows
            offset = places[0][0]
            length = len(out) - offset
            mask = None
            if length != sum(rows for _, rows in places):
                inside = np.zeros(length, dtype=np.bool_)
                for at, rows in places:
                    inside[at - offset : at - offset + rows] = True
                mask = torch.from_numpy(inside)
            made.ranges.append(PlaceholderRange(offset=offset, length=length, is_embed=mask))
            made.digests.append(pack.digest)
            made.items.append(item)

    def _hold(self, made: _Made, packs: Sequence[PackName], turn: Turn, rows: ChatRows) -> None:
        """Hold the packs that were added last, and issue the token that stands for them."""
        fit = True
        for pack, item in zip(packs, made.items[-len(packs) :], strict=True):
            (tensor,) = item["pack"].data
            fit &= self.held.put(pack.digest, item, tensor.nbytes, rows.tenant)
        if fit:
            rows.issued[turn.message] = self._signer.sign(rows.tenant, packs)

    def _lost(self, rows: ChatRows) -> list[str]:
        """The tokens whose packs the engine has no more, as far as it has told by now."""
        rows.missing = [
            token
            for token in rows.tokens
            for packs in (self._signer.read(token, rows.tenant) or (),)
            if not all(self.held.has(pack.digest) for pack in packs)
        ]
        count_references("missing", len(rows.missing))
        return rows.missing

    def _all_lost(self, rows: ChatRows) -> list[str]:
        """All tokens, where a request failed and vLLM did not tell (offline before 0.32)."""
        rows.missing = rows.tokens
        count_references("missing", len(rows.missing))
        return rows.missing


class _Made:
    """A prompt as far as it is made."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.items: list[Any] = []
        self.digests: list[str] = []
        self.ranges: list[PlaceholderRange] = []


def _rows_of(item: Any) -> int:
    """The rows of an item that was packed."""
    if isinstance(item, BankRows):
        return len(item.keys if item.ids is None else item.ids)  # type: ignore[arg-type]
    shape = getattr(item, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) == 2 else 1
    return len(item) if len(item) and hasattr(item[0], "__len__") else 1
