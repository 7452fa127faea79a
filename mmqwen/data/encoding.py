"""A sample as token ids and labels: what training and the checks before it share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmqwen.chat import shape_messages
from mmqwen.data.format import Sample, check_answers, check_text
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
    assistant's message is learnt from where its prompt, as served by default, ends, with the token
    by which the template ends its turn.

    Args:
        sample: the sample.
        counts: for each modality that has items, the rows of each.
        tokenizer: with the placeholder tokens.
        specs: the modalities, with their token ids.

    Raises:
        ValueError: an answer has no tokens, or nothing to end it; a text cannot be encoded; the
            chat template refuses the conversation, or it cannot be told where in what it writes an
            answer begins and ends.
        ModalityError: markers and items do not match.
    """
    check_text(sample)
    check_answers(sample, specs)
    if sample.prompt is not None:
        ids, answers = _encode_prompt(sample, tokenizer)
    else:
        text, bounds = _find_answers(sample.messages, tokenizer)
        for spec in specs.values():
            if text.count(spec.token) != sum(q.count(spec.token) for q in sample.questions()):
                raise ValueError(f"the chat template leaves out or repeats a {spec.token}")
        ids, answers = _tokenize(text, bounds, tokenizer)
    learnt = [False] * len(ids)
    for begin, end in answers:
        if end - begin < 2:  # a content and its end
            raise ValueError("an answer has no tokens")
        learnt[begin:end] = [True] * (end - begin)
    expansion = expand_markers(ids, specs, counts)
    placeholders = {spec.token_id for spec in specs.values()}
    flags = iter(f for token, f in zip(ids, learnt, strict=True) if token not in placeholders)
    labels = [
        IGNORED if token in placeholders or not next(flags) else token
        for token in expansion.token_ids
    ]
    return Encoding(expansion.token_ids, labels, expansion.items)


def fit(encoding: Encoding, limit: int | None, *, may_cut: bool) -> Encoding:
    """A sample within `limit` tokens, rows counted.

    Args:
        encoding: of the sample.
        limit: most tokens, or None.
        may_cut: take the first `limit` tokens of a longer one; rows whose placeholders go are left
            out.

    Raises:
        ValueError: it is longer, or, cut, nothing that is learnt is left.
    """
    length = len(encoding.token_ids)
    if limit is None or length <= limit:
        return encoding
    if not may_cut:
        raise ValueError(
            f"{length} tokens with rows, expected at most {limit}; shorten it, raise max_length, "
            "or let it be cut (overlong)"
        )
    labels = encoding.labels[:limit]
    if all(label == IGNORED for label in labels):
        raise ValueError(f"no answer begins in its first {limit} tokens, so that it cannot be cut")
    return Encoding(encoding.token_ids[:limit], labels, encoding.items)


def stop_ids(tokenizer: Any) -> list[int]:
    """The tokens that training teaches as ends: of a sequence, and of a turn of the chat template.

    Where the template's end cannot be told, no conversation can be learnt, and it is left out.
    """
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        turn = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        try:
            text, ((_, end),) = _find_answers(turn, tokenizer)
        except ValueError:
            return found
        found.append(tokenizer(text[:end], add_special_tokens=False)["input_ids"][-1])
    return list(dict.fromkeys(found))


def _encode_prompt(sample: Sample, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a prompt, its answer and the end, and the bounds of what is learnt."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError(
            "the tokenizer has no eos_token, so that no end of an answer could be learnt; name one "
            "in the model's tokenizer_config.json"
        )
    prompt = list(tokenizer(sample.prompt)["input_ids"])
    answer = list(tokenizer(sample.answer, add_special_tokens=False)["input_ids"])
    if answer[-1:] != [end]:  # an answer may spell its end
        answer.append(end)
    return prompt + answer, [(len(prompt), len(prompt) + len(answer))]


# -- conversations -----------------------------------------------------------------------------


