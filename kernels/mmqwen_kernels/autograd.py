"""Projection and placement with gradients: forward as in serving, a backward that copies little.

What is kept from forward to backward, for R rows of width d, H hidden units, D outputs, T tokens,
b bytes an element:

    tensor                       this module      torch's autograd over the same ops
    hidden activations [R, H]    see below        b H a row, saved
    rows x [R, d]                a reference to the caller's
    slots, ids                   references       references, and a copy of all slots
    mask of the ReLU             read off the hidden activations
    weights                      references
    projected rows [R, D]        never made by the kernels; by torch freed once placed

Hidden activations are kept where that is little memory or much work (`backward.keeps_hidden`),
else recomputed: x W1^T once more, 2 d H of the 4 (d H + H D) + 2 H (d + D) operations that both
directions need without it, 6% for d = 768 and H = D = 4096. Under torch.compile the kernels always
recompute. `backward.py` has the backward and what is alive in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mmqwen_kernels.backward import (
    GROUP_OF,
    backward_kernels,
    fits_one_launch,
    hidden_of,
    keeps_hidden,
    modality_by_torch,
    select_backward,
)
from mmqwen_kernels.ops import BackendChoice, select_backend
from mmqwen_kernels.plan import RowPlan, tables_of
from mmqwen_kernels.reference import Projector

_PER_MODALITY = 6
"""Tensors that each modality passes to the function: rows, slots, W1, b1, W2, b2."""
_LEADING = 6
"""What is passed before them."""


def select_training_path(
    embedding: nn.Module, linears: Sequence[nn.Module] = (), path: str = "auto"
) -> BackendChoice:
    """Say whether a model's embedding and projectors run as `fused_embed` or as modules, and why.

    "auto" is "fused" exactly where `select_backend` picks the kernels: there forward is the op that
    serves. Elsewhere torch's own autograd is as fast, and saving the hidden activations costs a CPU
    less than recomputing them (docs/training.md). Modules that do more than their class says
    (adapters, hooks, sharded or quantised weights) are always called.

    Args:
        embedding: the token embedding.
        linears: the linear layers of the projectors.
        path: "auto", "fused" or "torch".

    Raises:
        ValueError: `path` is none of these, or "fused" cannot run on these modules.
    """
    if path not in ("auto", "fused", "torch"):
        raise ValueError(f"path {path!r}, expected 'auto', 'fused' or 'torch'")
    if path == "torch":
        return BackendChoice("torch", "asked for")
    refusal = _why_not_fused(embedding, linears)
    if refusal is not None:
        if path == "fused":
            raise ValueError(f"path 'fused' cannot run: {refusal}; use path='torch'")
        return BackendChoice("torch", refusal)
    if path == "fused":
        return BackendChoice("fused", "asked for")
    weight = cast(torch.Tensor, embedding.weight)
    backend = select_backend(weight.device, weight.dtype)
    return BackendChoice("fused" if backend.name == "triton" else "torch", backend.reason)


def _why_not_fused(embedding: nn.Module, linears: Sequence[nn.Module]) -> str | None:
    """What keeps the weights of these modules from standing for the modules, or None."""
    kinds: list[tuple[nn.Module, type]] = [(embedding, nn.Embedding)]
    kinds += [(linear, nn.Linear) for linear in linears]
    for module, kind in kinds:
        if type(module) is not kind:
            return f"a {type(module).__name__} stands where a {kind.__name__} would"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"a {kind.__name__} has hooks"
        if any(type(p) is not nn.Parameter for p in module.parameters()):
            return f"the weights of a {kind.__name__} are sharded or quantised"
    if cast(nn.Embedding, embedding).max_norm is not None:
        return "the embedding has max_norm"
    return None


def fused_embed(
    input_ids: torch.Tensor,
    token_table: torch.Tensor,
    rows: Sequence[torch.Tensor | None],
    slots: Sequence[torch.Tensor | None],
    projectors: Sequence[Projector],
    *,
    padding_idx: int | None = None,
    backend: str = "auto",
    engine: str = "auto",
) -> torch.Tensor:
    """Token embeddings `[T, D]` with projected rows at their slots; differentiable.

    Gradients flow to the rows, to the weights and to the token table, each only where it is asked
    for; a modality without rows gets gradients of zeros, as DistributedDataParallel wants it. Under
    autocast, rows are projected in autocast's dtype, as torch's own linear layers would.

    Args:
        input_ids: `[T]` integers within the table; those at slots do not matter.
        token_table: `[V, D]`.
        rows: per modality `[R_m, d_m]`, or None. An item that stands in two places is there twice.
        slots: per modality `[R_m]` integer positions in `[0, T)`, distinct over all modalities.
        projectors: per modality; all of one dtype.
        padding_idx: id whose row of the table gets no gradient, as in `torch.nn.Embedding`.
        backend: for the forward: one of `mmqwen_kernels.ops.BACKENDS`. The kernels need rows,
            weights and table of one dtype; "auto" takes torch where they differ.
        engine: for the backward: "auto", "kernels" or "torch"; see `backward.select_backward`.

    Returns:
        `[T, D]` in the table's dtype.

    Raises:
        ValueError: the tensors do not fit together, or the backend cannot run.
    """
    if not len(rows) == len(slots) == len(projectors):
        raise ValueError(
            f"{len(rows)} rows, {len(slots)} slots and {len(projectors)} projectors; expected one "
            "of each per modality"
        )
    compute = projectors[0].w1.dtype if projectors else token_table.dtype
    kind = token_table.device.type
    if torch.is_autocast_enabled(kind) and compute != torch.float64:
        compute = torch.get_autocast_dtype(kind)
    flat: list[torch.Tensor | None] = []
    for index, (x, at, projector) in enumerate(zip(rows, slots, projectors, strict=True)):
        width = projector.w1.shape[1]
        if x is None or at is None:
            if x is not at:
                raise ValueError(f"modality index {index}: rows without slots, or the reverse")
            x = projector.w1.new_empty(0, width)
            at = torch.empty(0, dtype=torch.long, device=input_ids.device)
        if x.ndim != 2 or x.shape[1] != width or at.shape != x.shape[:1]:
            raise ValueError(
                f"modality index {index}: rows {tuple(x.shape)} and slots {tuple(at.shape)}, "
                f"expected [R, {width}] and [R]"
            )
        flat += [x, at, *projector]
    if backend == "auto" and compute != token_table.dtype:
        backend = "torch"
    name = select_backend(token_table.device, token_table.dtype, backend).name
    if name == "triton" and compute != token_table.dtype:
        raise ValueError(
            f"backend 'triton': rows are projected in {compute}, the table is {token_table.dtype}; "
            "use backend='torch', or one dtype"
        )
    return FusedProjectorFunction.apply(
        input_ids, token_table, padding_idx, compute, name, engine, *flat
    )


class FusedProjectorFunction(torch.autograd.Function):
    """`fused_embed` as autograd sees it; see the head of the module for what is saved."""

    @staticmethod
    def forward(
        ctx: Any,
        input_ids: torch.Tensor,
        token_table: torch.Tensor,
        padding_idx: int | None,
        compute: torch.dtype,
        backend: str,
        engine: str,
        *flat: torch.Tensor,
    ) -> torch.Tensor:
        """Gather and project; `flat` holds rows, slots, W1, b1, W2, b2 of each modality."""
        ctx.padding_idx, ctx.compute, ctx.table_shape = padding_idx, compute, token_table.shape
        ctx.engine, ctx.together = engine, False
        if backend == "triton":
            if torch.compiler.is_compiling():
                from mmqwen_kernels.autograd_ops import forward_op

                ctx.save_for_backward(input_ids, *flat)
                return forward_op(input_ids, token_table, list(flat))
            out, hidden = _forward_triton(input_ids, token_table, flat)
            ctx.together = hidden is not None and _keeps_together(
                flat, ctx.needs_input_grad, compute
            )
            if ctx.together:
                ctx.save_for_backward(input_ids, *flat, hidden)
            else:
                ctx.save_for_backward(input_ids, *flat)
            return out
        out = F.embedding(input_ids, token_table)
        kept: list[torch.Tensor | None] = []
        learns = ctx.needs_input_grad
        for index, (x, at, w1, b1, w2, b2) in enumerate(_modalities(flat)):
            hidden = None
            if x.shape[0]:
                hidden = hidden_of(x.to(compute), w1.to(compute), b1.to(compute))
                bias = None if b2 is None else b2.to(compute)
                placed = F.linear(hidden, w2.to(compute), bias)
                out.index_copy_(0, at.long(), placed.to(out.dtype))
                begin = _LEADING + index * _PER_MODALITY
                (units, width), columns = w1.shape, w2.shape[0]
                if not any(learns[begin : begin + 5]) or not keeps_hidden(
                    x.shape[0], width, units, columns, compute.itemsize
                ):
                    hidden = None
            kept.append(hidden)
        ctx.save_for_backward(input_ids, *flat, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the table and, per modality, of x, W1, b1, W2, b2; frozen ones are None."""
        if grad.is_cuda and not grad.is_contiguous():
            grad = grad.contiguous()  # the kernels read whole rows
        input_ids, *saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        size = len(needs) - _LEADING
        flat, kept = saved[:size], saved[size:]
        groups = _modalities(flat)
        of_table = None
        if needs[1]:
            of_table = _table_gradient(
                grad, input_ids, [at for _, at, *_ in groups], ctx.table_shape, ctx.padding_idx
            )
        result: list[torch.Tensor | None] = [None] * _LEADING
        result[1] = of_table
        wanted = _modalities(needs[_LEADING:])
        if not any(map(any, wanted)):
            return (*result, *[None] * size)
        if torch.compiler.is_compiling() and not kept:  # the kernels' forward, under compile
            from mmqwen_kernels.autograd_ops import backward_op

            given = iter(backward_op(grad, flat, list(needs[_LEADING:]), ctx.compute, ctx.engine))
            result += [next(given) if need else None for need in needs[_LEADING:]]
            return tuple(result)
        shared = None
        if ctx.together:
            shared, kept = kept[0], []
        result += projector_gradients(grad, groups, wanted, ctx.compute, kept, ctx.engine, shared)
        return tuple(result)


