"""Placeholder tokens and the tokenizer: one rule for every door."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmqwen.modalities import ModalityError, ModalitySpec


def next_token_id(tokenizer: Any) -> int:
    """The id that a tokenizer, as loaded, gives to the next new token: one past the last."""
    added = tokenizer.get_added_vocab().values()
    return max(len(tokenizer), max(added, default=-1) + 1)


def add_placeholder_tokens(tokenizer: Any, specs: Mapping[str, ModalitySpec]) -> int:
    """Teach a tokenizer each modality's placeholder, as a special token with the config's id.

    Changes the tokenizer in place; calling it again changes nothing. Ids are asked of the
    tokenizer itself, never of its vocabulary or length, which vLLM's tokenizers cache.

    Returns:
        How many tokens were new.

    Raises:
        ModalityError: a modality has no token id, or the tokenizer cannot give its token that id:
            the token has another one, the id spells another token, or ids before it are unused.
    """
    from transformers import AddedToken

    unknown = tokenizer.unk_token_id
    missing = []
    for name, spec in specs.items():
        if spec.token_id is None:
            raise ModalityError(f"modality {name!r} has no token_id")
        got = tokenizer.convert_tokens_to_ids(spec.token)
        if got is None or got == unknown:
            missing.append(spec)
        elif got != spec.token_id:
            raise ModalityError(
                f"modality {name!r}: token {spec.token!r} has id {got} in the tokenizer, but "
                f"token_id is {spec.token_id}"
            )
    missing.sort(key=lambda spec: spec.token_id or 0)
    if missing:
        first = next_token_id(tokenizer)
        expected = list(range(first, first + len(missing)))
        given = [spec.token_id for spec in missing]
        if given != expected:
            raise ModalityError(
                f"modalities {[spec.name for spec in missing]}: token_id is {given}, but the "
                f"tokenizer gives new tokens the ids {expected}; leave token_id out to have it "
                "assigned"
            )
        tokenizer.add_tokens(
            [AddedToken(spec.token, normalized=False, special=True) for spec in missing]
        )
    return len(missing)
