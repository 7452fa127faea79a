"""LoRA on the language model, by peft; the projectors are trained as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mmqwen.training.config import LORA_LAYERS, TrainingError

ADAPTER = "default"
ADAPTER_FOLDER = "adapter"


def add_lora(
    model: Any,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    layers: Sequence[str],
    seed: int,
    autocast: bool = False,
) -> Any:
    """Put LoRA layers in place of the language model's linear layers; only these stay trainable.

    Returns:
        peft's tuner, for `merge_lora` and `save_adapter`.

    Raises:
        TrainingError: peft is missing, or no layer has one of these names.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer, LoraModel
    except ImportError as error:
        raise TrainingError(
            f"stage 'lora' needs peft: pip install 'mmqwen[train]' ({error})"
        ) from error

    def pattern(names: Sequence[str]) -> str:
        return rf"model\.layers\..*\.({'|'.join(map(re.escape, names))})"

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=pattern(layers),
    )
    known = [name for name, _ in model.named_modules()]
    for name in layers if tuple(layers) != LORA_LAYERS else ():  # of which a model may lack some
        if not any(re.fullmatch(pattern([name]), module) for module in known):
            raise TrainingError(f"lora_layers: the language model has no layer {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            tuner = LoraModel(model, {ADAPTER: config}, ADAPTER)
        except ValueError as error:
            raise TrainingError(f"lora_layers {list(layers)}: {error}") from error
    for module in tuner.modules():
        if isinstance(module, LoraLayer):
            # Under autocast the product takes its input in bfloat16: a copy in float32, which peft
            # makes to suit the weights, would only be cast back.
            module.cast_input_dtype_enabled = not autocast
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # in float32 beside a bfloat16 base, or small steps are rounded away
            parameter.data = parameter.data.float()
    return tuner


def merge_lora(tuner: Any) -> Any:
    """Add the LoRA weights to the base's and take the layers out; returns the plain model."""
    return tuner.merge_and_unload()


def save_adapter(tuner: Any, folder: Path, base: str) -> None:
    """Write the LoRA weights as peft's `adapter_model.safetensors` and `adapter_config.json`."""
    folder.mkdir(parents=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in tuner.model.state_dict().items()
        if f".{ADAPTER}." in name and "lora_" in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {**tuner.peft_config[ADAPTER].to_dict(), "base_model_name_or_path": base}
    config["inference_mode"] = True
    # vLLM reads the layers' names from the weights; a list is what other readers expect.
    config["target_modules"] = sorted({name.split(".")[-3] for name in tensors})
    text = json.dumps(config, indent=2, default=_plain) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
