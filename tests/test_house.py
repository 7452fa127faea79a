"""Who imports whom, read off the source: downwards, in no circle; and facts that stand once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("mmqwen/**/*.py"), *ROOT.glob("kernels/mmqwen_kernels/**/*.py")]

LAYERS = (
    (
        "cli",
        "banks.cli",
        "commands",
        "serve",
        "doctor",
        "pipeline",
        "prompt_checks",
        "attempts",
        "engines",
        "named_rows",
        "reference_engine",
        "sampling",
        "scoring",
        "demo",
        "training",
        "evaluation",
        "playground",
    ),
    ("vllm_plugin",),
    ("checkpoint.build",),
    ("hf",),
    ("data",),
    ("checkpoint",),
    ("chat", "tokens", "inputs", "messages", "misplaced", "client", "references"),
    ("packs", "pack_slices"),
    ("banks",),
    ("transport",),
    ("banks.rows", "stops", "text_models", "modalities", "_version"),
)
"""Of `mmqwen`, from the doors down (docs/architecture.md); the longest name that fits counts."""

PUBLIC_VLLM = {
    "vllm",
    "vllm.config",
    "vllm.distributed",
    "vllm.logger",
    "vllm.sampling_params",
    "vllm.inputs",
    "vllm.multimodal",
    "vllm.multimodal.inputs",
    "vllm.multimodal.parse",
    "vllm.multimodal.processing",
    "vllm.model_executor.models.interfaces",
    "vllm.model_executor.models.module_mapping",
    "vllm.model_executor.models.utils",
}
"""What vLLM documents for those who add models, processors and doors of their own."""


def module_of(file: Path) -> str:
    base = ROOT / "kernels" if "kernels" in file.relative_to(ROOT).parts else ROOT
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that the code below `node` imports, wherever; not for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.module is not None, "no relative imports"
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in MODULES else child.module
        yield from imported(child)


@cache
def graph() -> dict[str, set[str]]:
    trees = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}
    return {name: set(imported(tree)) for name, tree in trees.items()}


def layer(module: str) -> int:
    fits = [
        (len(name), at)
        for at, names in enumerate(LAYERS)
        for name in names
        if f"{module}.".startswith(f"mmqwen.{name}.")
    ]
    assert fits, f"{module} stands in no layer"
    return max(fits)[1]


def test_there_is_no_import_circle():
    edges = {name: found & MODULES.keys() for name, found in graph().items()}
    assert "mmqwen.data.parquet" in edges["mmqwen.data.format"]  # it looks at something
    left = -1
    while left != len(
        edges
    ):  # what imports nothing of the rest, or is imported by none of it, goes
        left = len(edges)
        edges = {
            name: found & edges.keys() for name, found in edges.items() if found & edges.keys()
        }
        edges = {name: edges[name] for name in set().union(*edges.values()) & edges.keys()}
    assert not edges


def test_imports_go_downwards():
    upwards = [
        (name, other)
        for name, found in graph().items()
        for other in found & MODULES.keys()
        if name.startswith("mmqwen.") and other.startswith("mmqwen.")
        if layer(other) < layer(name)
    ]
    assert not upwards


def test_the_op_knows_nothing_of_the_package():
    found = {name: graph()[name] for name in MODULES if name.split(".")[0] == "mmqwen_kernels"}
    assert len(found) > 5
    names = {other.split(".")[0] for others in found.values() for other in others}
    assert not names & {"mmqwen", "vllm", "transformers"}


def test_vllms_private_modules_are_imported_in_compat_alone():
    private = [
        (name, other)
        for name, found in graph().items()
        for other in found
        if other.split(".")[0] == "vllm" and other not in PUBLIC_VLLM
        if not name.startswith("mmqwen.vllm_plugin.compat")
    ]
    assert not private


@pytest.mark.parametrize(
    ("text", "home"),
    [
        ('"projectors."', "mmqwen.checkpoint.names"),
        ("linear_1.weight\"", "mmqwen.checkpoint.names"),
        ('"projectors.safetensors"', "mmqwen.checkpoint.names"),
        ('"model.safetensors.index.json"', "mmqwen.checkpoint.names"),
        ('{"metadata"', "mmqwen.checkpoint.index"),
        ('"VLLM_CPU_KVCACHE_SPACE", "4"', "mmqwen.vllm_plugin.compat"),
        ('"fp16"', "mmqwen_kernels.tiles"),
    ],
)  # fmt: skip
def test_a_fact_stands_once(text, home):
    assert [name for name, file in MODULES.items() if text in file.read_text()] == [home]


def test_the_map_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    names = {file.name for file in FILES} | {f"{file.parent.name}/" for file in FILES}
    assert not [name for name in names if name not in text]
