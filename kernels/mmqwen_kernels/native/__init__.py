"""The host path of a request and of a step in C, where it was compiled; elsewhere Python does it.

`_native.c` is small and optional: each of its functions has a twin in Python that gives the same
answer, bit for bit, and takes over wherever it returns None. `pip install` compiles it where there
is a C compiler; in a checkout `make native` does.
"""

from __future__ import annotations

import importlib
import os
import zlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

VARIABLE = "MMQWEN_NATIVE"
"""Environment variable: 0 turns the helper off."""

SOURCE = Path(__file__).with_name("_native.c")


class NativeChoice(NamedTuple):
    """Whether the helper is in use, and why, or why not."""

    in_use: bool
    reason: str


helper: Any = None
"""The compiled module, ready to be called; None: Python does its work."""

_reason = ""


def select_native() -> NativeChoice:
    """Say whether the helper is in use in this process, and why."""
    return NativeChoice(helper is not None, _reason)


def checksum(source: Path = SOURCE) -> int:
    """What a helper compiled of this source bears; setup.py counts it alike."""
    return zlib.crc32(source.read_bytes()) & 0x7FFFFFFF


def _load() -> tuple[Any, str]:
    asked = os.environ.get(VARIABLE, "1")
    if asked not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is {asked!r}, expected 0 (off) or 1; unset is 1")
    if asked == "0":
        return None, f"{VARIABLE}=0"
    try:
        module = importlib.import_module(f"{__name__}._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return None, "not compiled" if missing else f"cannot be loaded: {error}"
    if SOURCE.exists() and module.source != checksum():
        return None, "compiled of another source: run make native, or install again"
    return prepare(module)


def prepare(module: Any) -> tuple[Any, str]:
    """Acquaint a compiled module with this torch: the module or None, and the reason."""
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if table is None:
        return None, f"torch {torch.__version__} has no DLPack exchange table"
    allocate = partial(torch.empty, dtype=torch.int64)
    if not module.setup(torch.Tensor, np.ndarray, table, allocate, torch.UntypedStorage):
        return None, f"torch {torch.__version__} has another DLPack exchange table than 1.x"
    return module, "compiled"


helper, _reason = _load()
