"""What an evaluation found: figures, as a table and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TITLES = {"rows": "with rows", "shuffled": "rows shuffled", "none": "without rows"}
ALL = "all"


@dataclass
class Figures:
    """The answers of one kind of prompt.

    Attributes:
        answers: how many there are.
        right: how many of them the model gave, or chose.
        tokens: of the answers, their ends among them.
        logprob: of all these tokens together.
    """

    answers: int = 0
    right: int = 0
    tokens: int = 0
    logprob: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.answers

    @property
    def perplexity(self) -> float:
        """Of the answers: `exp` of the mean loss of their tokens."""
        loss = -self.logprob / self.tokens
        return math.exp(loss) if loss < 700 else math.inf


@dataclass
class Report:
    """What an evaluation found.

    Attributes:
        about: what was evaluated, and how.
        figures: `"all"`, and each modality where there are several kinds of samples, to control
            (`rows`, `shuffled`, `none`) to figures. A modality's own are those of the samples that
            have rows of it; its rows alone are shuffled or left out.
        answers: for each answer, where its sample stands, what was expected, and what was given
            under each control.
        kept: modality to how many of its items, shuffled, went to samples that have them, too.
    """

    about: dict[str, Any]
    figures: dict[str, dict[str, Figures]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    kept: dict[str, int] = field(default_factory=dict)

    def accuracy(self, control: str = "rows", scope: str = ALL) -> float:
        """Share of right answers."""
        return self.figures[scope][control].accuracy

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return {
            **self.about,
            "figures": {
                scope: {control: _plain(figures) for control, figures in found.items()}
                for scope, found in self.figures.items()
            },
            "kept": self.kept,
            "answers": self.answers,
        }

    def write(self, file: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        file = Path(file)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)

    def table(self) -> Any:
        """A `rich` table: a line for each kind of samples and control."""
        from rich.table import Table

        table = Table()
        for title in ("samples", "prompt"):
            table.add_column(title)
        for title in ("answers", "right", "accuracy", "perplexity"):
            table.add_column(title, justify="right")
        for scope, found in self.figures.items():
            for control, one in found.items():
                share = (str(one.right), f"{one.accuracy:.1%}", f"{one.perplexity:.3g}")
                table.add_row(_title(scope), TITLES[control], str(one.answers), *share)
            table.add_section()
        return table


def _title(scope: str) -> str:
    return "all" if scope == ALL else f"with {scope}"


def _plain(figures: Figures) -> Mapping[str, Any]:
    perplexity = figures.perplexity
    return {
        "answers": figures.answers,
        "right": figures.right,
        "accuracy": figures.accuracy,
        "tokens": figures.tokens,
        "perplexity": perplexity if math.isfinite(perplexity) else None,
    }
