"""The modalities of a served model, read from its config in any vLLM process."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mmqwen.checkpoint.names import ARCHITECTURES
from mmqwen.modalities import ModalityError, ModalitySpec, assign_token_ids, parse_modalities
from mmqwen.tokens import next_token_id

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.config import ModelConfig


def is_ours(model_config: ModelConfig) -> bool:
    """Whether the model that vLLM serves is this package's."""
    found = getattr(model_config.hf_config, "architectures", None) or ()
    return any(name in ARCHITECTURES for name in found)


def text_config_of(hf_config: PretrainedConfig) -> PretrainedConfig:
    """The text model's config: nested in a composite one, or the config itself (`hf_overrides`)."""
    return getattr(hf_config, "text_config", None) or hf_config


def modality_table(
    model_config: ModelConfig, tokenizer: Any = None, *, settle: bool = True
) -> dict[str, ModalitySpec]:
    """All modalities in the order of their indices, with hidden widths and token ids settled.

    A composite checkpoint's config holds the ids. With `hf_overrides` on a plain text model they
    may be left out; then each process gives the same ids, the first ones past the tokenizer's end.

    Args:
        model_config: vLLM's model config.
        tokenizer: the tokenizer, where the caller has it; loaded if needed and not given.
        settle: give hidden widths that were not told; otherwise a projector's file may tell them.

    Raises:
        ModalityError: no modality, a wrong description, or an id beyond the embedding table.
    """
    hf_config = model_config.hf_config
    text = text_config_of(hf_config)
    raw: Mapping[str, Any] = getattr(hf_config, "modalities", None) or {}
    specs = parse_modalities(raw)
    if not specs:
        raise ModalityError(
            "the config names no modalities; build a checkpoint with `mmqwen build`, or pass "
            'hf_overrides={"modalities": {"m1": {"dim": 768}}, ...}'
        )
    if any(spec.token_id is None for spec in specs.values()):
        if tokenizer is None:
            tokenizer = _load_tokenizer(model_config)
        specs = assign_token_ids(specs, tokenizer.get_added_vocab(), next_token_id(tokenizer))
    for spec in specs.values():
        if spec.token_id is not None and spec.token_id >= text.vocab_size:
            raise ModalityError(
                f"modality {spec.name!r}: token id {spec.token_id} lies beyond the embedding "
                f"table's {text.vocab_size} rows; `mmqwen build` makes a checkpoint with more rows"
            )
    if not settle:
        return specs
    return {name: spec.settled(text.hidden_size) for name, spec in specs.items()}


@lru_cache(maxsize=4)
def _load_tokenizer_by_name(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code
    )


def _load_tokenizer(model_config: ModelConfig) -> Any:
    # An unmodified one: the engine's own may have been given the tokens already.
    return _load_tokenizer_by_name(
        model_config.tokenizer, model_config.tokenizer_revision, model_config.trust_remote_code
    )
