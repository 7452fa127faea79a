"""From a prompt and its items to one vLLM item per message, in one direct pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from os import urandom
from typing import Any

import numpy as np
import torch
from vllm.inputs import mm_input
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor

from mmqwen import transport
from mmqwen.banks import BankCatalog
from mmqwen.banks.catalog import NamedRows
from mmqwen.banks.rows import may_name
from mmqwen.modalities import Expansion, ModalityError, ModalitySpec, expand_markers
from mmqwen.packs import DTYPE_CODES, allocate_pack
from mmqwen.vllm_plugin import compat
from mmqwen.vllm_plugin.named import NamedItems, in_use, write_named
from mmqwen.vllm_plugin.pack_items import FIELDS, content_hash, kwargs_items
from mmqwen.vllm_plugin.parsing import PACK_MODALITY, ModalityItems, ProcessingInfo, RowsParser
from mmqwen_kernels import native

CUT_GAP = 256
"""Text tokens between two rows from which a new pack begins.

A pack is the unit of reuse of the prefix cache, so rows far apart are better in packs of their
own; each pack costs vLLM 0.2 to 0.3 ms of host time (docs/serving-cost.md), about what the
prefill of some hundreds of tokens costs.
"""

TURN_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Spellings that end a message: packs never reach across one, so earlier turns stay cached."""

Span = tuple[torch.Tensor, list[int], int, int, torch.Tensor | bytearray | None]
"""A pack, the rows of each of its items, where in the prompt it begins, how far it reaches, and
which of those tokens are rows (None: all), as bools."""

Accepted = tuple[str, int, int, int]
"""Of one modality of a prompt: its name, items, rows, and bytes of the rows as they came."""