def _modalities(flat: Sequence[Any]) -> list[Sequence[Any]]:
    return [flat[i : i + _PER_MODALITY] for i in range(0, len(flat), _PER_MODALITY)]


def _keeps_together(flat: Sequence[Any], needs: Sequence[bool], compute: torch.dtype) -> bool:
    """Whether the hidden activations of all modalities, in one buffer, are kept for backward."""
    for (x, _, w1, _, w2, _), need in zip(
        _modalities(flat), _modalities(needs[_LEADING:]), strict=True
    ):
        sizes = (x.shape[0], w1.shape[1], w1.shape[0], w2.shape[0])
        if x.shape[0] and not (any(need[:5]) and keeps_hidden(*sizes, compute.itemsize)):
            return False
    return True


def _table_gradient(
    grad: torch.Tensor,
    input_ids: torch.Tensor,
    slots: Sequence[torch.Tensor],
    shape: torch.Size,
    padding_idx: int | None,
) -> torch.Tensor:
    """`[V, D]`: the gradients of all text slots, summed by id; slots of rows give none.

    Rows are sent to an id past the table, which the embedding's own backward leaves out.
    """
    nowhere = shape[0]
    ids = input_ids.long()
    if padding_idx is not None:
        ids = ids.masked_fill(ids == padding_idx, nowhere)
    if slots:
        ids = ids.index_fill(0, torch.cat([at.long() for at in slots]), nowhere)
    dense = torch.ops.aten.embedding_dense_backward(grad, ids, nowhere + 1, nowhere, False)
    return dense[:nowhere]


