"""Which backend runs, and why: one rule, for whoever asks."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from mmqwen_kernels.tiles import TRITON_DTYPES

BACKENDS = ("auto", "torch", "triton")
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
    device: torch.device | str,
    dtype: torch.dtype,
    backend: str = "auto",
    *,
    gradients: bool = False,
) -> BackendChoice:
    """Say which backend runs on `device` for rows of `dtype`, and why.

    "auto" is the kernels for bf16 and fp16 on GPUs on which they have been validated, else torch;
    and torch for calls that need `gradients`.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`, or cannot run there.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}, expected one of {BACKENDS}")
    if backend == "torch":
        return BackendChoice("torch", "asked for")
    if gradients and backend == "auto":
        return BackendChoice("torch", "the kernels give no gradients (docs/adr/0004)")
    if gradients:
        raise ValueError(
            "the kernels give no gradients (docs/adr/0004): use torch.no_grad() or backend='torch'"
        )
    device = torch.device(device)
    if backend == "auto":
        if device.type != "cuda":
            return BackendChoice("torch", f"no kernels for {device.type} devices")
        return _auto_on_cuda(device, dtype)
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
        from mmqwen_kernels.launcher import interpreting
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
