"""Conversations with rows over the API, and what the reference model says of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from engines import TOLERANCE, reference, rows_of
from malformed import text
from mmqwen.client import embeds_part


def rows(name: str, count: int, seed: int = 0) -> tuple[str, np.ndarray]:
    width = {"m1": 24, "m2": 40}[name]
    values = np.random.default_rng([seed, count, width]).standard_normal((count, width))
    return name, values.astype(np.float32)


class Conversation:
    """Messages, and the items that they hold in order."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.items: dict[str, list[torch.Tensor]] = {}

    def say(self, role: str, *pieces: Any, dtype: str | None = None) -> Conversation:
        content = []
        for piece in pieces:
            if isinstance(piece, str):
                content.append(text(piece))
                continue
            name, values = piece
            content.append(embeds_part(name, values, dtype))
            sent = torch.from_numpy(values).to(getattr(torch, dtype or "float32")).float()
            self.items.setdefault(name, []).append(sent)
        self.messages.append({"role": role, "content": content})
        return self

    def user(self, *pieces: Any, dtype: str | None = None) -> Conversation:
        return self.say("user", *pieces, dtype=dtype)

    def request(self, **fields: Any) -> dict[str, Any]:
        extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
        return {
            "model": "tiny", "messages": self.messages, "max_tokens": 5, "temperature": 0,
            "logprobs": True, "extra_body": extra, **fields,
        }  # fmt: skip

    def check(self, client: Any, checkpoint: Any, **fields: Any) -> Any:
        answer = client.chat.completions.create(**self.request(**fields))
        self.compare(answer, checkpoint)
        return answer

    @torch.no_grad()
    def compare(self, answer: Any, checkpoint: Any, *, greedy: bool = True) -> None:
        """Each token is the reference's best but for rounding, with its log-probability."""
        model = reference(str(checkpoint))
        prompt = list(answer.prompt_token_ids)
        for choice in answer.choices:
            ids = torch.tensor([prompt + list(choice.token_ids)])
            logits = model(ids, embeddings=rows_of(self.items)).logits[0].float()
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 :]
            assert choice.token_ids
            for step, token in enumerate(choice.token_ids):
                if greedy:
                    assert logprobs[step].max() - logprobs[step, token] <= TOLERANCE
                got = choice.logprobs.content[step].logprob
                assert abs(float(logprobs[step, token]) - got) <= TOLERANCE


def still_alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test of a module's `server`, a good request still gets the right answer."""
    if not {"server", "client"} & set(request.fixturenames):
        yield
        return
    server, client, checkpoint = map(request.getfixturevalue, ("server", "client", "checkpoint"))
    yield
    Conversation().user(rows("m1", 3), "still there?").check(client, checkpoint)
    assert server.process.poll() is None
