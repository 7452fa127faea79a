"""Cross-entropy of chosen tokens, without the logits of all of them in memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECE = 2048
"""Tokens whose logits are in memory at a time: 0.6 GB in bfloat16 at 151,936 words, and as much
again twice in float32."""

_HEADS = ("logits_scaling", "logit_scale", "final_logit_softcapping")
"""What a text model's config says where logits are more than a product with the head's weights."""


def is_plain_head(text_config: Any) -> bool:
    """Whether a text model's logits are its last hidden states times its head's weights."""
    return not any(getattr(text_config, name, None) for name in _HEADS)


def token_loss(hidden: Tensor, head: Any, targets: Tensor, *, fused: Any = None) -> Tensor:
    """Sum of the cross-entropy of targets, float32.

    Args:
        hidden: `[K, D]`, the last hidden states that predict them; K may be 0.
        head: the linear layer of the logits.
        targets: `[K]` int64.
        fused: Liger's fused function, called as `fused(hidden, weight, targets, bias)`; without it,
            logits are computed in pieces, and again in backward.
    """
    if not _is_sharded(head):
        return _sum_up(hidden, head, head, targets, fused)
    # FSDP makes the head's weights whole around its call, and cuts them up again after the backward
    # of one: of several calls, torch 2.11 finds them cut for all but the last, and every torch
    # sends their gradients once a call. So all happens within one.
    forward = head.forward
    head.forward = lambda states: _sum_up(states, forward, head, targets, fused)
    try:
        return head(hidden)
    finally:
        del head.forward


def _is_sharded(module: Any) -> bool:
    """Whether each process holds its share of a module's weights (torch's FSDP2)."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _sum_up(
    hidden: Tensor, forward: Callable[[Tensor], Tensor], head: Any, targets: Tensor, fused: Any
) -> Tensor:
    if fused is not None and len(targets):
        return fused(hidden, head.weight, targets, head.bias)
    total = hidden.new_zeros((), dtype=torch.float32) + 0.0 * hidden.sum()
    for states, words in zip(hidden.split(PIECE), targets.split(PIECE), strict=True):
        # Also if K is 0: a process whose weights have no gradients keeps the others waiting.
        total = total + checkpoint(_piece, states, forward, words, use_reentrant=False)
    return total


def _piece(hidden: Tensor, forward: Callable[[Tensor], Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(forward(hidden).float(), targets, reduction="sum")
