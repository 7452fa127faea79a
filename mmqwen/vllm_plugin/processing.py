"""From a prompt and its items to one vLLM item per message, in one direct pass."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from vllm.inputs import mm_input
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
)

from mmqwen import transport
from mmqwen.modalities import ModalityError, ModalitySpec, expand_markers
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.vllm_plugin import PACK_MODALITY, compat
from mmqwen.vllm_plugin.modality_table import modality_table
from mmqwen_kernels.packing import pack_groups

CUT_GAP = 256
"""Text tokens between two rows from which a new pack begins.

A pack is the unit of reuse of the prefix cache, so rows far apart are better in packs of their
own; each pack costs vLLM 0.2 to 0.3 ms of host time (docs/serving-cost.md), about what the
prefill of some hundreds of tokens costs.
"""

TURN_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Spellings that end a message: packs never reach across one, so earlier turns stay cached."""


class ModalityItems(ModalityDataItems[torch.Tensor, torch.Tensor]):
    """The checked items of one modality.

    Attributes:
        data: all rows `[R, d]` in the model's dtype.
        counts: rows of each item.
    """

    def __init__(self, rows: torch.Tensor, counts: list[int], modality: str) -> None:
        super().__init__(rows, modality)
        self.counts = counts

    def get_count(self) -> int:
        return len(self.counts)

    def get(self, index: int) -> torch.Tensor:
        begin = sum(self.counts[:index])
        return self.data[begin : begin + self.counts[index]]

    def get_processor_data(self) -> Mapping[str, object]:
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        return {}


