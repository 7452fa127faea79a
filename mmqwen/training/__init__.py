"""Training: from encoder outputs to a checkpoint that `LLM(model=...)` serves.

`train(TrainSettings(model=..., data=..., output=...))` runs transformers' Trainer over a dataset of
`mmqwen.data` and writes a composite checkpoint. See docs/training.md. Names are resolved on first
use, so that the command line starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmqwen.training.collator import Collator
    from mmqwen.training.config import STAGES, TrainingError, TrainSettings
    from mmqwen.training.run import export, train

_HOMES = {
    "Collator": "mmqwen.training.collator",
    "STAGES": "mmqwen.training.config",
    "TrainSettings": "mmqwen.training.config",
    "TrainingError": "mmqwen.training.config",
    "export": "mmqwen.training.run",
    "train": "mmqwen.training.run",
}

__all__ = ["STAGES", "Collator", "TrainSettings", "TrainingError", "export", "train"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mmqwen.training' has no attribute {name!r}")
