"""Whether a model answers rightly, and whether its rows have a part in it.

Each answer of a dataset is asked for with its rows, with the rows of other samples, and without:
what rows carry is what the first has before the other two.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmqwen.evaluation.controls import CONTROLS
    from mmqwen.evaluation.report import Figures, Report
    from mmqwen.evaluation.run import evaluate

_HOMES = {"CONTROLS": "controls", "Figures": "report", "Report": "report", "evaluate": "run"}

__all__ = ["CONTROLS", "Figures", "Report", "evaluate"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mmqwen.evaluation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mmqwen.evaluation' has no attribute {name!r}")
