"""`import mmqwen` costs nothing; public names are resolved when they are first used."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

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


# -- who imports whom --------------------------------------------------------------------------

ROOT = Path(mmqwen.__file__).parent.parent


def modules():
    """Name to file of each of our modules."""
    found = {}
    for folder, package in ((ROOT, "mmqwen"), (ROOT / "kernels", "mmqwen_kernels")):
        for file in (folder / package).rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


class Imports(ast.NodeVisitor):
    """What a module imports of `known`, within functions too, but for types alone."""

    def __init__(self, known):
        self.known, self.found = known, set()

    def visit_If(self, node):
        for child in node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else [node]:
            self.generic_visit(child)

    def visit_Import(self, node):
        self.found |= {alias.name for alias in node.names} & self.known

    def visit_ImportFrom(self, node):
        if node.module in self.known:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            self.found |= names & self.known
            if names - self.known:
                self.found.add(node.module)


def test_no_module_imports_what_imports_it():
    files = modules()
    graph = {}
    for name, file in files.items():
        visitor = Imports(set(files))
        visitor.visit(ast.parse(file.read_text(encoding="utf-8")))
        graph[name] = visitor.found - {name}
    assert "mmqwen.data.parquet" in graph["mmqwen.data.format"]  # it looks at something
    while leaves := [name for name, others in graph.items() if not others]:
        for name in leaves:
            del graph[name]
        graph = {name: others - set(leaves) for name, others in graph.items()}
    # What is left imports, or leads to, a circle.
    assert graph == {}
