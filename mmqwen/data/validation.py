"""The whole dataset checked before training starts: every error with its file and line."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmqwen.banks import BankError
from mmqwen.data.banks import BankItem, DatasetBanks
from mmqwen.data.dataset import RowsDataset
from mmqwen.data.encoding import encode, fit
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
        used: modalities that some sample has an item of.
        lengths: tokens of each sample, rows counted (at most `max_length` where samples may be
            cut), or None where no tokenizer was given.
        banks: the banks that samples name, and their versions.
    """

    samples: int
    rows: dict[str, int]
    used: frozenset[str] = frozenset()
    lengths: Sequence[int] | None = None
    banks: dict[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sample, or None where no tokenizer was given."""
        return max(self.lengths) if self.lengths else None


def validate(
    path: str | Path,
    specs: Mapping[str, ModalitySpec],
    *,
    tokenizer: Any = None,
    max_length: int | None = None,
    may_cut: bool = False,
    limit: int = 20,
    banks: Mapping[str, Any] | None = None,
) -> DatasetSummary:
    """Read a whole dataset once, in constant memory, and check it against the model's modalities.

    Checked are: the fields of each line, empty answers, markers against items, unknown modalities,
    items that are missing, empty or longer than `max_rows`, widths, NaN and infinity; the banks,
    ids and keys that items name; with a tokenizer, also the chat template and the length.

    Args:
        path: directory of the dataset.
        specs: the model's modalities.
        tokenizer: the model's tokenizer.
        max_length: most tokens of a sample, rows counted.
        may_cut: longer samples are to be cut, and refused only where no answer would be left.
        limit: problems to report at most.
        banks: those that samples may name, by name: files, or as a config has them.

    Raises:
        DatasetError: whose `problems` each name file and line.
        BankError: `banks` cannot be read.
    """
    opened = DatasetBanks(banks, specs)
    return _Validator(find_folder(path), specs, tokenizer, max_length, may_cut, limit, opened).run()


def measure(
    path: str | Path,
    specs: Mapping[str, ModalitySpec],
    tokenizer: Any,
    *,
    max_length: int | None = None,
    may_cut: bool = False,
    banks: Mapping[str, Any] | None = None,
) -> DatasetSummary:
    """What `validate` says of a dataset that is taken to be right: rows are not read.

    Raises:
        DatasetError: with file and line, at the first sample that cannot be encoded.
        BankError: `banks` cannot be read.
    """
    dataset = RowsDataset(path, specs, banks)
    lengths = array("l")
    used: set[str] = set()
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        try:
            counts = dataset.counts(sample)
            encoding = fit(encode(sample, counts, tokenizer, specs), max_length, may_cut=may_cut)
        except (ValueError, IndexError) as error:
            raise DatasetError(f"{dataset.where(index)}: {error}") from None
        lengths.append(len(encoding.token_ids))
        used |= counts.keys()
    return DatasetSummary(len(dataset), {}, frozenset(used), lengths, dataset.banks.versions)


class _Full(Exception):
    """Enough problems were found."""


class _Validator:
    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, ModalitySpec],
        tokenizer: Any,
        max_length: int | None,
        may_cut: bool,
        limit: int,
        banks: DatasetBanks,
    ) -> None:
        self.folder, self.specs, self.limit = folder, specs, limit
        self.tokenizer, self.max_length, self.may_cut = tokenizer, max_length, may_cut
        self.banks = banks
        self.broken_banks: set[str] = set()
        self.problems: list[str] = []
        self.stores: dict[str, RowStore | None] = {}
        self.broken: dict[str, dict[int, int]] = {}  # modality to {item: its first broken row}
        self.lengths = array("l")
        self.used: set[str] = set()

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
        lengths = None if self.tokenizer is None else self.lengths
        used = frozenset(self.used)
        return DatasetSummary(len(lines), rows, used, lengths, self.banks.versions)

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
        self.used |= {name for name, numbers in sample.items.items() if numbers}
        for name, numbers in sample.items.items():
            counts[name] = [self._check_item(name, n, at, where) for at, n in enumerate(numbers)]
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

    def _check_item(self, name: str, number: int | BankItem, index: int, where: str) -> int:
        """Rows of an item, after reporting what is wrong with it."""
        spec = self.specs.get(name)
        if spec is None:
            self._report(f"{where}: unknown modality {name!r}, expected one of {list(self.specs)}")
            return 0
        if isinstance(number, BankItem):
            return self._check_named(name, number, index, where)
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

    def _check_named(self, name: str, item: BankItem, index: int, where: str) -> int:
        """The same of rows of a bank, a broken one of which is reported once."""
        try:
            return len(self.banks.read(item, name, index).ids)
        except BankError as error:
            if str(error) not in self.broken_banks:
                self.broken_banks.add(str(error))
                self._report(f"{where}: {error}")
            return 1
        except ValueError as error:
            self._report(f"{where}: {error}")
            return 0

    def _check_tokens(self, sample: Sample, counts: dict[str, list[int]], where: str) -> None:
        try:
            encoding = encode(sample, counts, self.tokenizer, self.specs)
            encoding = fit(encoding, self.max_length, may_cut=self.may_cut)
        except ValueError as error:
            self._report(f"{where}: {error}")
            return
        self.lengths.append(len(encoding.token_ids))


def _not_finite(item: int, row: int) -> str:
    return f"item {item}: NaN or Inf in row {row}; check what the encoder returned"
