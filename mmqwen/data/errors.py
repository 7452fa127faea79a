"""The one kind of refusal of a dataset."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset that cannot be read or written.

    Attributes:
        problems: each with its file, and its line where it has one.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        lines = "\n  ".join(problems)
        super().__init__(lines if len(problems) == 1 else f"{len(problems)} problems:\n  {lines}")