def projector_gradients(
    grad: torch.Tensor,
    groups: Sequence[Sequence[Any]],
    needs: Sequence[Sequence[bool]],
    compute: torch.dtype,
    kept: Sequence[torch.Tensor | None] = (),
    engine: str = "auto",
    shared: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of x, slots (None), W1, b1, W2 and b2 of each modality in turn, flat.

    Args:
        grad: `[T, D]`.
        groups: per modality x, slots, W1, b1, W2, b2.
        needs: which of these get a gradient; zeros where a modality has no rows.
        compute: dtype of the products.
        kept: per modality its hidden activations or None; empty: none were kept.
        engine: see `backward.select_backward`.
        shared: the hidden activations `[R, stride]` of all modalities instead, as the kernels'
            forward gives them.
    """
    result: list[list[torch.Tensor | None]] = [[None] * _PER_MODALITY for _ in groups]
    together: list[int] = []
    apart: list[int] = []
    for m, (tensors, need) in enumerate(zip(groups, needs, strict=True)):
        if not (any(need) and tensors[0].shape[0]):
            result[m] = [
                torch.zeros_like(t) if n else None for t, n in zip(tensors, need, strict=True)
            ]
        elif (
            not kept
            and select_backward(tensors, grad, compute, need, engine).name == "kernels"
            and (not together or groups[together[0]][2].dtype == tensors[2].dtype)
        ):
            together.append(m)
        else:
            apart.append(m)
    one_launch = fits_one_launch([groups[m] for m in together]) if together else False
    if shared is not None and (apart or not one_launch or len(together) > GROUP_OF):
        # The kernels want all of the buffer's rows; torch takes each modality's part of it.
        kept, row = [], 0
        for x, _, w1, *_ in groups:
            kept.append(shared[row : row + x.shape[0], : w1.shape[0]])
            row += x.shape[0]
        shared, apart, together = None, sorted(apart + together), []
    for m in apart:
        hidden = kept[m] if kept else None
        result[m] = modality_by_torch(grad, groups[m], needs[m], compute, hidden)
    size = GROUP_OF if one_launch else 1
    for begin in range(0, len(together), size):
        some = together[begin : begin + size]
        found = backward_kernels(grad.device).gradients(
            grad, [groups[m] for m in some], [needs[m][0] for m in some], shared
        )
        for m, gradients in zip(some, found, strict=True):
            result[m] = gradients
    return [gradient for gradients in result for gradient in gradients]


def _forward_triton(
    input_ids: torch.Tensor, token_table: torch.Tensor, flat: Sequence[Any]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The serving op on rows that lie on the device, and its hidden activations `[R, stride]`."""
    from mmqwen_kernels.triton_backend import triton_backend

    groups = _modalities(flat)
    dtype = token_table.dtype
    projectors = [
        Projector(*(None if w is None else w.to(dtype) for w in tensors[2:]))  # type: ignore[arg-type]
        for tensors in groups
    ]
    plan = _plan_on_device(
        [t[0].to(dtype).contiguous() for t in groups], [t[1] for t in groups], input_ids.shape[0]
    )
    return triton_backend(token_table.device).fuse(
        input_ids,
        token_table,
        plan.buffer,
        plan.order_at,
        plan.tables,
        plan.counts,
        projectors,
        vocab_start=0,
        out=None,
        launch="fastest",
    )


def _plan_on_device(
    rows: Sequence[torch.Tensor], slots: Sequence[torch.Tensor], num_tokens: int
) -> RowPlan:
    """A `RowPlan` of rows and slots that are on the device already, without a synchronisation."""
    device, dtype = rows[0].device, rows[0].dtype
    counts = tuple(x.shape[0] for x in rows)
    widths = tuple(x.shape[1] for x in rows)
    all_slots = slots[0].long() if len(slots) == 1 else torch.cat([at.long() for at in slots])
    is_text = torch.ones(num_tokens, dtype=torch.bool, device=device)
    is_text.index_fill_(0, all_slots, False)
    text = torch.nonzero_static(is_text, size=num_tokens - sum(counts)).flatten()
    order = torch.cat([text, all_slots])
    parts = tuple((x,) if x.shape[0] else () for x in rows)
    return RowPlan(
        parts,
        counts,
        num_tokens,
        widths,
        dtype,
        order.view(torch.uint8),
        0,
        (-1,) * len(rows),
        tables_of(parts, counts, widths, dtype, device),
    )