class PackingProcessor(BaseMultiModalProcessor[ProcessingInfo]):
    """Replaces vLLM's generic processor by one pass over the prompt.

    Host cost hardly grows with the number of items beyond the copies of their rows.

    Attributes:
        hash_content: whether packs are named by what they hold. Off where nothing is reused from
            one request to the next (`MultimodalQwen3Renderer` settles it): then by a random number,
            as vLLM does it for its own models.
    """

    hash_content = True

    def apply(self, inputs: Any, timing_ctx: Any = None) -> Any:
        """Expand markers, pack rows, hash: vLLM's own way in.

        Raises:
            EmbeddingError, ModalityError: as `pack`.
        """
        with compat.single_threaded():
            token_ids = compat.prompt_token_ids(inputs, self.info)
            return self.pack(token_ids, dict(inputs.mm_data_items.items()))

    def process(
        self, token_ids: list[int], mm_data: Mapping[str, Any], banks: BankCatalog | None = None
    ) -> tuple[Any, list[Accepted]]:
        """vLLM's input of a prompt with one marker, or none at all, per item; and what came.

        Args:
            token_ids: the prompt's.
            mm_data: its items.
            banks: as the whole request sees them; left out, as they are now.

        Raises:
            EmbeddingError, ModalityError: as `join` and `pack`.
            ValueError: more items than `--limit-mm-per-prompt` allows.
        """
        banks = self.info.banks if banks is None else banks
        if native.helper is not None:
            made = self._process_natively(token_ids, mm_data, banks)
            if made is not None:
                return made
        with compat.single_threaded():
            items = self.join(mm_data, banks)
            processed = self.pack(token_ids, items)
        return processed, [
            (name, len(entry.counts), len(entry.data), entry.data.nbytes)
            for name, entry in items.items()
        ]

    def _process_natively(
        self, token_ids: list[int], mm_data: Mapping[str, Any], banks: BankCatalog
    ) -> tuple[Any, list[Accepted]] | None:
        """`process` by the native helper; None: look at it in Python, which may refuse it."""
        rows = self._native_table
        if self._limited or not mm_data.keys() <= rows.keys():
            return None
        table: list[tuple[Any, ...]] = []
        named: list[NamedRows | None] = []
        for name, value in mm_data.items():
            if banks.banks and may_name(value):
                found = banks.read_items(value, name)
                if found is None:
                    return None
                members, rows_of = found
                table.append((*rows[name], members, [one and one.native for one in rows_of]))
                named += rows_of
            else:
                table.append((*rows[name], value))
        if len(rows) > len(table):
            table += [(*row, ()) for name, row in rows.items() if name not in mm_data]
        made = native.helper.pack_message(
            token_ids, table, self._turn_ids, CUT_GAP, self._max_tokens, DTYPE_CODES[self._dtype]
        )
        if made is None:
            return None
        expanded, spans, came = made
        accepted = [(name, *found) for name, found in zip(mm_data, came, strict=False)]
        return self._assemble(expanded, spans, named), accepted

    def join(self, mm_data: Mapping[str, Any], banks: BankCatalog) -> dict[str, ModalityItems]:
        """What a prompt brings, joined by modality; see `RowsParser.join`.

        Raises:
            EmbeddingError: an unknown modality, or an item that cannot be served.
            ValueError: more items than `--limit-mm-per-prompt` allows.
        """
        items = self._parser.join(mm_data, banks)
        if self._limited:
            for name, entry in items.items():
                self.info.validate_num_items(name, len(entry.counts))
        return items

    def pack(self, token_ids: list[int], items: Mapping[str, ModalityItems]) -> Any:
        """vLLM's input of a prompt with one marker, or none at all, per item.

        Raises:
            EmbeddingError: a row that is not finite in the model's dtype.
            ModalityError: markers and items do not match, or the prompt is too long.
        """
        expansion = expand_markers(
            token_ids, self._specs, {name: entry.counts for name, entry in items.items()}
        )
        self._check_length(expansion.token_ids, items)
        named = [one for entry in items.values() for one in entry.named]
        return self._assemble(expansion.token_ids, self._spans(expansion, items), named)

    def _spans(self, expansion: Expansion, items: Mapping[str, ModalityItems]) -> Iterator[Span]:
        """What is packed together; the native helper's `pack_message` does the same."""
        marked = expansion.unmarked < len(expansion.names)
        tokens = np.asarray(expansion.token_ids, dtype=np.int64) if marked else None
        left = {name: entry.data for name, entry in items.items() if entry.counts}
        named = NamedItems(items, self._index) if any(e.named for e in items.values()) else None
        for first, last in self._cut(expansion, tokens):
            counts = expansion.counts[first:last]
            if named is not None:
                pack = self._fill_named(expansion.names[first:last], counts, named, left, items)
            else:
                if marked:
                    order, runs = expansion.names[first:last], counts
                    needed = _total_by_name(order, runs)
                else:
                    needed = {name: len(rows) for name, rows in left.items()}
                    order, runs = list(needed), list(needed.values())
                pack = self._fill(order, runs, needed, left, items)
            offset = expansion.starts[first]
            length = expansion.starts[last - 1] + counts[-1] - offset
            mask = None
            if length != sum(counts):
                assert tokens is not None
                inside = tokens[offset : offset + length]
                mask = torch.from_numpy(self._is_placeholder.take(inside, mode="clip"))
            yield pack, counts, offset, length, mask

    def _assemble(
        self, token_ids: list[int], spans: Iterable[Span], named: Iterable[NamedRows | None]
    ) -> Any:
        packs: list[torch.Tensor] = []
        hashes: list[str] = []
        ranges: list[PlaceholderRange] = []
        for pack, counts, offset, length, mask in spans:
            if isinstance(mask, bytearray):
                mask = torch.frombuffer(mask, dtype=torch.bool)
            packs.append(pack)
            hashes.append(self._name(pack, counts))
            ranges.append(PlaceholderRange(offset=offset, length=length, is_embed=mask))
        return mm_input(
            prompt_token_ids=token_ids,
            mm_kwargs=kwargs_items(packs, in_use(named)),
            mm_hashes={PACK_MODALITY: hashes},
            mm_placeholders={PACK_MODALITY: ranges},
        )

    def _fill(
        self,
        order: Sequence[str],
        runs: Sequence[int],
        needed: Mapping[str, int],
        left: dict[str, torch.Tensor],
        items: Mapping[str, ModalityItems],
    ) -> torch.Tensor:
        """A pack of the first rows of what is `left`, which loses them."""
        pack, views = allocate_pack(
            [self._index[name] for name in order],
            runs,
            {self._index[name]: (count, left[name].shape[1]) for name, count in needed.items()},
            self._dtype,
        )
        for (name, count), view in zip(needed.items(), views.values(), strict=True):
            self._convert(items[name], name, count, left, view)
        return pack

    def _fill_named(
        self,
        names: Sequence[str],
        counts: Sequence[int],
        named: NamedItems,
        left: dict[str, torch.Tensor],
        items: Mapping[str, ModalityItems],
    ) -> torch.Tensor:
        """A pack some of whose rows lie in banks; else as `_fill`."""
        groups = named.take(names)
        shapes: dict[int, tuple[int, int]] = {}
        for (group, _), name, count in zip(groups, names, counts, strict=True):
            total = shapes.get(group, (0, 0))[0]
            shapes[group] = (total + count, self._specs[name].dim)
        order = [group for group, _ in groups]
        pack, views = allocate_pack(order, counts, shapes, self._dtype)
        by_index = list(self._specs)
        for group, view in views.items():
            name = by_index[group]
            self._convert(items[name], name, len(view), left, view)
        write_named(pack, groups)
        return pack

    def _convert(
        self,
        entry: ModalityItems,
        name: str,
        count: int,
        left: dict[str, torch.Tensor],
        view: torch.Tensor,
    ) -> None:
        """Convert the first `count` rows of a modality that are `left` into their place."""
        rows = left[name]
        if count < len(rows):
            rows, left[name] = rows[:count], rows[count:]
        if transport.convert_rows(rows, view):
            return
        own = [at for at in range(len(entry.counts)) if not (entry.named and entry.named[at])]
        try:
            transport.refuse_non_finite(
                entry.data, [entry.counts[at] for at in own], self._specs[name], self._dtype
            )
        except transport.EmbeddingError as error:
            raise transport.at_index(error, own[error.index or 0]) from None

    def _name(self, pack: torch.Tensor, counts: Sequence[int]) -> str:
        if self.hash_content:
            return content_hash(pack, counts, self._hash_algorithm)
        return urandom(16).hex()

    @cached_property
    def _hash_algorithm(self) -> str:
        return compat.hash_algorithm(self.info.ctx.get_mm_config())

    @cached_property
    def _specs(self) -> dict[str, ModalitySpec]:
        return self.info.specs

    @cached_property
    def _parser(self) -> RowsParser:
        return RowsParser(self._specs, lambda: self.info.banks)

    @cached_property
    def _limited(self) -> bool:
        return bool(self.info.ctx.get_mm_config().limit_per_prompt)

    @cached_property
    def _dtype(self) -> torch.dtype:
        dtype = self.info.ctx.model_config.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"model dtype is {dtype!r}, expected a torch dtype")
        return dtype

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: at for at, name in enumerate(self._specs)}

    def _table_of(self, ids: Sequence[int]) -> np.ndarray:
        """bool `[V + 1]`: True at these ids; ids that lie outside meet False."""
        size = max(self.info.ctx.model_config.get_vocab_size(), max(ids, default=0) + 1)
        table = np.zeros(size + 1, dtype=np.bool_)
        table[list(ids)] = True
        return table

    @cached_property
    def _is_placeholder(self) -> np.ndarray:
        return self._table_of([s.token_id for s in self._specs.values() if s.token_id is not None])

    @cached_property
    def _turn_ids(self) -> tuple[int, ...]:
        vocab = self.info.get_tokenizer().get_vocab()
        return tuple(vocab[token] for token in TURN_TOKENS if token in vocab)

    @cached_property
    def _ends_turn(self) -> np.ndarray:
        return self._table_of(self._turn_ids)

    @cached_property
    def _native_table(self) -> dict[str, tuple[int, int | None, int, int]]:
        """What the native helper is told of each modality."""
        return {
            name: (at, spec.token_id, spec.dim, spec.max_rows)
            for at, (name, spec) in enumerate(self._specs.items())
        }

    @cached_property
    def _max_tokens(self) -> int:
        return int(self.info.ctx.model_config.max_model_len)

    def _check_length(self, token_ids: Sequence[int], items: Mapping[str, ModalityItems]) -> None:
        limit = self._max_tokens
        if len(token_ids) > limit:
            rows = {name: sum(entry.counts) for name, entry in items.items()}
            raise ModalityError(
                f"the prompt is {len(token_ids)} tokens long, {rows} of them embedding rows by "
                f"modality; expected at most {limit} (max_model_len)"
            )

    def _cut(self, expansion: Expansion, tokens: np.ndarray | None) -> list[tuple[int, int]]:
        """Ranges of items that share a pack: cut at ends of turns and at long stretches of text."""
        if not expansion.names:
            return []
        if tokens is None or len(expansion.names) == 1:
            return [(0, len(expansion.names))]
        begin = np.asarray(expansion.starts, dtype=np.int64)
        end = begin + np.asarray(expansion.counts, dtype=np.int64)
        cut = begin[1:] - end[:-1] >= CUT_GAP
        first, last = int(begin[0]), int(end[-1])
        turns = np.flatnonzero(self._ends_turn.take(tokens[first:last], mode="clip"))
        if len(turns):
            turns += first
            cut |= np.searchsorted(turns, begin[1:]) > np.searchsorted(turns, end[:-1])
        edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(expansion.names)]
        return list(pairwise(edges))

    def _get_mm_fields_config(self, *args: Any, **kwargs: Any) -> Any:
        return FIELDS

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Any:
        return ()


def _total_by_name(names: Sequence[str], counts: Sequence[int]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for name, count in zip(names, counts, strict=True):
        totals[name] = totals.get(name, 0) + count
    return totals
