"""What a training run is told, and the folder where it keeps what it needs to go on."""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

STAGES = ("projector", "lora", "full")
LEARNING_RATES = {"projector": 1e-3, "lora": 2e-4, "full": 2e-5}
"""Peak learning rate of each stage unless told: those of LLaVA 1.5 (arXiv:2310.03744, and scripts
of its repository) for the projector alone, for LoRA and for all weights."""

LORA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WHOLE: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("batch_size", "accumulation", "keep", "log_steps", "save_steps"), (1, None)),
    **dict.fromkeys(("max_length", "lora_rank", "lora_alpha"), (1, None)),
    "max_steps": (-1, None),
    "workers": (0, None),
    "seed": (0, 2**32 - 1),  # numpy's limits
}
"""Whole numbers: the smallest, and the largest or None."""

_REAL: dict[str, tuple[Callable[[float], bool], str]] = {
    "epochs": (lambda x: x > 0, "more than 0"),
    "lr": (lambda x: x > 0, "more than 0"),
    "eval_share": (lambda x: 0 <= x < 1, "0 to less than 1"),
    "warmup": (lambda x: 0 <= x < 1, "a share of the steps, 0 to less than 1"),
    "weight_decay": (lambda x: x >= 0, "at least 0"),
    "max_grad_norm": (lambda x: x >= 0, "at least 0, which does not clip"),
    "lora_dropout": (lambda x: 0 <= x < 1, "0 to less than 1"),
}
_SWITCHES = ("bf16", "gradient_checkpointing", "merge", "validate", "cpu", "progress")
_OPTIONAL = ("save_steps", "max_length", "lr")
"""Numbers that may be None."""

RUN_FILE = "settings.json"
DATA_RECORD = "datasets.json"


class TrainingError(ValueError):
    """Training cannot start or go on, with the reason and the remedy."""


def _whole(name: str, value: Any) -> int:
    """A setting as an int, numpy's among them."""
    smallest, largest = _WHOLE[name]
    expected = f"at least {smallest}" if largest is None else f"{smallest} to {largest}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TrainingError(f"{name} is {value!r}, expected a whole number, {expected}")
    number = int(value)
    if number < smallest or (largest is not None and number > largest):
        raise TrainingError(f"{name} is {number}, expected {expected}")
    return number


def _real(name: str, value: Any) -> float:
    """A setting as a float."""
    fits, expected = _REAL[name]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TrainingError(f"{name} is {value!r}, expected a number, {expected}")
    number = float(value)
    if not (math.isfinite(number) and fits(number)):
        raise TrainingError(f"{name} is {value}, expected {expected}")
    return number


@dataclass(frozen=True)
class TrainSettings:
    """One training run.

    Attributes:
        model: composite checkpoint to start from (`mmqwen build` makes one).
        data: dataset of `mmqwen.data`.
        output: checkpoint to write. Beside it, `<output>.run` keeps checkpoints and logs.
        stage: "projector" (the language model is frozen), "lora" (LoRA on the language model, and
            the projectors) or "full" (everything).
        eval_data: dataset for evaluation; the checkpoint with its lowest loss becomes the output.
        eval_share: instead, this share of `data`, drawn by `seed`.
        epochs: passes over the data.
        max_steps: optimizer steps; overrides `epochs` if positive.
        lr: peak learning rate; None is the stage's own (`LEARNING_RATES`).
        batch_size: samples per device and forward pass.
        accumulation: forward passes per optimizer step.
        warmup: share of the steps that the learning rate takes to rise.
        schedule: transformers' name of the learning-rate schedule.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        seed: of the order of samples, the LoRA weights and dropout.
        bf16: compute in bfloat16. Trained weights are kept in float32 until they are written.
        gradient_checkpointing: recompute the language model's activations in backward.
        save_steps: steps between checkpoints (and evaluations); None: once an epoch.
        keep: checkpoints kept, besides the best.
        log_steps: steps between log entries.
        max_length: most tokens of a sample, rows counted; None is the model's own limit.
        lora_rank, lora_alpha, lora_dropout: of LoRA.
        lora_layers: names of the linear layers that LoRA adapts.
        merge: add the LoRA weights to the base's. If False, the output keeps the base as it is,
            and `<output>/adapter` holds the LoRA weights, as peft and vLLM read them.
        workers: processes that read data.
        fsdp: FSDP options of transformers ("full_shard auto_wrap"); None is DDP.
        validate: read and check the whole dataset first.
        cpu: train on the CPU even where there is a GPU.
        progress: show a progress bar.
    """

    model: str
    data: str
    output: str
    stage: str = "projector"
    eval_data: str | None = None
    eval_share: float = 0.0
    epochs: float = 1.0
    max_steps: int = -1
    lr: float | None = None
    batch_size: int = 8
    accumulation: int = 1
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int | None = None
    keep: int = 2
    log_steps: int = 10
    max_length: int | None = None
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_layers: tuple[str, ...] = LORA_LAYERS
    merge: bool = True
    workers: int = 0
    fsdp: str | None = None
    validate: bool = True
    cpu: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        value: Any
        for name in ("model", "data", "output", "eval_data"):
            value = getattr(self, name)
            if value is None and name == "eval_data":
                continue
            if not isinstance(value, (str, os.PathLike)) or not str(value):
                raise TrainingError(f"{name} is {value!r}, expected a path")
            object.__setattr__(self, name, str(value))
        if Path(self.output).name in ("", ".."):
            raise TrainingError(f"output is {self.output!r}, expected the name of a new directory")
        layers: Any = self.lora_layers
        if not isinstance(layers, (list, tuple)) or not all(isinstance(n, str) for n in layers):
            raise TrainingError(f"lora_layers is {layers!r}, expected a list of names")
        object.__setattr__(self, "lora_layers", tuple(layers))
        if not all(layers) or not layers:
            raise TrainingError(f"lora_layers is {layers!r}, expected at least one name")
        if self.stage not in STAGES:
            raise TrainingError(f"stage {self.stage!r}, expected one of {STAGES}")
        for name in ("schedule", "fsdp"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name, value) != ("fsdp", None):
                raise TrainingError(f"{name} is {value!r}, expected a name of transformers'")
        for name in (*_WHOLE, *_REAL):
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                read = _whole if name in _WHOLE else _real
                object.__setattr__(self, name, read(name, value))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TrainingError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.max_steps == 0:
            raise TrainingError("max_steps is 0, expected at least 1, or -1 to go by epochs")
        if self.eval_data is not None and self.eval_share:
            raise TrainingError("give eval_data or eval_share, not both")

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


