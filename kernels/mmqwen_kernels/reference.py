"""Torch twins: what each op means. The kernels are tested against these in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "none": _identity,
}
"""What may stand between the layers. The kernels know an activation by its place in this table."""

NORMS = ("none", "layer", "rms")
"""What may be done to a row first. The kernels know them by their places."""

NORM_EPS = {"layer": 1e-5, "rms": 1e-6}
"""What is added under the root unless told: torch's LayerNorm's, and Qwen3's and Llama's norms'."""


class Norm(NamedTuple):
    """A norm over each row.

    Attributes:
        kind: "layer" or "rms".
        weight: `[d]`.
        bias: `[d]`, or None.
        eps: what is added to the variance (the mean square) under the root.
    """

    kind: str
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    eps: float = 1e-5


class Projector(NamedTuple):
    """Weights of one projector of one or two layers (or of one shard of its hidden units).

    `Projector(w1, b1, w2, b2)` is linear, ReLU, linear.

    Attributes:
        w1: `[H, d]`, or None where there is one layer, which is `w2`.
        b1: `[H]`, or None.
        w2: `[D, H]`; of one layer `[D, d]`.
        b2: `[D]`, or None, also where another shard adds it.
        activation: one of `ACTIVATIONS`; with one layer it does not matter.
        norm: of the rows, before the first layer.
    """

    w1: torch.Tensor | None
    b1: torch.Tensor | None
    w2: torch.Tensor
    b2: torch.Tensor | None = None
    activation: str = "relu"
    norm: Norm | None = None

    @property
    def width(self) -> int:
        """d, of the rows that it takes."""
        return (self.w2 if self.w1 is None else self.w1).shape[1]

    def tensors(self) -> Iterator[torch.Tensor]:
        """All its weights."""
        weights = (self.w1, self.b1, self.w2, self.b2)
        norm = () if self.norm is None else (self.norm.weight, self.norm.bias)
        return (tensor for tensor in (*weights, *norm) if tensor is not None)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Projector:
        """The same of changed weights."""
        w1, b1, w2, b2 = (w if w is None else change(w) for w in self[:4])
        norm = self.norm
        if norm is not None:
            bias = None if norm.bias is None else change(norm.bias)
            norm = norm._replace(weight=change(norm.weight), bias=bias)
        return Projector(w1, b1, w2, b2, self.activation, norm)  # type: ignore[arg-type]


def check_shapes(m: int, projector: Projector, columns: int | None = None) -> None:
    """See that the parts of projector `m` fit together, and give `columns` where it is given.

    Raises:
        ValueError: they do not, or its activation or norm is none that there is.
    """
    w1, b1, w2, b2, activation, norm = projector
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"projector {m}: activation {activation!r}, expected one of {list(ACTIVATIONS)}"
        )
    shapes = [None if w is None else tuple(w.shape) for w in (w1, b1, w2, b2)]
    if w1 is None:
        fits = w2.ndim == 2 and b1 is None
    else:
        fits = w1.ndim == w2.ndim == 2 and w1.shape[:1] == w2.shape[1:]
        fits = fits and (b1 is None or b1.shape == w1.shape[:1])
    if not fits or (b2 is not None and b2.shape != w2.shape[:1]):
        raise ValueError(
            f"projector {m}: w1 {shapes[0]}, b1 {shapes[1]}, w2 {shapes[2]}, b2 {shapes[3]} do not "
            "fit together: expected [H, d], [H], [D, H] and [D]; of one layer None, None, [D, d] "
            "and [D]"
        )
    if columns is not None and w2.shape[0] != columns:
        raise ValueError(
            f"projector {m} gives {w2.shape[0]} columns, expected the token table's, {columns}"
        )
    if norm is not None:
        if norm.kind not in NORMS[1:]:
            raise ValueError(f"projector {m}: norm {norm.kind!r}, expected one of {NORMS[1:]}")
        for part in (norm.weight, norm.bias):
            if part is not None and part.shape != (projector.width,):
                raise ValueError(
                    f"projector {m}: its norm's weights are {tuple(part.shape)}, expected "
                    f"{(projector.width,)}"
                )


def normalise_torch(rows: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Rows `[..., d]` over their standard deviation or root mean square, scaled, in their dtype.

    Computed in float32 (of float64 in float64), rounded once.
    """
    if norm.kind == "layer":
        return F.layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, norm.eps)
    x = rows if rows.dtype == torch.float64 else rows.float()
    scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return (scaled if norm.bias is None else scaled + norm.bias).to(rows.dtype)


def project_rows_torch(rows: torch.Tensor, projector: Projector) -> torch.Tensor:
    """`W2 act(W1 norm(x) + b1) + b2` for rows `[R, d]` -> `[R, D]`; of one layer `W2 norm(x) + b2`.

    What each step gives is rounded to the rows' dtype, as in a torch model of that dtype.
    """
    if projector.norm is not None:
        rows = normalise_torch(rows, projector.norm)
    if projector.w1 is not None:
        hidden = F.linear(rows, projector.w1, projector.b1)
        rows = ACTIVATIONS[projector.activation](hidden)
    return F.linear(rows, projector.w2, projector.b2)


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
    projected: tuple[torch.Tensor, torch.Tensor] | None = None,
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
        projected: rows `[P, D]` that were projected before, and their slots `[P]`; or None.

    Returns:
        `[T, D]`.
    """
    text = gather_text_torch(input_ids, token_table, vocab_start)
    out = text if out is None else out.copy_(text)
    for projector, x, at in zip(projectors, rows, slots, strict=True):
        if x is not None and at is not None and x.shape[0]:
            out.index_copy_(0, at.long(), project_rows_torch(x, projector))
    if projected is not None:
        out.index_copy_(0, projected[1], projected[0])
    return out
