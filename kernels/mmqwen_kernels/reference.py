"""Torch twins: what each op means. The kernels are tested against these in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Projector(NamedTuple):
    """Weights of one two-layer ReLU projector (or of one shard of its hidden units).

    Attributes:
        w1: `[H, d]`.
        b1: `[H]`.
        w2: `[D, H]`.
        b2: `[D]`, or None where another shard adds it.
    """

    w1: torch.Tensor
    b1: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor | None


def check_shapes(m: int, projector: Projector, columns: int | None = None) -> None:
    """See that the weights of projector `m` fit together, and give `columns` where it is given.

    Raises:
        ValueError: they do not.
    """
    w1, b1, w2, b2 = projector
    shapes = [None if w is None else tuple(w.shape) for w in projector]
    fits = w1.ndim == w2.ndim == 2 and w1.shape[:1] == w2.shape[1:]
    fits = fits and b1 is not None and b1.shape == w1.shape[:1]
    if not fits or (b2 is not None and b2.shape != w2.shape[:1]):
        raise ValueError(
            f"projector {m}: w1 {shapes[0]}, b1 {shapes[1]}, w2 {shapes[2]}, b2 {shapes[3]} do not "
            "fit together: expected [H, d], [H], [D, H] and [D]"
        )
    if columns is not None and w2.shape[0] != columns:
        raise ValueError(
            f"projector {m} gives {w2.shape[0]} columns, expected the token table's, {columns}"
        )


def project_rows_torch(rows: torch.Tensor, projector: Projector) -> torch.Tensor:
    """`W2 relu(W1 x + b1) + b2` for rows `[R, d]` -> `[R, D]`.

    The hidden activations are rounded to the rows' dtype, as in a torch model of that dtype.
    """
    hidden = F.relu(F.linear(rows, projector.w1, projector.b1))
    return F.linear(hidden, projector.w2, projector.b2)


def gather_text_torch(
    input_ids: torch.Tensor, token_table: torch.Tensor, vocab_start: int = 0
) -> torch.Tensor:
    """`token_table[input_ids - vocab_start]`, zero where the id lies outside the table's shard."""
    local = input_ids - vocab_start if vocab_start else input_ids
    clamped = local.clamp(0, token_table.shape[0] - 1)
    out = F.embedding(clamped, token_table)
    return out.masked_fill_((clamped != local).unsqueeze(-1), 0)


def fuse_embeddings_torch(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    rows: Sequence[torch.Tensor | None],
    slots: Sequence[torch.Tensor | None],
    projectors: Sequence[Projector],
    *,
    vocab_start: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Text rows gathered, raw rows projected, all in one buffer.

    Args:
        input_ids: `[T]` integers; the ids at slots of rows do not matter.
        token_table: `[V, D]`, the table or the shard that begins at id `vocab_start`.
        rows: per modality `[R_m, d_m]`, or None.
        slots: per modality `[R_m]` positions in `[0, T)`, distinct over all modalities, or None.
        projectors: per modality.
        vocab_start: first id of the shard; ids outside it give a zero row.
        out: `[T, D]` to write into.

    Returns:
        `[T, D]`.
    """
    text = gather_text_torch(input_ids, token_table, vocab_start)
    out = text if out is None else out.copy_(text)
    for projector, x, at in zip(projectors, rows, slots, strict=True):
        if x is not None and at is not None and x.shape[0]:
            out.index_copy_(0, at.long(), project_rows_torch(x, projector))
    return out
