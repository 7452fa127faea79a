"""Which text models rows were tried beside, and which cannot take rows (standard library only)."""

from __future__ import annotations

from typing import Any

TESTED = frozenset(
    {
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3_text",
        "granite",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Model types whose answers about rows are tested in both engines (docs/text-models.md)."""

_IDS_IN_EVERY_LAYER = (
    "its layers look up token ids, besides the embeddings that they are given, and a row has no id"
)
_REFUSED = {
    "gemma3n_text": _IDS_IN_EVERY_LAYER,
    "gemma4_text": _IDS_IN_EVERY_LAYER,
    "gemma4_unified_text": _IDS_IN_EVERY_LAYER,
}


RECURRENT = frozenset(
    {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid", "hybrid_sliding"}
)
"""What configs call layers that carry a state from token to token."""


def has_recurrent_layers(text_config: Any) -> bool:
    """Whether layers of a text model carry a state from token to token, by its config."""
    fields = ("layer_types", "layers_block_type")
    return any(
        kind in RECURRENT for name in fields for kind in getattr(text_config, name, None) or ()
    )


SAMPLES_APART = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
"""Types whose recurrent layers begin anew with each of the samples that stand end to end."""


def refuse_end_to_end(text_config: Any, *, recurrent: bool | None = None) -> None:
    """Refuse samples end to end for a text model that would carry a state from one to the next.

    Args:
        text_config: of the text model.
        recurrent: whether it carries a state; None: as its config says.

    Raises:
        ValueError: it would.
    """
    if recurrent is None:
        recurrent = has_recurrent_layers(text_config)
    if recurrent and text_config.model_type not in SAMPLES_APART:
        raise ValueError(
            f"text model type {text_config.model_type!r}: its recurrent layers carry a state from "
            "one sample into the next one of a pass, so that it cannot be trained; expected a text "
            f"model without such layers, or one of {', '.join(sorted(SAMPLES_APART))}"
        )


class UntestedTextModelWarning(UserWarning):
    """Rows were never tried beside this type of text model."""


def refuse_text_model(model_type: str) -> None:
    """Refuse a text model beside which rows are known to be answered wrongly.

    Raises:
        ValueError: `model_type` is such a one.
    """
    reason = _REFUSED.get(model_type)
    if reason is not None:
        raise ValueError(
            f"text model type {model_type!r} cannot take rows: {reason}; expected one of "
            f"{', '.join(sorted(TESTED))}"
        )


def untested_warning(model_type: str) -> str | None:
    """What to tell a user of this type of text model; None where it was tested."""
    if model_type in TESTED:
        return None
    return (
        f"text model type {model_type!r} was NEVER TESTED with rows: answers about rows, or the "
        "projectors' training, may be wrong without an error. Before you rely on it, compare "
        "answers to rows that equal token embeddings with answers to those tokens "
        f"(docs/text-models.md). Tested: {', '.join(sorted(TESTED))}"
    )
