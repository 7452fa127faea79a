"""`import mmqwen` costs nothing; public names are resolved when they are first used."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import mmqwen

HEAVY = ("torch", "transformers", "vllm", "triton", "numpy", "safetensors")


def loaded_after(statement: str) -> list[str]:
    """Heavy modules that a fresh process has loaded once it has run `statement`."""
    code = f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    return eval(done.stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "import mmqwen; mmqwen.__version__; dir(mmqwen)",
        "import mmqwen.modalities",
        "import mmqwen.vllm_plugin",
        "import mmqwen.cli",
        "import mmqwen.doctor",
        "from mmqwen.cli import main; assert main(['version']) == 0",
        "from mmqwen.cli import main; main(['--help'])",
    ],
)
def test_loads_nothing_heavy(statement):
    quiet = "import io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()):\n    "
    assert loaded_after(quiet + statement) == []


@pytest.mark.parametrize("name", sorted(set(mmqwen.__all__) - {"__version__"}))
def test_public_names_resolve(name):
    if name == "MultimodalQwen3Model":
        pytest.importorskip("vllm")
    assert getattr(mmqwen, name).__name__ == name


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        mmqwen.no_such_name  # noqa: B018


def test_submodules_are_not_shadowed_by_lazy_names():
    assert importlib.import_module("mmqwen.transport") is mmqwen.transport
