"""The fusion op, its halves, and the rule that picks a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmqwen_kernels.plan import RowPlan, RowSource, plan_rows
from mmqwen_kernels.reference import (
    Projector,
    fuse_embeddings_torch,
    project_rows_torch,
    scatter_rows_torch,
)

BACKENDS = ("auto", "torch")


class BackendChoice(NamedTuple):
    """A backend's name and the reason for it."""

    name: str
    reason: str


def select_backend(
    device: torch.device | str, dtype: torch.dtype, backend: str = "auto"
) -> BackendChoice:
    """Say which backend runs on `device` for rows of `dtype`, and why.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`, or cannot run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}, expected one of {BACKENDS}")
    if backend == "torch":
        return BackendChoice("torch", "asked for")
    return BackendChoice("torch", f"no kernels for {torch.device(device).type} devices")


def fuse_embeddings(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    rows: RowPlan | Sequence[RowSource],
    projectors: Sequence[Projector],
    *,
    slots: torch.Tensor | np.ndarray | Sequence[int] | None = None,
    vocab_start: int = 0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Gather text rows, project raw rows and write both once into the token-embedding buffer.

    `out[t] = token_table[input_ids[t] - vocab_start]` for text slots (zero outside the table) and
    `out[t] = W2_m relu(W1_m x + b1_m) + b2_m` for slots of modality m. Accumulation is fp32;
    hidden activations are rounded to the table's dtype.

    Args:
        input_ids: `[T]` int32 or int64 on the table's device.
        token_table: `[V, D]`, fp32, fp16 or bf16; a shard of it begins at id `vocab_start`.
        rows: a `RowPlan`, or the sources that `plan_rows` takes.
        projectors: one a modality, in the order of the modality indices; under tensor
            parallelism a shard of the hidden units, `b2` None on all ranks but one.
        slots: where `rows` are sources: a CPU bool mask `[T]` or positions.
        vocab_start: first id of a vocabulary shard.
        out: `[T, D]` in the table's dtype, to write into.
        backend: one of `BACKENDS`; `select_backend` says what "auto" means.

    Returns:
        `[T, D]`: `out` where given.

    Raises:
        ValueError: rows and slots do not match, a width is wrong, or the backend cannot run.
    """
    select_backend(token_table.device, token_table.dtype, backend)
    if not isinstance(rows, RowPlan):
        if slots is None:
            raise ValueError("slots are needed where rows are not a RowPlan")
        rows = plan_rows(
            rows,
            slots,
            input_ids.shape[0],
            [projector.w1.shape[1] for projector in projectors],
            dtype=token_table.dtype,
            device=token_table.device,
        )
    return fuse_embeddings_torch(
        input_ids, token_table, rows.rows, rows.slots, projectors, vocab_start=vocab_start, out=out
    )


def project_rows(
    rows: torch.Tensor, projector: Projector, *, backend: str = "auto"
) -> torch.Tensor:
    """`W2 relu(W1 x + b1) + b2`: rows `[R, d]` -> `[R, D]`, in the rows' dtype."""
    select_backend(rows.device, rows.dtype, backend)
    return project_rows_torch(rows, projector)


def scatter_rows(
    out: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """`out[slots[r]] = rows[r]` in place: out `[T, D]`, slots `[R]` distinct, rows `[R, D]`."""
    select_backend(rows.device, rows.dtype, backend)
    return scatter_rows_torch(out, slots, rows)
