"""Which samples a run learns from, how long each is, and how many tokens a pass holds.

Measured once, when a run begins, and kept in its folder: where it goes on, on another GPU perhaps,
its passes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Subset

from mmqwen.banks import BankSpec, parse_bank_flags
from mmqwen.data import DatasetError, Example, RowsDataset, measure, validate
from mmqwen.data.banks import served_banks
from mmqwen.modalities import ModalitySpec
from mmqwen.training.config import TrainingError, TrainSettings
from mmqwen.training.packing import PackedSampler
from mmqwen.training.run_folder import PLAN_FILE


@dataclass(frozen=True)
class RunPlan:
    """What a run's passes are made of.

    Attributes:
        tokens: of a pass.
        lengths: tokens of each training sample, `[n]` int64.
        eval_lengths: of each sample of the evaluation, or None where there is none.
        used: modalities that the training samples have rows of.
        banks: the banks that samples name, and their versions.
    """

    tokens: int
    lengths: torch.Tensor
    eval_lengths: torch.Tensor | None
    used: frozenset[str]
    banks: dict[str, str] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        parts = [self.lengths, self.eval_lengths]
        return max(int(part.max()) for part in parts if part is not None)

    def write(self, folder: Path) -> None:
        """Keep it in a run's folder.

        Raises:
            TrainingError: it cannot be written.
        """
        tensors = {"train": self.lengths}
        if self.eval_lengths is not None:
            tensors["eval"] = self.eval_lengths
        about = {"tokens": str(self.tokens), "used": json.dumps(sorted(self.used))}
        about["banks"] = json.dumps(self.banks)
        try:
            save_file(tensors, folder / PLAN_FILE, metadata=about)
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"cannot write {folder / PLAN_FILE}: {error}") from error

    @classmethod
    def read(cls, folder: Path) -> RunPlan:
        """That of a run's folder.

        Raises:
            TrainingError: there is none that can be read.
        """
        file = folder / PLAN_FILE
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata()
                found = {name: opened.get_tensor(name) for name in list(opened.keys())}
            used = frozenset(json.loads(about["used"]))
            banks = json.loads(about.get("banks", "{}"))
            return cls(int(about["tokens"]), found["train"], found.get("eval"), used, banks)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise TrainingError(f"{file} cannot be read: {error}; remove {folder}") from error

    def check(self, samples: int, eval_samples: int | None) -> None:
        """See that the datasets have as many samples as when they were measured.

        Raises:
            TrainingError: they have not.
        """
        begun = len(self.lengths), 0 if self.eval_lengths is None else len(self.eval_lengths)
        if begun != (samples, eval_samples or 0):
            raise TrainingError(
                f"this run began with {begun[0]} samples and {begun[1]} of evaluation, got "
                f"{samples} and {eval_samples or 0}; name another output to train anew"
            )

    def passes(self, settings: TrainSettings, rank: int, world: int) -> PackedSampler:
        """The training passes of one process."""
        bins = -(-int(self.lengths.sum()) // self.tokens)
        epochs = settings.epochs
        if settings.max_steps > 0:
            epochs = settings.max_steps * settings.accumulation * world / bins
        return PackedSampler(
            self.lengths.tolist(),
            self.tokens,
            seed=settings.seed,
            epochs=max(1, -int(-epochs // 1)),
            accumulation=settings.accumulation,
            rank=rank,
            world=world,
        )

    def eval_passes(self, rank: int, world: int) -> PackedSampler | None:
        """The passes of an evaluation of one process."""
        if self.eval_lengths is None:
            return None
        return PackedSampler(self.eval_lengths.tolist(), self.tokens, rank=rank, world=world)


Samples = RowsDataset | Subset[Example]


def banks_of(settings: TrainSettings, config: Any) -> dict[str, BankSpec]:
    """The banks that samples may name: the model's, and those of the settings.

    Args:
        settings: of the run.
        config: of its model.

    Raises:
        BankError: one cannot be read.
    """
    return served_banks(config, settings.model, parse_bank_flags(settings.banks))


def open_data(
    settings: TrainSettings, config: Any, plan: RunPlan
) -> tuple[Samples, Samples | None]:
    """The samples to learn from, and those of the evaluation, if any.

    Args:
        settings: of the run.
        config: of its model.
        plan: of the run; banks must have the versions that they had when it was made.

    Raises:
        DatasetError: a dataset cannot be opened, or is empty.
        BankError: a bank that samples name is gone, or another one by now.
        TrainingError: the evaluation's share leaves one side empty.
    """
    banks = {
        name: replace(spec, version=plan.banks.get(name, spec.version))
        for name, spec in banks_of(settings, config).items()
    }

    def open_dataset(path: str) -> RowsDataset:
        dataset = RowsDataset(path, config.modality_specs, banks)
        if not len(dataset):
            raise DatasetError(f"{path}: there is no sample")
        for name in plan.banks:
            dataset.banks.require(name)
        return dataset

    whole = open_dataset(settings.data)
    if settings.eval_data is not None:
        return whole, open_dataset(settings.eval_data)
    train_part, eval_part = _split(settings, len(whole))
    if not eval_part:
        return whole, None
    return Subset(whole, train_part), Subset(whole, eval_part)


def make_plan(
    settings: TrainSettings,
    config: Any,
    tokenizer: Any,
    limit: int | None,
    default_tokens: Any,
) -> RunPlan:
    """Check and measure the datasets.

    Args:
        settings: of the run.
        config: of its model.
        tokenizer: the model's.
        limit: most tokens of a sample, or None.
        default_tokens: what a pass holds where the settings do not say, by the lengths.

    Raises:
        DatasetError: with file and line.
        TrainingError: the evaluation's share leaves one side empty.
    """
    may_cut = settings.overlong == "cut"
    specs: Mapping[str, ModalitySpec] = config.modality_specs
    banks = banks_of(settings, config)
    versions: dict[str, str] = {}

    def lengths_of(path: str) -> tuple[torch.Tensor, frozenset[str]]:
        how: dict[str, Any] = {"tokenizer": tokenizer, "max_length": limit, "may_cut": may_cut}
        how["banks"] = banks
        found = validate(path, specs, **how) if settings.validate else measure(path, specs, **how)
        if not found.lengths:
            raise DatasetError(f"{path}: there is no sample")
        versions.update(found.banks)
        return torch.tensor(found.lengths, dtype=torch.int64), found.used

    lengths, used = lengths_of(settings.data)
    eval_lengths = None
    if settings.eval_data is not None:
        eval_lengths = lengths_of(settings.eval_data)[0]
    else:
        train_part, eval_part = _split(settings, len(lengths))
        if eval_part:
            lengths, eval_lengths = lengths[train_part], lengths[eval_part]
    tokens = settings.tokens_per_step
    if tokens is None:
        tokens = default_tokens(lengths.tolist())
        if eval_lengths is not None:
            tokens = max(tokens, int(eval_lengths.max()))
    return RunPlan(tokens, lengths, eval_lengths, used, versions)


def _split(settings: TrainSettings, samples: int) -> tuple[list[int], list[int]]:
    """Samples to learn from, and those held out by `eval_share`."""
    held_out = round(samples * settings.eval_share)
    if settings.eval_share and not 0 < held_out < samples:
        raise TrainingError(
            f"eval_share {settings.eval_share} of {samples} samples leaves one side empty"
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(settings.seed))
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())
