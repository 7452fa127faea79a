"""A sample as token ids and labels: what training and the checks before it share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmqwen.data.format import Sample
from mmqwen.modalities import ModalitySpec, expand_markers

IGNORED = -100
"""Label of a position that is not learnt."""


@dataclass(frozen=True)
class Encoding:
    """One sample, tokenized.

    Attributes:
        token_ids: prompt, placeholders and answers.
        labels: the ids of answers; `IGNORED` elsewhere.
        items: (modality, index among that modality's items), in the order of the placeholders.
    """

    token_ids: list[int]
    labels: list[int]
    items: list[tuple[str, int]]


def encode(
    sample: Sample,
    counts: Mapping[str, Sequence[int]],
    tokenizer: Any,
    specs: Mapping[str, ModalitySpec],
) -> Encoding:
    """Tokenize a sample as serving would, and say which tokens are learnt.

    A prompt is tokenized alone, as it will be when it is served, then its answer, then the end of
    sequence, which is learnt too. A conversation is rendered by the tokenizer's chat template; each
    assistant's message is learnt from where its prompt ends, with the token that ends its turn.

    Args:
        sample: the sample.
        counts: for each modality that has items, the rows of each.
        tokenizer: with the placeholder tokens.
        specs: the modalities, with their token ids.

    Raises:
        ValueError: an answer has no tokens; the chat template rewrites earlier messages, so that a
            conversation's prompt is not the beginning of the conversation.
        ModalityError: markers and items do not match.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    if sample.prompt is not None:
        ids = list(tokenizer(sample.prompt)["input_ids"])
        learnt = [False] * len(ids)
        answer = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        _check_answer(answer)
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        ids += answer
        learnt += [True] * len(answer)
    else:
        for text, is_answer in _split_conversation(sample.messages, tokenizer):
            part = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            if is_answer:
                _check_answer(part)
            ids += part
            learnt += [is_answer] * len(part)
    expansion = expand_markers(ids, specs, counts)
    placeholders = {spec.token_id for spec in specs.values()}
    flags = iter(f for token, f in zip(ids, learnt, strict=True) if token not in placeholders)
    labels = [
        IGNORED if token in placeholders or not next(flags) else token
        for token in expansion.token_ids
    ]
    return Encoding(expansion.token_ids, labels, expansion.items)


def _check_answer(ids: Sequence[int]) -> None:
    if not ids:
        raise ValueError("an answer has no tokens")


def _split_conversation(
    messages: Sequence[Mapping[str, str]], tokenizer: Any
) -> list[tuple[str, bool]]:
    """Pieces of the rendered conversation, each with whether it is learnt."""

    def render(upto: Sequence[Mapping[str, str]], prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            list(upto), tokenize=False, add_generation_prompt=prompt
        )

    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; write samples with 'prompt' and 'answer'"
        )
    whole = render(messages, False)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(messages[:index], True)
        content = message["content"].strip()
        found = whole.find(content, len(before))
        if not whole.startswith(before) or len(before) < done or found < 0:
            raise ValueError(
                "the chat template rewrites earlier messages, so that message "
                f"{index} has no place of its own; split the conversation, or use 'prompt'"
            )
        end = found + len(content)
        stop = tokenizer.eos_token
        if stop and whole.startswith(stop, end):
            end += len(stop)
        pieces += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return pieces
