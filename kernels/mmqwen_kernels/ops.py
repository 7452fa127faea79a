"""The fusion op, its halves, and the rule that picks a backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mmqwen_kernels.launch import MODES, LaunchConfig, Mode
from mmqwen_kernels.plan import RowPlan, RowSource, plan_rows
from mmqwen_kernels.reference import Projector, fuse_embeddings_torch, project_rows_torch

if TYPE_CHECKING:
    from mmqwen_kernels.triton_backend import TritonBackend

BACKENDS = ("auto", "torch", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)
VALIDATED_CAPABILITIES = ((9, 0),)
"""GPUs on which tests/kernels/test_gpu.py has passed (H100, 2026-11-24, docs/kernels.md)."""
AUTO_DTYPES = (torch.bfloat16, torch.float16)
"""Not fp32: multiplied without tensor cores, and not timed against cuBLAS (docs/kernels.md)."""


class BackendChoice(NamedTuple):
    """A backend's name and the reason for it."""

    name: str
    reason: str


def select_backend(
    device: torch.device | str, dtype: torch.dtype, backend: str = "auto"
) -> BackendChoice:
    """Say which backend runs on `device` for rows of `dtype`, and why.

    "auto" is the kernels for bf16 and fp16 on GPUs on which they have been validated, else torch;
    and torch for calls that need gradients.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`, or cannot run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}, expected one of {BACKENDS}")
    if backend == "torch":
        return BackendChoice("torch", "asked for")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())  # answers are kept by device
    if backend == "auto":
        if device.type != "cuda":
            return BackendChoice("torch", f"no kernels for {device.type} devices")
        return _auto_on_cuda(device, dtype)
    if torch.compiler.is_compiling():  # the custom op asks again when it runs
        return BackendChoice("triton", "asked for; checked when it runs")
    refusal = _why_not_triton(device, dtype)
    if refusal is not None:
        raise ValueError(f"backend 'triton' cannot run: {refusal}")
    if device.type == "cpu":
        return BackendChoice("triton", "asked for; under Triton's interpreter, for tests")
    return BackendChoice("triton", "asked for")


@lru_cache(maxsize=64)
def _auto_on_cuda(device: torch.device, dtype: torch.dtype) -> BackendChoice:
    if dtype not in AUTO_DTYPES:
        return BackendChoice(
            "torch", f"the kernels are for {[str(d) for d in AUTO_DTYPES]}, rows are {dtype}"
        )
    refusal = _why_not_triton(device, dtype)
    if refusal is not None:
        return BackendChoice("torch", refusal)
    capability = torch.cuda.get_device_capability(device)
    if capability not in VALIDATED_CAPABILITIES:
        return BackendChoice(
            "torch",
            f"the kernels have not been validated on capability {capability}; backend='triton' "
            "runs them",
        )
    return BackendChoice("triton", f"validated for {dtype} on capability {capability}")


@lru_cache(maxsize=64)
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from running, with the remedy; None: nothing."""
    if dtype not in TRITON_DTYPES:
        return f"rows are {dtype}, expected one of {[str(d) for d in TRITON_DTYPES]}"
    if device.type not in ("cuda", "cpu"):
        return f"no kernels for {device.type} devices; use backend='torch'"
    try:
        from mmqwen_kernels.triton_backend import interpreting
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install triton or use backend='torch'"
    if device.type == "cpu":
        if not interpreting():
            return "on the CPU it needs TRITON_INTERPRET=1 at import; use backend='torch'"
        if dtype == torch.bfloat16:
            # tl.dot on bf16 silently returns garbage there (seen with triton 3.6 to 3.9).
            return "Triton's interpreter multiplies bfloat16 wrongly; use float16 or float32"
        return None
    if interpreting():
        return "TRITON_INTERPRET is set; unset it to run on a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the GPU's capability is {capability}, expected {MIN_CAPABILITY} or later"
    return None


def _backend_of(device: torch.device) -> TritonBackend:
    from mmqwen_kernels.triton_backend import triton_backend

    return triton_backend(device)


