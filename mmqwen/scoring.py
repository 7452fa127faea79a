"""What generation gives beside text, and the log-probabilities of given continuations.

vLLM offers two ways to them. `prompt_logprobs` runs a prompt with its continuation and reads all of
it, but such a request never takes a prefix from the cache, and computes logits for each of its
tokens. `logprob_token_ids` reads chosen tokens after a prompt: one request for each place where
continuations part or go on, which finds what comes before in the cache. Whichever runs fewer tokens
is taken: the first for one long continuation, the second for many short ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MOST_LABELS = 128
"""Tokens that vLLM reads after one prompt (`MAX_LOGPROB_TOKEN_IDS`, 0.26 to 0.33)."""

PASS_TOKENS = 2048
"""Tokens of continuations in a pass of the transformers model: their logits are all in memory."""


@dataclass(frozen=True)
class Ready:
    """A checked prompt.

    Attributes:
        prompt: what the engine takes.
        length: its tokens, with one per row.
        with_rows: the same with all rows, where `prompt` names some that the engine may have lost.
    """

    prompt: Any
    length: int
    with_rows: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt.

    Attributes:
        text: the text, without special tokens.
        token_ids: its tokens, with the one that ended it.
        finish_reason: `"stop"` or `"length"`.
        logprobs: the log-probability of each token, before temperature and the like; it follows
            from the prompt and the tokens before.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[float]


@dataclass(frozen=True)
class Score:
    """How probable a given continuation is.

    Attributes:
        token_ids: its tokens.
        token_logprobs: the log-probability of each, after the prompt and the tokens before.
    """

    token_ids: list[int]
    token_logprobs: list[float]

    @property
    def logprob(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(self.token_logprobs)

    @property
    def per_token(self) -> float:
        """The mean over its tokens, which does not favour short continuations."""
        return self.logprob / len(self.token_logprobs)


@dataclass(frozen=True)
class Ask:
    """A checked prompt and what may follow it.

    Attributes:
        ready: the prompt.
        continuations: token ids; none is empty.
    """

    ready: Ready
    continuations: list[list[int]]


def plan_reads(continuations: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """What is read after which tokens: for each beginning of a continuation, those that go on."""
    reads: dict[tuple[int, ...], list[int]] = {}
    for tokens in continuations:
        for at, token in enumerate(tokens):
            found = reads.setdefault(tuple(tokens[:at]), [])
            if token not in found:
                found.append(token)
    return reads


def reads_are_cheaper(
    length: int, continuations: Sequence[Sequence[int]], cached_block: int | None
) -> bool:
    """Whether reading token by token runs fewer tokens than running each continuation whole.

    Args:
        length: of the prompt.
        continuations: what may follow it.
        cached_block: tokens of a block of the prefix cache; None where there is no cache.
    """
    whole = sum(length + len(tokens) for tokens in continuations)
    reads = 0
    for path, tokens in plan_reads(continuations).items():
        requests = -(-len(tokens) // MOST_LABELS)
        ran = length + len(path)
        if cached_block is not None:
            reads += ran if not path else 0  # the first one fills the cache
            requests -= not path
            ran -= (ran - 1) // cached_block * cached_block
        reads += requests * ran
    return reads < whole


def score_by_vllm(engine: Any, asks: Sequence[Ask], lora: Any) -> list[list[list[float]]]:
    """For each prompt, the log-probabilities of the tokens of each of its continuations."""
    from vllm import SamplingParams

    config = engine.llm.llm_engine.vllm_config
    cache = config.cache_config
    block = cache.block_size if cache.enable_prefix_caching else None
    fields: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    whole = SamplingParams(**fields, prompt_logprobs=0)
    # A prompt, how it is made with all rows, its parameters, and where the answer goes.
    first: list[tuple[Any, Any, Any, Any]] = []
    later: list[tuple[Any, Any, Any, Any]] = []
    for number, ask in enumerate(asks):
        # With LoRA, logits of a prompt end vLLM 0.32: its adapters expect one row of a sequence.
        may_run_whole = config.lora_config is None
        if may_run_whole and not reads_are_cheaper(ask.ready.length, ask.continuations, block):
            for tokens in ask.continuations:
                first.append((*_longer(ask.ready, tokens), whole, (number, tuple(tokens))))
            continue
        for path, tokens in plan_reads(ask.continuations).items():
            longer = _longer(ask.ready, path)
            for at in range(0, len(tokens), MOST_LABELS):
                labels = tokens[at : at + MOST_LABELS]
                params = SamplingParams(**fields, logprob_token_ids=labels)
                wave = later if path or at else first
                wave.append((*longer, params, (number, path, labels)))
    found: dict[Any, float] = {}  # prompt's number and tokens: the last one's log-probability
    for wave in (first, later):  # the prompts are in the cache when what follows them is asked for
        requests = [(prompt, params, again) for prompt, again, params, _ in wave]
        for index, output in engine.outputs(requests, lora):
            number, path, *labels = wave[index][3]
            if labels:
                (row,) = output.outputs[0].logprobs
                found |= {(number, (*path, t)): row[t].logprob for t in labels[0]}
            else:
                start = asks[number].ready.length
                for at, token in enumerate(path):
                    row = output.prompt_logprobs[start + at]
                    found[number, path[: at + 1]] = row[token].logprob
    return [
        [[found[number, tuple(c[: at + 1])] for at in range(len(c))] for c in ask.continuations]
        for number, ask in enumerate(asks)
    ]


def _longer(ready: Ready, tokens: Sequence[int]) -> tuple[Any, Callable[[], Any] | None]:
    """A prompt with tokens of text behind it, whose rows and their places stay; and the same with
    all rows, where some are named."""

    def add(prompt: Any) -> Any:
        return {**prompt, "prompt_token_ids": [*prompt["prompt_token_ids"], *tokens]}

    again = ready.with_rows
    return add(ready.prompt), None if again is None else lambda: add(again())


def score_by_transformers(model: Any, batch: Any, asked: Sequence[list[int]]) -> list[list[float]]:
    """The log-probabilities of the tokens of each continuation of one prompt.

    Args:
        model: the transformers model.
        batch: the prompt, as the processor's `join` gives it, on the model's device.
        asked: token ids of continuations; none is empty.
    """
    import torch

    from mmqwen.hf.generation import NO_ROWS

    with torch.inference_mode():
        begun = model(**batch, use_cache=True, logits_to_keep=1)
        if not can_branch(begun.past_key_values):
            return [_score_whole(model, batch, tokens) for tokens in asked]
        first = begun.logits[0, -1].float().log_softmax(-1)
        found = [[float(first[tokens[0]])] for tokens in asked]
        length = batch["input_ids"].shape[1]
        longer = [at for at, tokens in enumerate(asked) if len(tokens) > 1]
        for part in _passes(longer, asked):
            ids, mask = _padded([asked[at][:-1] for at in part], length, first.device)
            cache = copy.deepcopy(begun.past_key_values)
            cache.batch_repeat_interleave(len(part))
            logits = model(
                input_ids=ids, attention_mask=mask, past_key_values=cache, embeddings=NO_ROWS
            ).logits
            for row, at in zip(logits, part, strict=True):
                found[at] += _pick(row[: len(asked[at]) - 1], asked[at][1:])
    return found


def can_branch(cache: Any) -> bool:
    """Whether several continuations can go on from one cache: not from a recurrent state, which
    transformers takes up for a single token alone."""
    return all(hasattr(layer, "batch_repeat_interleave") for layer in getattr(cache, "layers", [0]))


def _score_whole(model: Any, batch: Any, tokens: list[int]) -> list[float]:
    """The prompt and one continuation in a pass, without a cache."""
    import torch

    ids = batch["input_ids"]
    more = torch.tensor([tokens[:-1]], dtype=ids.dtype, device=ids.device)
    mask = torch.ones(1, ids.shape[1] + len(tokens) - 1, dtype=ids.dtype, device=ids.device)
    whole = {**batch, "input_ids": torch.cat([ids, more], 1), "attention_mask": mask}
    return _pick(model(**whole, logits_to_keep=len(tokens)).logits[0], tokens)


def _pick(logits: Any, tokens: list[int]) -> list[float]:
    """`[L, V]` logits to the log-probability of each of L tokens."""
    import torch

    targets = torch.tensor(tokens, device=logits.device)
    return logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0].tolist()


def _passes(numbers: Sequence[int], asked: Sequence[list[int]]) -> Iterator[list[int]]:
    """Continuations that run together, by length, so that little is padded."""
    part: list[int] = []
    for at in sorted(numbers, key=lambda number: len(asked[number])):
        if part and (len(part) + 1) * len(asked[at]) > PASS_TOKENS:
            yield part
            part = []
        part.append(at)
    if part:
        yield part


def _padded(rows: Sequence[list[int]], before: int, device: Any) -> tuple[Any, Any]:
    """Ids `[N, L]`, padded on the right, and their mask `[N, before + L]` over a cache too."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * (before + len(r)) + [0] * (width - len(r)) for r in rows])
    return ids, mask.to(device)
