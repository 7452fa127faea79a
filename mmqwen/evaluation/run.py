"""A checkpoint and a dataset in, figures out."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmqwen._version import __version__
from mmqwen.data import DatasetError, RowsDataset, validate
from mmqwen.data.banks import BankItem, served_banks
from mmqwen.evaluation.controls import CONTROLS, exchange, prompt_of
from mmqwen.evaluation.questions import OWN_CHOICES, Question, read_questions
from mmqwen.evaluation.report import ALL, Figures, Report
from mmqwen.modalities import ModalitySpec
from mmqwen.pipeline import Engine, MultimodalQwen3Pipeline

BATCH = 128
"""Prompts that the engine is handed at a time: their rows are in memory together."""

SPARE_TOKENS = 8
"""An answer may be longer than the longest one expected by so many tokens: what is longer is wrong
in any case."""

_Key = tuple[int, str, frozenset[str]]
"""A question's number, a control, and the modalities that it changes."""


@dataclass(frozen=True)
class _Outcome:
    right: bool
    given: str
    tokens: int
    logprob: float


def evaluate(
    model: str | os.PathLike[str] | MultimodalQwen3Pipeline,
    data: str | os.PathLike[str],
    *,
    engine: Engine = "vllm",
    choices: Sequence[str] | str | None = None,
    per_token: bool = False,
    controls: Sequence[str] = CONTROLS,
    limit: int | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    progress: bool = False,
    banks: Mapping[str, Any] | None = None,
    **pipeline_options: Any,
) -> Report:
    """Ask a model for the answers of a dataset: with rows, with rows of other samples, without.

    An answer is right if the text that the model generates (greedily, what follows a reasoning) is
    the expected one, spaces around it apart. With `choices` it is right if the expected one is the
    most probable among them. Perplexity is that of the tokens that training learns, the end among
    them; placeholders, which are never said, have no share in it.

    Args:
        model: a composite checkpoint, or an open pipeline, which stays open.
        data: a dataset, as `mmqwen train` reads it.
        engine: `"vllm"` or `"transformers"`.
        choices: what the last answer of each sample may be, or `"dataset"`: each sample's own field
            `choices`.
        per_token: choose by the mean log-probability of a choice's tokens, which does not favour
            short ones, instead of by the whole choice's.
        controls: of `CONTROLS`, those that are asked.
        limit: most samples, drawn by `seed`.
        seed: of which rows go where, and of which samples are taken.
        max_tokens: most tokens to generate; the longest answer's and some more by default.
        progress: show a bar.
        banks: files of rows that samples may name, beside the checkpoint's own; an open pipeline
            has its own alone.
        **pipeline_options: of `MultimodalQwen3Pipeline`.

    Raises:
        DatasetError: with file and line: the dataset cannot be read, or its answers are not among
            the choices, or rows cannot be shuffled. Before an engine starts.
        ValueError: an argument is wrong, or a prompt is longer than the model takes.

    Warns:
        UserWarning: some items could not be exchanged, because too many samples share them.
    """
    controls = _check_controls(controls)
    if choices is not None and choices != OWN_CHOICES:
        from mmqwen.data.format import read_choices

        choices = read_choices(choices)
    for name, value in {"limit": limit, "max_tokens": max_tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    tokenizer, specs, served = _read_model(model, banks)
    validate(Path(data), specs, tokenizer=tokenizer, banks=served)
    dataset = RowsDataset(Path(data), specs, served)
    numbers = list(range(len(dataset)))
    if limit is not None and limit < len(numbers):
        numbers = sorted(random.Random(seed).sample(numbers, limit))
    questions = read_questions(dataset, numbers, tokenizer, specs, choices)
    others: Mapping[str, Sequence[Sequence[Any]]] = {}
    kept: dict[str, int] = {}
    if "shuffled" in controls:
        others, kept = _exchange_all(dataset, numbers, specs, seed)
    longest = max(len(question.answer) for question in questions)

    def ask(pipeline: MultimodalQwen3Pipeline) -> Report:
        about = {
            "model": pipeline.model_name,
            "data": os.fspath(data),
            "samples": len(numbers),
            "accuracy_by": "exact match" if choices is None else "choice",
            "per_token": per_token,
            "seed": seed,
            "engine": pipeline.engine,
            "mmqwen": __version__,
        }
        asker = _Asker(
            pipeline,
            dataset,
            questions,
            others,
            {number: place for place, number in enumerate(numbers)},
            per_token=per_token,
            max_tokens=max_tokens or longest + SPARE_TOKENS,
            empty=tokenizer.eos_token_id or 0,
        )
        return asker.run(Report(about, kept=kept), controls, progress)

    if isinstance(model, MultimodalQwen3Pipeline):
        return ask(model)
    options = {**pipeline_options, "banks": banks}
    with MultimodalQwen3Pipeline(model, engine=engine, **options) as pipeline:
        return ask(pipeline)


def _check_controls(controls: Sequence[str]) -> tuple[str, ...]:
    unknown = sorted(set(controls) - set(CONTROLS))
    if isinstance(controls, str) or unknown or not controls:
        raise ValueError(f"controls are {controls!r}, expected some of {list(CONTROLS)}")
    return tuple(control for control in CONTROLS if control in controls)


def _read_model(
    model: Any, banks: Mapping[str, Any] | None
) -> tuple[Any, Mapping[str, ModalitySpec], Mapping[str, Any]]:
    """The tokenizer, the modalities and the banks, without an engine."""
    if isinstance(model, MultimodalQwen3Pipeline):
        if not model.specs:
            raise ValueError("the pipeline knows no modalities yet; give them to it")
        if banks:
            raise ValueError("the pipeline is open: give the banks to it, not to the evaluation")
        return model.tokenizer, model.specs, model.banks
    from transformers import AutoTokenizer

    from mmqwen.checkpoint import read_config
    from mmqwen.hf import MultimodalQwen3Config
    from mmqwen.tokens import add_placeholder_tokens

    folder = Path(model)
    local = folder.exists() or folder.is_absolute()
    config = (
        read_config(folder) if local else MultimodalQwen3Config.from_pretrained(os.fspath(model))
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    add_placeholder_tokens(tokenizer, config.modality_specs)
    return tokenizer, config.modality_specs, served_banks(config, model, banks)


def _exchange_all(
    dataset: RowsDataset, numbers: Sequence[int], specs: Mapping[str, ModalitySpec], seed: int
) -> tuple[dict[str, list[list[Any]]], dict[str, int]]:
    """For each modality, the items that each sample gets of others; how many are still its own."""
    others: dict[str, list[list[Any]]] = {}
    kept: dict[str, int] = {}
    for name in specs:
        owned = [list(dataset.sample(number).items.get(name, ())) for number in numbers]
        if not any(owned):
            continue
        try:
            others[name], still = exchange(owned, seed)
        except ValueError as error:
            raise DatasetError(
                f"{dataset.folder}: rows of {name!r} cannot be shuffled: {error}, which cannot all "
                "go to others; leave 'shuffled' out of the controls, or take more samples"
            ) from None
        if still:
            kept[name] = still
            warnings.warn(
                f"{still} of {sum(map(len, owned))} items of {name!r} cannot be shuffled: most "
                "samples share them",
                stacklevel=3,
            )
    return others, kept


class _Asker:
    """Asks each question under each control, once where two kinds of samples ask the same."""

    def __init__(
        self,
        pipeline: MultimodalQwen3Pipeline,
        dataset: RowsDataset,
        questions: Sequence[Question],
        others: Mapping[str, Sequence[Sequence[Any]]],
        order: Mapping[int, int],
        *,
        per_token: bool,
        max_tokens: int,
        empty: int,
    ) -> None:
        self.pipeline, self.dataset, self.questions = pipeline, dataset, questions
        self.others, self.order = others, order
        self.per_token, self.max_tokens, self.empty = per_token, max_tokens, empty

    def run(self, report: Report, controls: Sequence[str], progress: bool) -> Report:
        keys = {
            (scope, control, number): self._key(number, control, changed)
            for scope, changed in self._scopes().items()
            for control in controls
            for number, question in enumerate(self.questions)
            if scope == ALL or scope in question.modalities
        }
        jobs = list(dict.fromkeys(keys.values()))
        found: dict[_Key, _Outcome] = {}
        for begin in _shown(range(0, len(jobs), BATCH), len(jobs), progress):
            part = jobs[begin : begin + BATCH]
            found.update(zip(part, self._ask(part), strict=True))
        for (scope, control, _), key in keys.items():
            figures = report.figures.setdefault(scope, {}).setdefault(control, Figures())
            outcome = found[key]
            figures.answers += 1
            figures.right += outcome.right
            figures.tokens += outcome.tokens
            figures.logprob += outcome.logprob
        for number, question in enumerate(self.questions):
            given = {control: found[keys[ALL, control, number]].given for control in controls}
            report.answers.append(
                {"where": question.where, "expected": question.expected.strip(), "given": given}
            )
        return report

    def _scopes(self) -> dict[str, frozenset[str]]:
        """Kinds of samples, and the modalities that are changed for each."""
        kinds = {question.modalities for question in self.questions}
        names = [name for name in self.pipeline.specs if any(name in kind for kind in kinds)]
        scopes = {ALL: frozenset(names)}
        if len(kinds) > 1 or len(names) > 1:
            scopes |= {name: frozenset({name}) for name in names}
        return scopes

    def _key(self, number: int, control: str, changed: frozenset[str]) -> _Key:
        changed = changed & self.questions[number].modalities
        if control == "rows" or not changed:
            return number, "rows", frozenset()
        return number, control, changed

    def _ask(self, keys: Sequence[_Key]) -> list[_Outcome]:
        asked = [self.questions[number] for number, _, _ in keys]
        prompts = [self._prompt(*key) for key in keys]
        with_choices = bool(asked[0].choices)
        after = [list(q.continuations) if with_choices else [q.answer] for q in asked]
        scores = self._checked(keys, self.pipeline.score(prompts, after, on_error="return"))
        if with_choices:
            return [self._chosen(q, found) for q, found in zip(asked, scores, strict=True)]
        texts = self.pipeline.generate(prompts, max_tokens=self.max_tokens, on_error="return")
        return [
            _Outcome(
                _said(text) == _said(question.expected),
                _said(text),
                len(score.token_ids),
                score.logprob,
            )
            for question, (score,), text in zip(
                asked, scores, self._checked(keys, texts), strict=True
            )
        ]

    def _chosen(self, question: Question, scores: Sequence[Any]) -> _Outcome:
        values = [score.per_token if self.per_token else score.logprob for score in scores]
        best = values.index(max(values))
        answer = scores[question.right]
        text = question.choices[best].strip()
        return _Outcome(best == question.right, text, len(answer.token_ids), answer.logprob)

    def _checked(self, keys: Sequence[_Key], results: Sequence[Any]) -> Sequence[Any]:
        for (number, control, _), result in zip(keys, results, strict=True):
            if isinstance(result, Exception):
                kind = "" if control == "rows" else f", {control}"
                raise DatasetError(f"{self.questions[number].where}{kind}: {result}") from result
        return results

    def _prompt(self, number: int, control: str, changed: Collection[str]) -> dict[str, Any]:
        question = self.questions[number]
        numbers = self.dataset.sample(question.sample).items
        place = self.order[question.sample]
        own = {name: [self._rows(name, item) for item in items] for name, items in numbers.items()}
        others = {
            name: [self._rows(name, item) for item in self.others[name][place]]
            for name in changed
            if control == "shuffled"
        }
        return prompt_of(question, control, changed, own, others, self.pipeline.specs, self.empty)

    def _rows(self, name: str, item: int | BankItem) -> Any:
        return item.rows if isinstance(item, BankItem) else self.dataset.rows(name, item)


def _said(text: str) -> str:
    """What follows a reasoning, without the spaces around it."""
    return text.rpartition("</think>")[2].strip()


def _shown(steps: Sequence[int], total: int, progress: bool) -> Iterator[int]:
    """The steps, with a bar that moves as they are done."""
    if not progress:
        yield from steps
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("answers", total=total)
        for at, step in enumerate(steps):
            yield step
            bar.update(task, completed=min(total, (at + 1) * BATCH))
