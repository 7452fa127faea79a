"""The kernels as torch custom ops, so that `torch.compile(fullgraph=True)` goes through them.

For models of your own that call the op inside `torch.compile`. Nothing in mmqwen does: vLLM calls
`embed_input_ids` outside of what it compiles, and training goes by modules. Used while compiling
only: a custom op's dispatch costs more than the rest of a step's host path. Registered when first
needed; what they compute is in `reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmqwen_kernels.launch import LaunchConfig, Mode
from mmqwen_kernels.ops import select_backend
from mmqwen_kernels.plan import RowPlan, RowTables
from mmqwen_kernels.reference import Projector


def _run(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    order: torch.Tensor,
    order_at: int,
    tables: torch.Tensor,
    layout: Sequence[int],
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    with_b2: Sequence[bool],
    vocab_start: int,
    launch: str,
    out: torch.Tensor | None,
) -> torch.Tensor:
    select_backend(token_table.device, token_table.dtype, "triton")
    from mmqwen_kernels.triton_backend import triton_backend

    left = iter(weights)
    projectors = [
        Projector(next(left), next(left), next(left), next(left) if has else None)
        for has in with_b2
    ]
    return triton_backend(token_table.device).fuse(
        input_ids,
        token_table,
        order,
        order_at,
        RowTables(tables, *layout),
        counts,
        projectors,
        vocab_start=vocab_start,
        out=out,
        launch="batch_invariant" if launch == "batch_invariant" else "fastest",
    )


@torch.library.custom_op("mmqwen::fuse_embeddings", mutates_args=())
def fuse_embeddings_op(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    order: torch.Tensor,
    order_at: int,
    tables: torch.Tensor,
    layout: Sequence[int],
    rows: Sequence[torch.Tensor],
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    with_b2: Sequence[bool],
    vocab_start: int,
    launch: str,
) -> torch.Tensor:
    """`fuse_embeddings` of a plan's tensors; `rows` are passed so that a graph keeps them alive.

    `layout` are the numbers of a `RowTables`.
    """
    return _run(
        input_ids,
        token_table,
        order,
        order_at,
        tables,
        layout,
        counts,
        weights,
        with_b2,
        vocab_start,
        launch,
        None,
    )


@fuse_embeddings_op.register_fake
def _(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    order: torch.Tensor,
    order_at: int,
    tables: torch.Tensor,
    layout: Sequence[int],
    rows: Sequence[torch.Tensor],
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    with_b2: Sequence[bool],
    vocab_start: int,
    launch: str,
) -> torch.Tensor:
    return token_table.new_empty(input_ids.shape[0], token_table.shape[1])


@torch.library.custom_op("mmqwen::fuse_embeddings_out", mutates_args=("out",))
def fuse_embeddings_out_op(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    order: torch.Tensor,
    order_at: int,
    tables: torch.Tensor,
    layout: Sequence[int],
    rows: Sequence[torch.Tensor],
    counts: Sequence[int],
    weights: Sequence[torch.Tensor],
    with_b2: Sequence[bool],
    vocab_start: int,
    launch: str,
    out: torch.Tensor,
) -> None:
    """`fuse_embeddings` into `out` `[T, D]`."""
    _run(
        input_ids,
        token_table,
        order,
        order_at,
        tables,
        layout,
        counts,
        weights,
        with_b2,
        vocab_start,
        launch,
        out,
    )


@torch.library.custom_op("mmqwen::project_rows", mutates_args=())
def project_rows_op(
    rows: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> torch.Tensor:
    """`project_rows`."""
    select_backend(rows.device, rows.dtype, "triton")
    from mmqwen_kernels.triton_backend import triton_backend

    return triton_backend(rows.device).project(rows, Projector(w1, b1, w2, b2))


@project_rows_op.register_fake
def _(
    rows: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], w2.shape[0])


def fuse_compiled(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    plan: RowPlan,
    projectors: Sequence[Projector],
    vocab_start: int,
    out: torch.Tensor | None,
    launch: Mode | LaunchConfig,
) -> torch.Tensor:
    """`fuse_embeddings` of a plan through the custom ops.

    Raises:
        ValueError: `launch` is a `LaunchConfig`, which an op's schema cannot carry.
    """
    if not isinstance(launch, str):
        raise ValueError("a LaunchConfig cannot be passed under torch.compile; name a mode")
    tables = plan.tables
    rows = [part for parts in plan.parts for part in parts]
    weights = [w for projector in projectors for w in projector if w is not None]
    with_b2 = [projector.b2 is not None for projector in projectors]
    if out is None:
        return fuse_embeddings_op(
            input_ids,
            token_table,
            plan.buffer,
            plan.order_at,
            tables.buffer,
            list(tables[1:]),
            rows,
            plan.counts,
            weights,
            with_b2,
            vocab_start,
            launch,
        )
    fuse_embeddings_out_op(
        input_ids,
        token_table,
        plan.buffer,
        plan.order_at,
        tables.buffer,
        list(tables[1:]),
        rows,
        plan.counts,
        weights,
        with_b2,
        vocab_start,
        launch,
        out,
    )
    return out