_FREE = {"output", "keep", "log_steps", "workers", "validate", "progress", "save_steps", "merge"}
"""Settings that may differ when a run goes on: they do not change the loss curve."""


def read_settings(folder: Path) -> TrainSettings:
    """The settings of the run that made a folder.

    Raises:
        TrainingError: it is not a run's folder.
    """
    try:
        raw = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return TrainSettings(
            **{f.name: raw[f.name] for f in fields(TrainSettings) if f.name in raw}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder}: not the folder of a training run ({error})") from error


def claim_run_folder(settings: TrainSettings) -> bool:
    """Make the run's folder, or check that it is of a run with the same settings.

    Returns:
        Whether it was made, by `release_run_folder` to be given up if nothing comes of the run.

    Raises:
        TrainingError: it is of another run, or of one whose datasets have been changed since, or
            cannot be written.
    """
    folder = settings.run_folder
    if (folder / RUN_FILE).exists():
        old, new = read_settings(folder).to_dict(), settings.to_dict()
        changed = [k for k in new if k not in _FREE and old[k] != new[k]]
        if changed:
            was = ", ".join(f"{key}={old[key]!r}" for key in changed)
            raise TrainingError(
                f"{folder} holds a run with other settings ({was}); remove it, name another "
                "output, or give the same settings to go on with it"
            )
        _check_datasets(folder, settings)
        return False
    record = _fingerprints(settings)  # first: it leaves no folder where there is no dataset
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / DATA_RECORD, record)
        _write(folder / RUN_FILE, settings.to_dict())
    except OSError as error:
        raise TrainingError(f"cannot write {folder}: {error}") from error
    return True


def release_run_folder(folder: Path) -> None:
    """Give up a folder that was claimed for a run without a checkpoint: there is nothing to go on.

    So the same command may be given again with other settings. Logs are kept where there are any.
    """
    for name in (RUN_FILE, DATA_RECORD):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something
        folder.rmdir()


def _write(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)


def _fingerprints(settings: TrainSettings) -> dict[str, Any]:
    from mmqwen.data.format import fingerprint

    paths = (settings.data, settings.eval_data)
    return {path: fingerprint(path) for path in paths if path is not None}


def _check_datasets(folder: Path, settings: TrainSettings) -> None:
    """See that the files are those that the run began with."""
    record = folder / DATA_RECORD
    try:
        old = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:  # of a version before this record, or removed to go on all the same
        return
    except (OSError, ValueError) as error:
        raise TrainingError(f"{record} cannot be read: {error}") from error
    for path, files in _fingerprints(settings).items():
        before = old.get(path, {})
        changed = sorted(n for n in before.keys() | files if before.get(n) != files.get(n))
        if changed:
            raise TrainingError(
                f"{path} has changed since this run began ({', '.join(changed)}), so that the run "
                f"would go on with other data; name another output to train anew, or remove "
                f"{record} if the content is the same"
            )
