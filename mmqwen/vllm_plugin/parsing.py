"""What vLLM asks about a model's inputs, and what a prompt brings, joined by modality."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from vllm.multimodal.parse import ModalityDataItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseProcessingInfo

from mmqwen import transport
from mmqwen.modalities import ModalitySpec
from mmqwen.tokens import add_placeholder_tokens
from mmqwen.vllm_plugin.modality_table import modality_table

PACK_MODALITY = "mmqwen_pack"
"""vLLM's name for the one item that carries a message's rows; users never see it."""


class ModalityItems(ModalityDataItems[torch.Tensor, torch.Tensor]):
    """The items of one modality, checked but for their values.

    Attributes:
        data: all rows `[R, d]` in the dtype in which they came.
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
    """`multi_modal_data` -> joined rows, under the user's own modality names."""

    def __init__(self, specs: Mapping[str, ModalitySpec]) -> None:
        super().__init__()
        self._specs = specs

    def parse_mm_data(self, mm_data: Mapping[str, Any]) -> MultiModalDataItems:
        """See `join` for what is accepted."""
        return MultiModalDataItems(self.join(mm_data))

    def join(self, mm_data: Mapping[str, Any]) -> dict[str, ModalityItems]:
        """See `transport.join_items` for what is accepted; values are looked at when packed.

        Raises:
            EmbeddingError: an unknown modality, or an item that cannot be served.
        """
        items: dict[str, ModalityItems] = {}
        for name, value in mm_data.items():
            spec = self._specs.get(name)
            if spec is None:
                transport.refuse_unknown(name, self._specs)
            rows, counts = transport.join_items(transport.as_items(value, name), spec)
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
        return RowsParser(self.specs)

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
