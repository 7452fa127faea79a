"""The whole dataset checked before training starts: every error with its file and line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmqwen.data.encoding import encode
from mmqwen.data.errors import DatasetError
from mmqwen.data.format import (
    RowStore,
    Sample,
    check_answers,
    find_folder,
    open_lines,
    read_sample,
    rows_file,
)
from mmqwen.modalities import ModalitySpec, check_marker_count


@dataclass(frozen=True)
class DatasetSummary:
    """What a dataset holds.

    Attributes:
        samples: lines.
        rows: modality to the rows that its file holds.
        longest: tokens of the longest sample, or None where no tokenizer was given.
    """

    samples: int
    rows: dict[str, int]
    longest: int | None = None


def validate(
    path: str | Path,
    specs: Mapping[str, ModalitySpec],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    limit: int = 20,
) -> DatasetSummary:
    """Read a whole dataset once, in constant memory, and check it against the model's modalities.

    Checked are: the fields of each line, empty answers, markers against items, unknown modalities,
    items that are missing, empty or longer than `max_rows`, widths, NaN and infinity; with a
    tokenizer, also the chat template and the length.

    Args:
        path: directory of the dataset.
        specs: the model's modalities.
        tokenizer: the model's tokenizer.
        max_length: most tokens of a sample, rows counted.
        limit: problems to report at most.

    Raises:
        DatasetError: whose `problems` each name file and line.
    """
    return _Validator(find_folder(path), specs, tokenizer, max_length, limit).run()


class _Full(Exception):
    """Enough problems were found."""


class _Validator:
    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, ModalitySpec],
        tokenizer: Any,
        max_length: int | None,
        limit: int,
    ) -> None:
        self.folder, self.specs, self.limit = folder, specs, limit
        self.tokenizer, self.max_length = tokenizer, max_length
        self.problems: list[str] = []
        self.stores: dict[str, RowStore | None] = {}
        self.broken: dict[str, dict[int, int]] = {}  # modality to {item: its first broken row}
        self.longest = 0

    def run(self) -> DatasetSummary:
        lines: Any = open_lines(self.folder)
        try:
            if not len(lines):
                self._report(f"{lines.file}:1: there is no sample")
            for name in self.specs:
                if rows_file(self.folder, name).exists():
                    self._open(name)
            for number, raw in enumerate(lines, start=1):
                self._check_line(raw, f"{lines.file}:{number}")
            for name, items in self.broken.items():  # broken rows that no line uses
                for item, row in items.items():
                    self._report(f"{rows_file(self.folder, name)}: {_not_finite(item, row)}")
        except _Full:
            pass
        if self.problems:
            raise DatasetError(*self.problems)
        rows = {name: store.num_rows for name, store in self.stores.items() if store}
        return DatasetSummary(len(lines), rows, self.longest if self.tokenizer else None)

    def _report(self, problem: str) -> None:
        self.problems.append(problem)
        if len(self.problems) >= self.limit:
            raise _Full

    def _open(self, name: str) -> None:
        """Open a modality's rows and find those that are not finite."""
        self.stores[name] = None
        try:
            store = RowStore(self.folder, name)
        except DatasetError as error:
            self._report(str(error))
            return
        self.stores[name] = store
        broken: dict[int, int] = {}
        for begin, block in store.blocks():
            if bool(block.isfinite().all()):
                continue
            rows = (~block.isfinite()).any(dim=1).nonzero().squeeze(1) + begin
            for row, item in zip(rows.tolist(), store.items_of_rows(rows).tolist(), strict=True):
                broken.setdefault(item, row - store.bounds(item)[0])
            if len(broken) >= self.limit:
                break
        self.broken[name] = broken

    def _check_line(self, raw: bytes | dict[str, Any] | ValueError, where: str) -> None:
        try:
            sample = read_sample(raw)
        except ValueError as error:
            self._report(f"{where}: {error}")
            return
        before = len(self.problems)
        counts: dict[str, list[int]] = {}
        for name, numbers in sample.items.items():
            counts[name] = [self._check_item(name, number, where) for number in numbers]
            if name not in self.specs and not numbers:
                self._report(f"{where}: unknown modality {name!r}")
        for name, spec in self.specs.items():
            markers = sum(text.count(spec.token) for text in sample.questions())
            try:
                check_marker_count(spec, markers, len(sample.items.get(name, ())))
            except ValueError as error:
                self._report(f"{where}: {error}")
        try:
            check_answers(sample, self.specs)
        except ValueError as error:
            self._report(f"{where}: {error}")
        if self.tokenizer is not None and len(self.problems) == before:
            self._check_tokens(sample, {n: c for n, c in counts.items() if c}, where)

    def _check_item(self, name: str, number: int, where: str) -> int:
        """Rows of an item, after reporting what is wrong with it."""
        spec = self.specs.get(name)
        if spec is None:
            self._report(f"{where}: unknown modality {name!r}, expected one of {list(self.specs)}")
            return 0
        if name not in self.stores:
            file = rows_file(self.folder, name)
            self._report(f"{where}: rows of modality {name!r} are missing: there is no {file.name}")
            return 0
        store = self.stores[name]
        if store is None:  # reported when it was opened
            return 1
        what = f"modality {name!r}, item {number}"
        if not 0 <= number < store.num_items:
            self._report(
                f"{where}: {what}: rows are missing; {store.file.name} has {store.num_items} items"
            )
            return 0
        begin, end = store.bounds(number)
        if store.dim != spec.dim:
            self._report(
                f"{where}: {what}: got rows of width {store.dim} in {store.file.name}, expected "
                f"{spec.dim}"
            )
        elif not 0 < end - begin <= spec.max_rows:
            self._report(f"{where}: {what}: got {end - begin} rows, expected 1 to {spec.max_rows}")
        elif number in self.broken[name]:
            row = self.broken[name].pop(number)
            self._report(f"{where}: {store.file.name}: {_not_finite(number, row)}")
        return end - begin

    def _check_tokens(self, sample: Sample, counts: dict[str, list[int]], where: str) -> None:
        try:
            length = len(encode(sample, counts, self.tokenizer, self.specs).token_ids)
        except ValueError as error:
            self._report(f"{where}: {error}")
            return
        self.longest = max(self.longest, length)
        if self.max_length is not None and length > self.max_length:
            self._report(
                f"{where}: {length} tokens with rows, expected at most {self.max_length}; shorten "
                "it, or raise max_length"
            )


def _not_finite(item: int, row: int) -> str:
    return f"item {item}: NaN or Inf in row {row}; check what the encoder returned"