class RowsParser(MultiModalDataParser):
    """`multi_modal_data` -> checked rows, under the user's own modality names."""

    def __init__(self, specs: Mapping[str, ModalitySpec], dtype: torch.dtype) -> None:
        super().__init__()
        self._specs = specs
        self._dtype = dtype

    def parse_mm_data(self, mm_data: Mapping[str, Any]) -> MultiModalDataItems:
        """See `transport.concat_items` for what is accepted.

        Raises:
            EmbeddingError: an unknown modality, or an item that cannot be served.
        """
        items = MultiModalDataItems()
        with compat.single_threaded():
            for name, value in mm_data.items():
                spec = self._specs.get(name)
                if spec is None:
                    transport.refuse_unknown(name, self._specs)
                rows, counts = transport.concat_items(
                    transport.as_items(value, name), spec, self._dtype
                )
                items[name] = ModalityItems(rows, counts, name)
        return items


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's inputs."""

    @cached_property
    def specs(self) -> dict[str, ModalitySpec]:
        return modality_table(self.ctx.model_config)

    def get_tokenizer(self) -> Any:
        tokenizer = super().get_tokenizer()
        add_placeholder_tokens(tokenizer, self.specs)
        return tokenizer

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The tokenizer: no other part of an HF processor is needed to serve."""
        return self.get_tokenizer()

    def get_data_parser(self) -> MultiModalDataParser:
        dtype = self.ctx.model_config.dtype
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"model dtype is {dtype!r}, expected a torch dtype")
        return RowsParser(self.specs, dtype)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {**dict.fromkeys(self.specs, None), PACK_MODALITY: None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Refuse more items than `--limit-mm-per-prompt` allows, where the user set a limit.

        vLLM's own default of 999 items is no limit of ours: items cost nothing each here.
        """
        if modality in (self.ctx.get_mm_config().limit_per_prompt or {}):
            super().validate_num_items(modality, num_items)

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {PACK_MODALITY: seq_len}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The largest input, for profiling: rows of the widest modality as long as the sequence."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], *args: Any, **kwargs: Any
    ) -> Mapping[str, Any]:
        spec = max(self.info.specs.values(), key=lambda spec: spec.dim)
        # Half: the expanded prompt needs room to generate.
        remaining = max(1, seq_len // 2)
        counts: list[int] = []
        while remaining > 0:
            counts.append(min(remaining, spec.max_rows))
            remaining -= counts[-1]
        return {spec.name: [torch.zeros(count, spec.dim) for count in counts]}


class PackingProcessor(BaseMultiModalProcessor[ProcessingInfo]):
    """Replaces vLLM's generic processor by one pass over the prompt.

    Host cost does not grow with the number of items beyond the copies of their rows.
    """

    def apply(self, inputs: Any, timing_ctx: Any = None) -> Any:
        """Expand markers, pack rows, hash.

        Raises:
            ModalityError: markers and items do not match, or the prompt is too long.
        """
        token_ids = compat.prompt_token_ids(inputs, self.info)
        items: dict[str, ModalityItems] = dict(inputs.mm_data_items.items())
        expansion = expand_markers(
            token_ids, self._specs, {name: entry.counts for name, entry in items.items()}
        )
        self._check_length(expansion.token_ids, items)
        counts = [items[name].counts[index] for name, index in expansion.items]
        order = [self._index[name] for name, _ in expansion.items]
        packs: list[torch.Tensor] = []
        hashes: list[str] = []
        ranges: list[PlaceholderRange] = []
        token_array = np.asarray(expansion.token_ids, dtype=np.int64)
        rows_left = {self._index[name]: entry.data for name, entry in items.items()}
        for first, last in self._cut(token_array, expansion.starts, counts):
            pack = pack_groups(
                order[first:last],
                counts[first:last],
                _take(rows_left, order[first:last], counts[first:last]),
            )
            packs.append(pack)
            hashes.append(content_hash(pack, counts[first:last]))
            offset = expansion.starts[first]
            length = expansion.starts[last - 1] + counts[last - 1] - offset
            mask = self._placeholder_mask[token_array[offset : offset + length]]
            ranges.append(
                PlaceholderRange(
                    offset=offset,
                    length=length,
                    is_embed=None if mask.all() else torch.from_numpy(mask),
                )
            )
        return mm_input(
            prompt_token_ids=expansion.token_ids,
            mm_kwargs=_kwargs_items(packs),
            mm_hashes={PACK_MODALITY: hashes},
            mm_placeholders={PACK_MODALITY: ranges},
        )

    @cached_property
    def _specs(self) -> dict[str, ModalitySpec]:
        return self.info.specs

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: at for at, name in enumerate(self._specs)}

    @cached_property
    def _placeholder_mask(self) -> np.ndarray:
        """bool `[V]`: True at placeholder ids."""
        ids = [spec.token_id for spec in self._specs.values() if spec.token_id is not None]
        size = max(self.info.ctx.model_config.get_vocab_size(), max(ids) + 1)
        mask = np.zeros(size, dtype=np.bool_)
        mask[ids] = True
        return mask

    @cached_property
    def _turn_ids(self) -> np.ndarray:
        vocab = self.info.get_tokenizer().get_vocab()
        return np.array([vocab[token] for token in TURN_TOKENS if token in vocab], dtype=np.int64)

    def _check_length(self, token_ids: Sequence[int], items: Mapping[str, ModalityItems]) -> None:
        limit = self.info.ctx.model_config.max_model_len
        if len(token_ids) > limit:
            rows = {name: sum(entry.counts) for name, entry in items.items()}
            raise ModalityError(
                f"the prompt is {len(token_ids)} tokens long, {rows} of them embedding rows by "
                f"modality; expected at most {limit} (max_model_len)"
            )

    def _cut(
        self, token_ids: np.ndarray, starts: Sequence[int], counts: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Ranges of items that share a pack: cut at ends of turns and at long stretches of text."""
        if not starts:
            return []
        begin = np.asarray(starts, dtype=np.int64)
        end = begin + np.asarray(counts, dtype=np.int64)
        cut = begin[1:] - end[:-1] >= CUT_GAP
        if len(self._turn_ids):
            turns = np.flatnonzero(np.isin(token_ids, self._turn_ids))
            cut |= np.searchsorted(turns, begin[1:]) > np.searchsorted(turns, end[:-1])
        edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(starts)]
        return list(pairwise(edges))

    def _get_mm_fields_config(self, *args: Any, **kwargs: Any) -> Any:
        return _FIELDS

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Any:
        return ()


# keep_on_cpu: packs stay in host memory; see docs/adr/0002-packs-stay-on-the-host.md.
_FIELDS = {"pack": MultiModalFieldConfig.batched(PACK_MODALITY, keep_on_cpu=True)}


def _kwargs_items(packs: Sequence[torch.Tensor]) -> MultiModalKwargsItems:
    # Each pack in a list of its own: vLLM stacks (copies) bare tensors of equal length.
    return MultiModalKwargsItems.from_hf_inputs({"pack": [[pack] for pack in packs]}, _FIELDS)


def _take(
    left: dict[int, torch.Tensor], order: Sequence[int], counts: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Split off, from the front of what is `left` of each modality, the rows of these items."""
    needed: dict[int, int] = {}
    for modality, count in zip(order, counts, strict=True):
        needed[modality] = needed.get(modality, 0) + count
    taken: dict[int, torch.Tensor] = {}
    for modality, count in needed.items():
        rows = left[modality]
        if count == rows.shape[0]:
            taken[modality] = rows
        else:
            taken[modality], left[modality] = rows[:count], rows[count:]
    return taken


def content_hash(pack: torch.Tensor, counts: Sequence[int]) -> str:
    """SHA-256 of a pack and its item boundaries, framed.

    The pack's own header and directory name each row's modality, the widths, the dtype and the
    order; the boundaries of the items are added with their number. Two different inputs never hash
    the same bytes. The client has no say in it.
    """
    boundaries = np.asarray([len(counts), *counts], dtype="<i8")
    digest = hashlib.sha256(b"mmqwen-pack-1\0")
    digest.update(boundaries.tobytes())
    digest.update(pack.numpy().data)
    return digest.hexdigest()
