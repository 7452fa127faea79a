"""What the tests need that compile kernels for GPUs which this machine does not have."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

_TRITON = importlib.util.find_spec("triton")
CUOBJDUMP = Path(_TRITON.origin if _TRITON and _TRITON.origin else "triton").parent.joinpath(
    "backends", "nvidia", "bin", "cuobjdump"
)
"""Reads registers and spills out of a cubin; a part of triton's wheels."""


def _why_not() -> str | None:
    if _TRITON is None:
        return "needs the package triton"
    if not CUOBJDUMP.exists():
        return f"needs {CUOBJDUMP}, which triton's wheels from the package index have"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 has kernels interpreted, not compiled: unset it to run these"
    return None


WHY_NOT = _why_not()
"""Why nothing can be compiled here, or its result not be read; None where it can."""
