"""Packs as vLLM holds them: the one field of an item, and the content hash that names it."""

from __future__ import annotations

import hashlib
from collections import UserDict
from collections.abc import Callable, Sequence
from functools import cache, partial
from struct import pack as to_bytes
from typing import Any

import numpy as np
import torch
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)

from mmqwen.vllm_plugin.named import InUse, hold
from mmqwen.vllm_plugin.parsing import PACK_MODALITY

# keep_on_cpu: packs stay in host memory; see docs/adr/0002-packs-stay-on-the-host.md.
FIELDS = {"pack": MultiModalFieldConfig.batched(PACK_MODALITY, keep_on_cpu=True)}
_FIELD = FIELDS["pack"].field

PLAIN_DICTS = (
    MultiModalKwargsItem.__init__ is UserDict.__init__
    and MultiModalKwargsItems.__init__ is UserDict.__init__
)
"""Whether vLLM's dicts are made by `UserDict`, which looks at what it is given for 1 us each."""


def _dict_of(kind: Any, data: dict[str, Any]) -> Any:
    if not PLAIN_DICTS:
        return kind(data)
    made = kind.__new__(kind)
    made.data = data
    return made


def kwargs_items(packs: Sequence[torch.Tensor], banks: InUse | None) -> MultiModalKwargsItems:
    """Packs as vLLM's items, which keep the banks that are named in them."""
    # Each pack in a list of its own: vLLM stacks (copies) bare tensors of equal length.
    members = [
        _dict_of(MultiModalKwargsItem, {"pack": MultiModalFieldElem([pack], _FIELD)})
        for pack in packs
    ]
    if banks is not None:
        for member in members:
            hold(member, banks)
    return _dict_of(MultiModalKwargsItems, {PACK_MODALITY: members} if members else {})


def content_hash(pack: torch.Tensor, counts: Sequence[int], algorithm: str = "blake3") -> str:
    """Hash of a pack and its item boundaries, framed.

    The pack's own header and directory name each row's modality, the widths, the dtype and the
    order; behind it come the boundaries of the items, their number, and a tag, so that what was
    hashed can be read from its end: two different inputs never hash the same bytes. The pack
    stands first, where BLAKE3 takes it in whole chunks. The client has no say in it.

    Args:
        pack: 1-D int64.
        counts: rows of each item.
        algorithm: "blake3", or a name that hashlib knows.
    """
    digest = _hash_of(algorithm)(pack.numpy().view(np.uint8).data)
    digest.update(to_bytes(f"<{len(counts) + 1}q", *counts, len(counts)) + b"mmqwen-pack-3\0")
    return str(digest.hexdigest())


@cache
def _hash_of(algorithm: str) -> Callable[[Any], Any]:
    """What makes a hash of a first piece."""
    if algorithm == "blake3":
        from blake3 import blake3

        return blake3
    return partial(hashlib.new, algorithm)
