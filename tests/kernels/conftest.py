"""Settings of the kernel tests: import path, and why GPU tests are skipped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
try:
    import mmqwen_kernels  # noqa: F401
except ImportError:  # a checkout that was not installed
    sys.path.insert(0, str(HERE.parents[1] / "kernels"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE) and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
