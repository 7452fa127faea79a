"""Forward and backward of the kernels as torch custom ops, for `torch.compile(fullgraph=True)`.

Used while compiling only, as `custom_ops.py`; registered when first needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmqwen_kernels.autograd import (
    _PER_MODALITY,
    _forward_triton,
    _modalities,
    projector_gradients,
)


@torch.library.custom_op("mmqwen::fused_embed", mutates_args=())
def forward_op(
    input_ids: torch.Tensor, token_table: torch.Tensor, flat: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """`fused_embed` by the kernels; `flat` holds rows, slots, W1, b1, W2, b2 of each modality."""
    return _forward_triton(input_ids, token_table, flat)[0]


@forward_op.register_fake
def _(
    input_ids: torch.Tensor, token_table: torch.Tensor, flat: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    return token_table.new_empty(input_ids.shape[0], token_table.shape[1])


@torch.library.custom_op("mmqwen::fused_embed_backward", mutates_args=())
def backward_op(
    grad: torch.Tensor,
    flat: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    compute: torch.dtype,
    engine: str,
) -> list[torch.Tensor]:
    """The gradients that `needs` asks for, in its order."""
    given = projector_gradients(grad, _modalities(flat), _modalities(needs), compute, engine=engine)
    # An op's results may not share memory: the kernels' gradients are parts of one buffer.
    return [
        g.clone(memory_format=torch.contiguous_format) if g._is_view() else g
        for g in given
        if g is not None
    ]


@backward_op.register_fake
def _(
    grad: torch.Tensor,
    flat: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    compute: torch.dtype,
    engine: str,
) -> list[torch.Tensor]:
    if len(flat) % _PER_MODALITY:
        raise ValueError(f"{len(flat)} tensors, expected {_PER_MODALITY} per modality")
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor, need in zip(flat, needs, strict=True)
        if need and tensor is not None
    ]
