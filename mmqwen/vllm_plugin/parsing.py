"""What vLLM asks about a model's inputs, and what a prompt brings, joined by modality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo

from mmqwen import transport
from mmqwen.banks import BankCatalog
from mmqwen.banks.catalog import NamedRows
from mmqwen.banks.rows import is_named
from mmqwen.modalities import ModalitySpec
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.vllm_plugin.banks import bank_catalog
from mmqwen.vllm_plugin.modality_table import modality_table

PACK_MODALITY = "mmqwen_pack"
"""vLLM's name for the one item that carries a message's rows; users never see it."""


class ModalityItems(ModalityDataItems[torch.Tensor, torch.Tensor]):
    """The items of one modality, checked but for their values.

    Attributes:
        data: all rows `[R, d]` that came, in the dtype in which they came.
        counts: rows of each item.
        named: of each item the rows of a bank that it names, or None where its rows are in `data`;
            empty where all of them are.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        counts: list[int],
        modality: str,
        named: Sequence[NamedRows | None] = (),
    ) -> None:
        super().__init__(rows, modality)
        self.counts = counts
        self.named = named

    def get_count(self) -> int:
        return len(self.counts)

    def get(self, index: int) -> torch.Tensor:
        if self.named and (named := self.named[index]) is not None:
            return named.read()
        counts = self.counts[:index]
        begin = sum(n for at, n in enumerate(counts) if not (self.named and self.named[at]))
        return self.data[begin : begin + self.counts[index]]

    def get_processor_data(self) -> Mapping[str, object]:
        return {}

    def get_passthrough_data(self) -> Mapping[str, object]:
        return {}


class RowsParser(MultiModalDataParser):
    """`multi_modal_data` -> joined rows, under the user's own modality names."""

    def __init__(self, specs: Mapping[str, ModalitySpec], banks: Callable[[], BankCatalog]) -> None:
        super().__init__()
        self._specs = specs
        self._banks = banks

    def parse_mm_data(self, mm_data: Mapping[str, Any]) -> MultiModalDataItems:
        """See `join` for what is accepted."""
        return MultiModalDataItems(self.join(mm_data, self._banks()))

    def join(self, mm_data: Mapping[str, Any], banks: BankCatalog) -> dict[str, ModalityItems]:
        """See `transport.join_items` for what is accepted; values are looked at when packed.

        Raises:
            EmbeddingError: an unknown modality, or an item that cannot be served, named rows too.
        """
        items: dict[str, ModalityItems] = {}
        for name, value in mm_data.items():
            spec = self._specs.get(name)
            if spec is None:
                transport.refuse_unknown(name, self._specs)
            members = transport.as_items(value, name)
            if any(map(is_named, members)):
                items[name] = _join_named(members, spec, banks)
                continue
            rows, counts = transport.join_items(members, spec)
            items[name] = ModalityItems(rows, counts, name)
        return items


def _join_named(members: Sequence[Any], spec: ModalitySpec, banks: BankCatalog) -> ModalityItems:
    named = [
        banks.read_item(item, spec.name, at) if is_named(item) else None
        for at, item in enumerate(members)
    ]
    own = [at for at, found in enumerate(named) if found is None]
    try:
        rows, sizes = transport.join_items([members[at] for at in own], spec)
    except transport.EmbeddingError as error:
        raise transport.at_index(error, own[error.index or 0]) from None
    left = iter(sizes)
    counts = [next(left) if found is None else len(found.ids) for found in named]
    return ModalityItems(rows, counts, spec.name, named)


class ProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's inputs."""

    @cached_property
    def specs(self) -> dict[str, ModalitySpec]:
        return modality_table(self.ctx.model_config)

    @cached_property
    def banks(self) -> BankCatalog:
        """The banks now; an update puts another catalog in its place."""
        return bank_catalog(self.ctx.model_config, self.specs)

    def get_tokenizer(self) -> Any:
        tokenizer = super().get_tokenizer()
        add_placeholder_tokens(tokenizer, self.specs)
        return tokenizer

    def get_hf_processor(self, **kwargs: object) -> Any:
        """The tokenizer: no other part of an HF processor is needed to serve."""
        return self.get_tokenizer()

    def get_data_parser(self) -> RowsParser:
        return RowsParser(self.specs, lambda: self.banks)

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