def _find_answers(
    messages: Sequence[Mapping[str, str]], tokenizer: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it each answer begins and ends, with its turn's end.

    An answer begins where the prompt of its turn, as served, ends. Where it ends is seen from a
    second rendering, in which another text stands in its place: what follows that text follows the
    answer too. So nothing is looked up by what it says.
    """

    def render(upto: Sequence[Mapping[str, str]], prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                list(upto), tokenize=False, add_generation_prompt=prompt
            )
        except Exception as error:  # a template may raise anything
            raise ValueError(f"the chat template refuses the conversation: {error}") from error

    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template; write samples with 'prompt' and 'answer'"
        )
    shaped = shape_messages(tokenizer, messages)
    whole = render(shaped, False)
    other = "answer0"  # letters that templates leave alone, and that stand nowhere else
    while other in whole:
        other += "0"
    ending = ""
    bounds: list[tuple[int, int]] = []
    upto, is_prompt, text = len(messages), False, whole  # from the last answer to the first
    for index in range(len(messages) - 1, -1, -1):
        if messages[index]["role"] != "assistant":
            continue
        before = render(shaped[:index], True)
        if not text.startswith(before):
            raise ValueError(_rewritten(index))
        changed = shaped[:upto]
        (changed[index],) = shape_messages(tokenizer, [{**messages[index], "content": other}])
        _, *rest = render(changed, is_prompt)[len(before) :].split(other)
        begin, end = len(before), len(text) - len("".join(rest))
        if len(rest) != 1 or end <= begin or not text.endswith(rest[0]):
            raise ValueError(
                f"it cannot be told where message {index} ends in what the chat template makes of "
                "it; use 'prompt' and 'answer'"
            )
        if not bounds:
            ending = _turn_end(rest[0], tokenizer)
        elif not (
            text[begin:end].rstrip().endswith(messages[index]["content"].strip())
            or render(shaped[: index + 1], False).startswith(text[:end])
        ):
            raise ValueError(_rewritten(index))  # a reasoning that is kept for the last turn only
        elif not rest[0].startswith(ending):
            raise ValueError(
                f"the chat template does not end message {index} by {ending!r}, as the last one; "
                "split the conversation, one sample for each answer"
            )
        bounds.append((begin, end + len(ending)))
        upto, is_prompt, text = index, True, before
    return whole, bounds[::-1]


def _rewritten(index: int) -> str:
    return (
        f"the chat template rewrites earlier messages, so that message {index} has no place of its "
        "own: what is served before it is not how the conversation begins; split the conversation, "
        "or use 'prompt'"
    )


def _turn_end(rest: str, tokenizer: Any) -> str:
    """What the template writes after the last answer, up to the first token that may stop a server.

    That is a special token, whichever the tokenizer's own end of sequence is; where there is none,
    another token that was added to the vocabulary.
    """
    added = {*tokenizer.get_added_vocab().values(), tokenizer.eos_token_id}
    ids = [i for i in tokenizer(rest, add_special_tokens=False)["input_ids"] if i in added]
    special = [i for i in ids if not tokenizer.decode([i], skip_special_tokens=True)]
    for token in (*special, *ids):
        spelling = tokenizer.convert_ids_to_tokens(token)
        if spelling in rest:
            return rest[: rest.index(spelling) + len(spelling)]
    raise ValueError(
        f"the chat template ends an answer by {rest!r}, which holds no special token of the "
        "tokenizer, so that a server could not know where an answer ends; use a template that ends "
        "a turn by a token, or 'prompt' and 'answer'"
    )


def _tokenize(
    text: str, bounds: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and bounds in characters as bounds in tokens.

    The ids are those of the whole text, but that no token reaches over a bound: where one would,
    the text is cut there, since a prompt is served without the answer that follows it.
    """

    def tokens(begin: int, end: int | None = None) -> list[int]:
        return list(tokenizer(text[begin:end], add_special_tokens=False)["input_ids"])

    ids: list[int] = []  # of what stands before `start`; `left` are those of what follows
    start, left = 0, tokens(0)
    places: list[tuple[int, int]] = []
    for begin, end in bounds:
        head = tokens(start, begin)
        if left[: len(head)] != head:
            ids, start, left, head = ids + head, begin, tokens(begin), []
        first = len(ids) + len(head)
        # A turn ends by a token of its own, so that what follows can be tokenized for itself; to
        # see that it can costs less than to tokenize all before it once more.
        rest = tokens(end)
        upto = left[: len(left) - len(rest)]
        ids += upto if upto + rest == left else tokens(start, end)
        start, left = end, rest
        places.append((first, len(ids)))
    return ids + left, places
