"""A dataset's samples as prompts and what should follow them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmqwen.data import DatasetError, RowsDataset, Sample, encode
from mmqwen.data.encoding import IGNORED
from mmqwen.modalities import ModalitySpec

OWN_CHOICES = "dataset"
"""In the place of a list of choices: each sample's own, of its field `choices`."""

MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Question:
    """One answer of a sample, and what stands before it.

    Attributes:
        where: file and line of the sample.
        sample: its number in the dataset.
        prompt: token ids, with one marker an item.
        items: the modality of each item, in the order of the markers, and its place among the
            sample's items of that modality.
        answer: the tokens that training would have learnt, the end among them.
        expected: the answer's text.
        choices: the texts among which one is chosen; none where it is generated.
        continuations: the tokens of each of them, as of `answer`.
    """

    where: str
    sample: int
    prompt: list[int]
    items: list[tuple[str, int]]
    answer: list[int]
    expected: str
    choices: tuple[str, ...] = ()
    continuations: tuple[list[int], ...] = ()

    @property
    def modalities(self) -> frozenset[str]:
        """Those of its items."""
        return frozenset(name for name, _ in self.items)

    @property
    def right(self) -> int:
        """Which of the choices is the answer."""
        return [choice.strip() for choice in self.choices].index(self.expected.strip())


def read_questions(
    dataset: RowsDataset,
    numbers: Sequence[int],
    tokenizer: Any,
    specs: Mapping[str, ModalitySpec],
    choices: Sequence[str] | str | None = None,
) -> list[Question]:
    """The answers of some samples, with what stands before each of them.

    Args:
        dataset: the dataset.
        numbers: which samples.
        tokenizer: with the placeholder tokens.
        specs: the modalities.
        choices: the texts among which the last answer of each sample is one; `OWN_CHOICES` for
            each sample's own; None where answers are generated. With choices, earlier answers of a
            conversation are not asked for.

    Raises:
        DatasetError: a sample that cannot be read, or whose answer is not among its choices, or
            that has none.
    """
    found: list[Question] = []
    problems: list[str] = []
    known: dict[str, list[int]] = {}
    for number in numbers:
        where = dataset.where(number)
        try:
            sample = dataset.sample(number)
            counts = dataset.counts(sample)
            asked = list(_ask(sample, counts, tokenizer, specs, where, number))
            if choices is not None:
                own = sample.choices if choices == OWN_CHOICES else tuple(choices)
                last = _with_choices(asked[-1], sample, own, counts, tokenizer, specs, known)
                asked = [last]
            found += asked
        except (ValueError, IndexError) as error:
            problems.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
            if len(problems) == MOST_PROBLEMS:
                break
    if problems:
        raise DatasetError(*problems)
    return found


def _ask(
    sample: Sample,
    counts: Mapping[str, Sequence[int]],
    tokenizer: Any,
    specs: Mapping[str, ModalitySpec],
    where: str,
    number: int,
) -> Iterator[Question]:
    """Each answer of a sample; the placeholders of an item become one marker again."""
    encoding = encode(sample, counts, tokenizer, specs)
    ids: list[int] = []
    labels: list[int] = []
    markers: list[tuple[int, tuple[str, int]]] = []
    at = 0
    items = iter(encoding.items)
    placeholders = {spec.token_id for spec in specs.values()}
    while at < len(encoding.token_ids):
        token = encoding.token_ids[at]
        if token in placeholders:
            name, index = next(items)
            markers.append((len(ids), (name, index)))
            at += counts[name][index] - 1
        ids.append(token)
        labels.append(encoding.labels[at])
        at += 1
    at = 0
    for expected in sample.answers():
        begin = next(i for i in range(at, len(ids)) if labels[i] != IGNORED)
        at = next((i for i in range(begin, len(ids)) if labels[i] == IGNORED), len(ids))
        before = [item for place, item in markers if place < begin]
        yield Question(where, number, ids[:begin], before, ids[begin:at], expected)


def _with_choices(
    question: Question,
    sample: Sample,
    choices: Sequence[str],
    counts: Mapping[str, Sequence[int]],
    tokenizer: Any,
    specs: Mapping[str, ModalitySpec],
    known: dict[str, list[int]],
) -> Question:
    """A question with the tokens of each choice, written as the answer is."""
    if not choices:
        raise ValueError(
            "there is no field 'choices'; write one into each sample, or name the choices"
        )
    expected = question.expected
    if expected.strip() not in [choice.strip() for choice in choices]:
        raise ValueError(f"the answer {expected.strip()!r} is not among {list(choices)}")
    lead = expected[: len(expected) - len(expected.lstrip())]
    texts = [lead + choice.strip() for choice in choices]

    def tokens(text: str) -> list[int]:
        if text == expected:
            return question.answer
        if sample.prompt is not None:
            other = replace(sample, answer=text)
        else:
            last = {**sample.messages[-1], "content": text}
            other = replace(sample, messages=(*sample.messages[:-1], last))
        *_, changed = _ask(other, counts, tokenizer, specs, question.where, question.sample)
        if changed.prompt != question.prompt:
            raise ValueError(f"the chat template writes another prompt before {text!r}")
        return changed.answer

    # A template writes an answer alike after whatever prompt; where it does not, the sample's own
    # answer shows it.
    usual = known.setdefault(lead + expected.strip(), question.answer) == question.answer
    if usual:
        continuations = [known[t] if t in known else known.setdefault(t, tokens(t)) for t in texts]
    else:
        continuations = [tokens(text) for text in texts]
    return replace(question, choices=tuple(choices), continuations=tuple(continuations))
