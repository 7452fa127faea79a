"""The fusion op and its first half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmqwen_kernels.plan import HostRows, RowPlan, RowSource, plan_rows
from mmqwen_kernels.reference import (
    Projector,
    check_shapes,
    fuse_embeddings_torch,
    project_rows_torch,
)
from mmqwen_kernels.select import select_backend
from mmqwen_kernels.tiles import LaunchConfig

if TYPE_CHECKING:
    from mmqwen_kernels.triton_backend import TritonBackend


def _backend_of(device: torch.device) -> TritonBackend:
    from mmqwen_kernels.triton_backend import triton_backend

    return triton_backend(device)


def _pick(backend: str, first: torch.Tensor, weights: Iterable[torch.Tensor]) -> str:
    """The backend's name for a call on these tensors; see `select_backend`."""
    gradients = torch.is_grad_enabled() and (
        first.requires_grad or any(weight.requires_grad for weight in weights)
    )
    return select_backend(first.device, first.dtype, backend, gradients=gradients).name


def _check_kind(projectors: Iterable[Projector]) -> None:
    for m, projector in enumerate(projectors):
        if not isinstance(projector, Projector):
            raise ValueError(
                f"projector {m} is a {type(projector).__name__}, expected a list of Projector, one "
                "a modality; of two nn.Linear: Projector(up.weight, up.bias, down.weight, "
                "down.bias)"
            )


@torch.compiler.disable
def _outside_the_graph(op: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """The op as it runs without torch.compile: a plan is numpy's work, a launch an address's."""
    return op(*args, **kwargs)


def fuse_embeddings(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    rows: RowPlan | HostRows | Sequence[RowSource],
    projectors: Sequence[Projector],
    *,
    slots: torch.Tensor | np.ndarray | Sequence[int] | None = None,
    vocab_start: int = 0,
    out: torch.Tensor | None = None,
    backend: str = "auto",
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """Gather text rows, project raw rows and write both once into the token-embedding buffer.

    `out[t] = token_table[input_ids[t] - vocab_start]` for text slots (zero outside the table) and
    `out[t] = W2_m act_m(W1_m norm_m(x) + b1_m) + b2_m` for slots of modality m, as its `Projector`
    says. Accumulation is fp32; hidden activations are rounded to the table's dtype. Under
    `torch.compile` the call is a graph break.

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
        launch: for the kernels, in place of what `choose_config` says.

    Returns:
        `[T, D]`: `out` where given.

    Raises:
        ValueError: rows and slots do not match, ids are not `[T]` integers, slots are no integers,
            a projector is a module, a width is wrong, weights do not fit together, or the backend
            cannot run; the kernels also refuse weights without elements.
    """
    if torch.compiler.is_compiling():
        return _outside_the_graph(
            fuse_embeddings,
            input_ids,
            token_table,
            rows,
            projectors,
            slots=slots,
            vocab_start=vocab_start,
            out=out,
            backend=backend,
            launch=launch,
        )
    if input_ids.ndim != 1:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}, expected [T]: flatten() them, count "
            "slots along that, and give the result its shape back by view()"
        )
    _check_kind(projectors)
    chosen = _pick(backend, token_table, (w for p in projectors for w in p.tensors()))
    if not isinstance(rows, RowPlan):
        if slots is None:
            raise ValueError("slots are needed where rows are not a RowPlan")
        rows = plan_rows(
            rows,
            slots,
            input_ids.shape[0],
            [projector.width for projector in projectors],
            dtype=token_table.dtype,
            device=token_table.device,
        )
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids are {input_ids.dtype}, expected int32 or int64")
    if rows.num_tokens != input_ids.shape[0]:
        raise ValueError(f"{input_ids.shape[0]} token ids for a plan of {rows.num_tokens} tokens")
    if len(projectors) != len(rows.counts):
        raise ValueError(f"{len(projectors)} projectors for {len(rows.counts)} modalities")
    for projector, width in zip(projectors, rows.widths, strict=True):
        if projector.width != width:
            raise ValueError(f"a projector takes rows {projector.width} wide, got {width}")
    if rows.dtype != token_table.dtype:
        raise ValueError(f"rows are {rows.dtype}, the token table is {token_table.dtype}")
    for table in rows.tables:
        if table.shape[1:] != token_table.shape[1:] or table.dtype != token_table.dtype:
            raise ValueError(
                f"rows projected before are {tuple(table.shape)} of {table.dtype}, expected "
                f"[n, {token_table.shape[1]}] of {token_table.dtype}"
            )
    if chosen == "torch":
        try:
            return fuse_embeddings_torch(
                input_ids,
                token_table,
                rows.rows,
                rows.slots,
                projectors,
                vocab_start=vocab_start,
                out=out,
                projected=rows.projected,
            )
        except RuntimeError:  # looked at only now, so that no step pays for it
            for m, projector in enumerate(projectors):
                check_shapes(m, projector, token_table.shape[1])
            raise
    return _backend_of(token_table.device).fuse(
        input_ids, token_table, rows, projectors, vocab_start=vocab_start, out=out, launch=launch
    )


def project_rows(
    rows: torch.Tensor,
    projector: Projector,
    *,
    backend: str = "auto",
    launch: LaunchConfig | None = None,
) -> torch.Tensor:
    """`W2 act(W1 norm(x) + b1) + b2`: rows `[R, d]` -> `[R, D]`, in the rows' dtype.

    Under `torch.compile` the call is a graph break.

    Raises:
        ValueError: the backend cannot run, or rows and projector do not fit together.
    """
    if torch.compiler.is_compiling():
        return _outside_the_graph(project_rows, rows, projector, backend=backend, launch=launch)
    _check_kind([projector])
    if _pick(backend, rows, projector.tensors()) == "torch":
        try:
            return project_rows_torch(rows, projector)
        except RuntimeError:
            check_shapes(0, projector)
            raise
    return _backend_of(rows.device).project(rows, projector, launch=launch)


def warm_up(
    projectors: Sequence[Projector],
    *,
    backend: str = "auto",
    resident: bool = False,
    projected: bool = False,
) -> int:
    """Compile every kernel that steps with these projectors can meet, so that none waits for it.

    A server calls this once, before the first request: the kernels of a step depend on how many
    rows it places, and each takes about a second to compile unless Triton's cache on disk has it.
    Covers rows that `plan_rows` copies and int32 token ids; does nothing where `select_backend`
    picks torch.

    Args:
        projectors: one a modality, as `fuse_embeddings` will get them.
        backend: one of `BACKENDS`.
        resident: also for steps some of whose rows lie on the device (`HostRows.resident`).
        projected: also for steps some of whose rows were projected before (`HostRows.projected`).

    Returns:
        How many kernels were made ready.

    Raises:
        ValueError: the backend cannot run, or a projector is a module.
    """
    _check_kind(projectors)
    weight = projectors[0].w2
    if select_backend(weight.device, weight.dtype, backend).name == "torch":
        return 0
    return _backend_of(weight.device).warm_up(projectors, resident=resident, projected=projected)
