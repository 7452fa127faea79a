"""Packs as vLLM's engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.inputs import mm_input
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

PACK_MODALITY = "mmqwen_pack"
"""vLLM's name for the one item that carries a message's rows; users never see it."""

# keep_on_cpu: packs stay in host memory; see docs/adr/0002-packs-stay-on-the-host.md.
FIELDS = {"pack": MultiModalFieldConfig.batched(PACK_MODALITY, keep_on_cpu=True)}
_FIELD = FIELDS["pack"].field


def packed_input(
    token_ids: list[int],
    packs: Sequence[torch.Tensor],
    hashes: list[str],
    ranges: list[PlaceholderRange],
) -> Any:
    """A prompt's token ids and its packs, each with its name and its place among the tokens."""
    # Each pack in a list of its own: vLLM stacks (copies) bare tensors of equal length.
    members = [
        MultiModalKwargsItem({"pack": MultiModalFieldElem([pack], _FIELD)}) for pack in packs
    ]
    return mm_input(
        prompt_token_ids=token_ids,
        mm_kwargs=MultiModalKwargsItems({PACK_MODALITY: members} if members else {}),
        mm_hashes={PACK_MODALITY: hashes},
        mm_placeholders={PACK_MODALITY: ranges},
    )
