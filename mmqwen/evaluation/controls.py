"""The controls: a sample with the rows of others, and without rows."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmqwen.evaluation.questions import Question
from mmqwen.modalities import ModalitySpec

CONTROLS = ("rows", "shuffled", "none")
"""With its rows, with rows of other samples in their place, and without."""


def exchange(owned: Sequence[Sequence[Any]], seed: int) -> tuple[list[list[Any]], int]:
    """Give each sample as many items of others as it has.

    Each item goes to exactly one place, so that all are seen as often as before. No sample gets an
    item that it has itself, also where several samples share it, as long as that is possible.

    Args:
        owned: the items of one modality, of each sample: numbers, or what else is hashable.
        seed: of the order.

    Returns:
        The items that each sample gets, and how many of them are still among its own.

    Raises:
        ValueError: a sample has more than half of all places.
    """
    draw = random.Random(seed)
    order = [at for at, items in enumerate(owned) if items]
    draw.shuffle(order)
    places = [(at, item) for at in order for item in owned[at]]
    most = max((len(items) for items in owned), default=0)
    if 2 * most > len(places):
        raise ValueError(f"one sample has {most} of all {len(places)} items")
    # A sample's places stand together: a step over the most that one has leads to another sample.
    given = [places[(at + most) % len(places)][1] for at in range(len(places))]
    own = [set(items) for items in owned]
    kept = 0
    for at, (sample, _) in enumerate(places):
        if given[at] not in own[sample]:
            continue
        start = draw.randrange(len(places))
        for other in (*range(start, len(places)), *range(start)):
            if given[other] not in own[sample] and given[at] not in own[places[other][0]]:
                given[at], given[other] = given[other], given[at]
                break
        else:
            kept += 1
    taken: dict[int, list[Any]] = {}
    for (sample, _), item in zip(places, given, strict=True):
        taken.setdefault(sample, []).append(item)
    return [taken.get(at, []) for at in range(len(owned))], kept


def prompt_of(
    question: Question,
    control: str,
    changed: Collection[str],
    own: Mapping[str, Sequence[Any]],
    others: Mapping[str, Sequence[Any]],
    specs: Mapping[str, ModalitySpec],
    empty: int,
) -> dict[str, Any]:
    """A question as the pipeline takes it; the engine puts as many placeholders as there are rows.

    Args:
        question: the question.
        control: one of `CONTROLS`.
        changed: the modalities that are shuffled or left out.
        own: the sample's items by modality.
        others: what the sample gets in their place.
        specs: the modalities.
        empty: the token that stands for a prompt of which nothing is left.
    """
    gone = {specs[name].token_id for name in changed} if control == "none" else set()
    items: dict[str, list[Any]] = {}
    for name, index in question.items:
        if name not in changed:
            items.setdefault(name, []).append(own[name][index])
        elif control == "shuffled":
            items.setdefault(name, []).append(others[name][index])
    ids = [token for token in question.prompt if token not in gone] or [empty]
    return {"prompt_token_ids": ids, "multi_modal_data": items}