def _needs_gradients(first: torch.Tensor, others: Iterable[torch.Tensor | None]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return first.requires_grad or any(t is not None and t.requires_grad for t in others)


def _pick(backend: str, first: torch.Tensor, others: Iterable[torch.Tensor | None]) -> str:
    """The backend's name for a call on these tensors.

    Raises:
        ValueError: as `select_backend`, or "triton" is asked for gradients.
    """
    if _needs_gradients(first, others):
        if backend == "triton":
            raise ValueError(
                "the kernels give no gradients (docs/adr/0004): use torch.no_grad() or "
                "backend='torch'"
            )
        if backend == "auto":
            return "torch"
    return select_backend(first.device, first.dtype, backend).name


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
    launch: Mode | LaunchConfig = "fastest",
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
        launch: for the kernels: "fastest", "batch_invariant" (the same tiles for every batch), or
            a `LaunchConfig`.

    Returns:
        `[T, D]`: `out` where given.

    Raises:
        ValueError: rows and slots do not match, ids or slots are no integers, a width is wrong, or
            the backend cannot run; the kernels also refuse weights without elements.
    """
    chosen = _pick(backend, token_table, (w for p in projectors for w in p))
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
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids are {input_ids.dtype}, expected int32 or int64")
    if rows.num_tokens != input_ids.shape[0]:
        raise ValueError(f"{input_ids.shape[0]} token ids for a plan of {rows.num_tokens} tokens")
    if chosen == "torch":
        return fuse_embeddings_torch(
            input_ids,
            token_table,
            rows.rows,
            rows.slots,
            projectors,
            vocab_start=vocab_start,
            out=out,
        )
    if not isinstance(launch, LaunchConfig) and launch not in MODES:
        raise ValueError(f"launch {launch!r}, expected one of {MODES} or a LaunchConfig")
    if len(projectors) != len(rows.counts):
        raise ValueError(f"{len(projectors)} projectors for {len(rows.counts)} modalities")
    for projector, width in zip(projectors, rows.widths, strict=True):
        if projector.w1.shape[1] != width:
            raise ValueError(f"a projector takes rows {projector.w1.shape[1]} wide, got {width}")
    if rows.dtype != token_table.dtype:
        raise ValueError(f"rows are {rows.dtype}, the token table is {token_table.dtype}")
    if torch.compiler.is_compiling():
        from mmqwen_kernels.custom_ops import fuse_compiled

        return fuse_compiled(input_ids, token_table, rows, projectors, vocab_start, out, launch)
    return _backend_of(token_table.device).fuse(
        input_ids,
        token_table,
        rows.buffer,
        rows.order_at,
        rows.tables,
        rows.counts,
        projectors,
        vocab_start=vocab_start,
        out=out,
        launch=launch,
    )


def project_rows(
    rows: torch.Tensor,
    projector: Projector,
    *,
    backend: str = "auto",
    launch: Mode | LaunchConfig = "fastest",
) -> torch.Tensor:
    """`W2 relu(W1 x + b1) + b2`: rows `[R, d]` -> `[R, D]`, in the rows' dtype.

    Raises:
        ValueError: the backend cannot run, or rows and projector do not fit together.
    """
    if _pick(backend, rows, projector) == "torch":
        return project_rows_torch(rows, projector)
    if torch.compiler.is_compiling():
        from mmqwen_kernels.custom_ops import project_rows_op

        return project_rows_op(rows, *projector)
    return _backend_of(rows.device).project(rows, projector, launch=launch)


def warm_up(projectors: Sequence[Projector], *, backend: str = "auto") -> int:
    """Compile every kernel that steps with these projectors can meet, so that none waits for it.

    A server calls this once, before the first request: the kernels of a step depend on how many
    rows it places, and each takes about a second to compile unless Triton's cache on disk has it.
    Covers rows that come in packs, int32 token ids and mode "fastest"; does nothing where
    `select_backend` picks torch.

    Args:
        projectors: one a modality, as `fuse_embeddings` will get them.
        backend: one of `BACKENDS`.

    Returns:
        How many kernels were made ready.

    Raises:
        ValueError: the backend cannot run.
    """
    weight = projectors[0].w1
    if select_backend(weight.device, weight.dtype, backend).name == "torch":
        return 0
    return _backend_of(weight.device).warm_up(projectors)
