"""What a training run is told."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

STAGES = ("projector", "lora", "full")
LEARNING_RATES = {"projector": 1e-3, "lora": 2e-4, "full": 2e-5}
"""Peak learning rate of each stage unless told: those of LLaVA 1.5 (arXiv:2310.03744, and scripts
of its repository) for the projector alone, for LoRA and for all weights."""

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OVERLONG = ("refuse", "cut")
ATTENTION = ("auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3")


class TrainingError(ValueError):
    """Training cannot start or go on, with the reason and the remedy."""


Check = Callable[[str, Any], Any]
"""Reads one setting: its name and what was given in, its value out, or a TrainingError."""


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _whole(smallest: int, largest: int | None = None) -> Check:
    """A whole number, numpy's among them, as an int."""
    expected = f"at least {smallest}" if largest is None else f"{smallest} to {largest}"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TrainingError(f"{name} is {value!r}, expected a whole number, {expected}")
        number = int(value)
        if number < smallest or (largest is not None and number > largest):
            raise TrainingError(f"{name} is {number}, expected {expected}")
        return number

    return check


def _real(fits: Callable[[float], bool], expected: str) -> Check:
    """A finite number as a float."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TrainingError(f"{name} is {value!r}, expected a number, {expected}")
        number = float(value)
        if not (math.isfinite(number) and fits(number)):
            raise TrainingError(f"{name} is {value}, expected {expected}")
        return number

    return check


def _one_of(known: tuple[str, ...]) -> Check:
    def check(name: str, value: Any) -> str:
        if value not in known:
            raise TrainingError(f"{name} {value!r}, expected one of {known}")
        return value

    return check


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TrainingError(f"{name} is {value!r}, expected True or False")
    return value


def _path(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise TrainingError(f"{name} is {value!r}, expected a path")
    return str(value)


def _name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TrainingError(f"{name} is {value!r}, expected a name of transformers'")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(n, str) for n in value):
        raise TrainingError(f"{name} is {value!r}, expected a list of names")
    if not all(value) or not value:
        raise TrainingError(f"{name} is {value!r}, expected at least one name")
    return tuple(value)


def _banks(name: str, value: Any) -> tuple[str, ...]:
    """Flags `NAME=FILE`; or a dict from name to file."""
    from mmqwen.banks import BankError, parse_bank_flags

    if isinstance(value, Mapping):
        value = [f"{bank}={file}" for bank, file in value.items()]
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise TrainingError(f"{name} is {value!r}, expected a dict from name to file")
    try:
        parse_bank_flags(value)
    except BankError as error:
        raise TrainingError(f"{name}: {error}") from None
    return tuple(value)


_SHARE = _real(lambda x: 0 <= x < 1, "0 to less than 1")
_POSITIVE = _real(lambda x: x > 0, "more than 0")
_COUNT = _whole(1)


def _setting(default: Any, help_: str, check: Check, *, flag: str | None = None) -> Any:
    """A field: what the command line says of it, what it may be, and its flag if not `--name`."""
    return field(default=default, metadata={"help": help_, "check": check, "flag": flag})


@dataclass(frozen=True)
class TrainSettings:
    """One training run. `mmqwen train` has these fields as its options.

    Raises:
        TrainingError: a value that cannot be, by the setting's name.
    """

    model: str = _setting(MISSING, "Composite checkpoint to start from (`mmqwen build`).", _path)
    data: str = _setting(MISSING, "Dataset to learn from (see mmqwen.data).", _path)
    output: str = _setting(
        MISSING, "Checkpoint to write. Beside it, OUTPUT.run keeps checkpoints and logs.", _path
    )
    stage: str = _setting(
        "projector",
        "projector (the language model is frozen), lora (LoRA on it, and the projectors) or full.",
        _one_of(STAGES),
    )
    eval_data: str | None = _setting(
        None,
        "Dataset for evaluation; the checkpoint with its lowest loss becomes the output.",
        _optional(_path),
    )
    banks: tuple[str, ...] = _setting(
        (),
        "NAME=FILE: rows that samples may name, beside the model's own; repeat for more.",
        _banks,
        flag="--bank",
    )
    eval_share: float = _setting(0.0, "Or this share of --data, drawn by --seed.", _SHARE)
    epochs: float = _setting(1.0, "Passes over the data.", _POSITIVE)
    max_steps: int = _setting(-1, "Optimizer steps, instead of epochs.", _whole(-1))
    lr: float | None = _setting(
        None,
        "Peak learning rate; by stage unless given: "
        + ", ".join(f"{stage} {rate:g}" for stage, rate in LEARNING_RATES.items())
        + ".",
        _optional(_POSITIVE),
    )
    tokens_per_step: int | None = _setting(
        None,
        "Tokens of a forward pass on each device, rows counted: samples stand end to end in them. "
        "Unless given, by the GPU's memory and the data's size.",
        _optional(_COUNT),
    )
    accumulation: int = _setting(1, "Forward passes of each device in an optimizer step.", _COUNT)
    overlong: str = _setting(
        "refuse", "Samples of more than --max-length tokens: refuse or cut.", _one_of(OVERLONG)
    )
    max_length: int | None = _setting(
        None,
        "Most tokens of a sample, rows counted; what a pass or the model holds unless given.",
        _optional(_COUNT),
    )
    warmup: float = _setting(
        0.03,
        "Share of the steps in which the learning rate rises.",
        _real(lambda x: 0 <= x < 1, "a share of the steps, 0 to less than 1"),
    )
    schedule: str = _setting("cosine", "Learning-rate schedule, as transformers names it.", _name)
    weight_decay: float = _setting(0.0, "Of AdamW.", _real(lambda x: x >= 0, "at least 0"))
    max_grad_norm: float = _setting(
        1.0,
        "Clip gradients to this norm; 0 does not.",
        _real(lambda x: x >= 0, "at least 0, which does not clip"),
    )
    seed: int = _setting(
        0, "Of the order of samples, the LoRA weights and dropout.", _whole(0, 2**32 - 1)
    )
    bf16: bool = _setting(
        False, "Compute in bfloat16; trained weights are float32 until they are written.", _switch
    )
    gradient_checkpointing: bool = _setting(False, "Less memory, a third more time.", _switch)
    attention: str = _setting(
        "auto",
        "auto, varlen (torch's, CUDA in bfloat16), sdpa, or another of transformers' names.",
        _one_of(ATTENTION),
    )
    compile: bool | None = _setting(
        None, "Compile the decoder layers; unless told, where that pays.", _optional(_switch)
    )
    lean: bool | None = _setting(
        None,
        "Compute more again in compiled layers: some half of the memory, a tenth slower; unless "
        "told, where memory is short.",
        _optional(_switch),
    )
    liger: bool | None = _setting(
        None, "Liger's kernels; unless told, on CUDA where installed.", _optional(_switch)
    )
    save_steps: int | None = _setting(
        None,
        "Steps between checkpoints and evaluations; once an epoch unless given.",
        _optional(_COUNT),
    )
    keep: int = _setting(2, "Checkpoints kept, besides the best.", _COUNT)
    log_steps: int = _setting(10, "Steps between log entries.", _COUNT)
    lora_rank: int = _setting(16, "Rank of LoRA.", _COUNT)
    lora_alpha: int = _setting(32, "Alpha of LoRA.", _COUNT)
    lora_dropout: float = _setting(0.0, "Dropout of LoRA.", _SHARE)
    lora_layers: tuple[str, ...] = _setting(
        LORA_LAYERS, "Linear layer that LoRA adapts; repeat.", _names, flag="--lora-layer"
    )
    merge: bool = _setting(
        True,
        "Merge LoRA, or leave the base as it is and write OUTPUT/adapter for peft and vLLM.",
        _switch,
    )
    workers: int | None = _setting(
        None,
        "Processes that read and encode ahead; by the CPU's cores unless given.",
        _optional(_whole(0)),
    )
    fsdp: str | None = _setting(
        None, "FSDP options of transformers ('full_shard'); without it, DDP.", _optional(_name)
    )
    validate: bool = _setting(True, "Check the whole dataset first.", _switch)
    cpu: bool = _setting(False, "Train on the CPU even where there is a GPU.", _switch)
    progress: bool = _setting(True, "Show a progress bar.", _switch)

    def __post_init__(self) -> None:
        for own in fields(self):
            value = own.metadata["check"](own.name, getattr(self, own.name))
            object.__setattr__(self, own.name, value)
        if Path(self.output).name in ("", ".."):
            raise TrainingError(f"output is {self.output!r}, expected the name of a new directory")
        if self.max_steps == 0:
            raise TrainingError("max_steps is 0, expected at least 1, or -1 to go by epochs")
        if self.eval_data is not None and self.eval_share:
            raise TrainingError("give eval_data or eval_share, not both")
        if self.tokens_per_step and (self.max_length or 0) > self.tokens_per_step:
            raise TrainingError(
                f"max_length is {self.max_length}, expected at most tokens_per_step, "
                f"{self.tokens_per_step}: a sample stands in one pass"
            )

    @property
    def learning_rate(self) -> float:
        """The peak learning rate."""
        return LEARNING_RATES[self.stage] if self.lr is None else self.lr

    @property
    def run_folder(self) -> Path:
        """Where checkpoints and logs go: beside the output, so that both are on one disk."""
        output = Path(self.output)
        return output.with_name(output.name + ".run")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        return json.loads(json.dumps(asdict(self)))
