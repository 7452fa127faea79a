"""`mmqwen demo`: a small multimodal model, trained here and served by vLLM, on handwritten digits.

`digits` is the data, `train` makes the checkpoint, `run` is the whole demonstration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmqwen.demo.run import run

    from mmqwen.demo.digits import Sample, load, make_tokenizer
    from mmqwen.demo.train import TrainResult, train

__all__ = ["Sample", "TrainResult", "load", "make_tokenizer", "run", "train"]

_HOMES = {
    "Sample": "digits",
    "TrainResult": "train",
    "load": "digits",
    "make_tokenizer": "digits",
    "run": "run",
    "train": "train",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"mmqwen.demo.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
