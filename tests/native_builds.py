"""The native helper for tests: the installed one, or one that is built for them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from mmqwen_kernels import native

VARIABLE = "MMQWEN_TEST_NATIVE"
"""Environment variable: a compiled helper to test, as `run_sanitized.py` builds one."""


def compiler() -> list[str] | None:
    """The command of this Python's C compiler, or None."""
    words = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    return words if words and shutil.which(words[0]) else None


def build(folder: Path, flags: Sequence[str] = ("-O3",)) -> Path:
    """Compile the helper as setup.py does, into `folder`."""
    command = compiler()
    if command is None:
        pytest.skip("needs a C compiler (apt-get install gcc, or CC=...) to compile the helper")
    target = folder / "_native.abi3.so"
    done = subprocess.run(
        [
            *command, *flags, "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter",
            "-Werror", f"-DSOURCE={native.checksum()}", f"-I{sysconfig.get_path('include')}",
            str(native.SOURCE), "-o", str(target),
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def load(path: Path) -> ModuleType:
    """The compiled module at `path`, acquainted with this process's torch."""
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found, reason = native.prepare(module)
    assert found is not None, reason
    return module


def helper_for_tests(folder: Path) -> ModuleType:
    """The helper that is under test."""
    named = os.environ.get(VARIABLE)
    if named:
        return load(Path(named))
    if native.helper is not None:
        return native.helper
    if sys.platform != "linux":
        pytest.skip("tests compile the helper on Linux alone: python setup.py build_ext --inplace")
    return load(build(folder))
