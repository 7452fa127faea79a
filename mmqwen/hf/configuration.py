"""The composite configuration: a text model's config plus a description of each modality."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from mmqwen.checkpoint.names import ARCHITECTURE, HYBRID_ARCHITECTURE, MODEL_TYPE
from mmqwen.modalities import ModalityError, ModalitySpec, parse_modalities
from mmqwen.text_models import has_recurrent_layers

MIRRORED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of the text config that transformers and vLLM also look for at the top level."""


class MultimodalQwen3Config(PretrainedConfig):
    """Configuration of a text model that takes rows of other modalities beside its tokens.

    Args:
        text_config: config of the text model: a config object, which is copied, or a dict whose
            `model_type` is any that `AutoConfig` knows (`qwen3`, `qwen3_moe`, `qwen2`, ...;
            `qwen3` if it has none). None means `Qwen3Config()`.
        modalities: `{"m1": {"dim": 768, "hidden_dim": 4096, "token": "<|m1|>", "token_id": 151669,
            "max_rows": 1024}}`, in the order that fixes the order of weights. `dim` is required;
            `hidden_dim` is the text model's hidden size unless told. A bare integer is a `dim`.
            What the projector is (`activation`, ...) see `ModalitySpec`; linear, ReLU, linear
            unless told.
        quantization_config: that of the text model. It stands at the top level, where transformers
            and vLLM look for it; one found in `text_config` is moved up.
        **kwargs: the common fields of `PretrainedConfig`. `tie_word_embeddings` and the bos, eos
            and pad ids are always those of `text_config`.

    Raises:
        ModalityError: a modality's description is wrong, or its token id is not a row of the text
            model's embedding table.
        TypeError: `text_config` is neither a dict nor a config.
        ValueError: `text_config` is of a model type that transformers does not know.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        text_config: Mapping[str, Any] | PretrainedConfig | None = None,
        modalities: Mapping[str, Any] | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> None:
        text = _read_text_config(text_config)
        if "quantization_config" in vars(text):
            nested = vars(text).pop("quantization_config")
            quantization_config = nested if quantization_config is None else quantization_config
        self.text_config = text
        specs = _resolve(parse_modalities(modalities or {}), text)
        self.modalities = {name: spec.to_dict() for name, spec in specs.items()}
        for field in MIRRORED:
            kwargs.pop(field, None)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = text.dtype
        if not kwargs.get("architectures"):
            hybrid = has_recurrent_layers(text)
            kwargs["architectures"] = [HYBRID_ARCHITECTURE if hybrid else ARCHITECTURE]
        super().__init__(**kwargs)
        for field in MIRRORED:
            setattr(self, field, getattr(text, field, None))
        if quantization_config is not None:
            self.quantization_config = quantization_config

    @property
    def modality_specs(self) -> dict[str, ModalitySpec]:
        """Each modality's spec, in order, with `hidden_dim` resolved; parsed anew at each call.

        Raises:
            ModalityError: `modalities` was changed to something that does not parse.
        """
        return _resolve(parse_modalities(self.modalities), self.text_config)

    @property
    def vocab_size(self) -> int:
        """Rows of the token-embedding table."""
        return self.text_config.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of a token embedding, which is what the projectors put out."""
        return self.text_config.hidden_size

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> Any:
        """The text model's config, whatever is asked for: there is one text model."""
        return self.text_config

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `architectures` is vLLM's name, not the transformers class's."""
        fields: dict[str, Any] = super().to_dict()
        hybrid = has_recurrent_layers(self.text_config)
        if hybrid and fields.get("architectures") == [ARCHITECTURE]:
            fields["architectures"] = [HYBRID_ARCHITECTURE]
        return fields

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MultimodalQwen3Config):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _read_text_config(raw: Mapping[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    if raw is None:
        return Qwen3Config()
    if isinstance(raw, PretrainedConfig):
        # transformers writes into the configs inside a new one: a model's own would lose its
        # attention implementation, and answer wrongly from then on.
        return copy.deepcopy(raw)
    if not isinstance(raw, Mapping):
        raise TypeError(f"text_config: expected a dict or a config, got {type(raw).__name__}")
    fields = dict(raw)
    model_type = fields.pop("model_type", Qwen3Config.model_type)
    if model_type == MODEL_TYPE:
        raise ValueError(f"text_config: model_type {MODEL_TYPE!r} cannot be nested in itself")
    return AutoConfig.for_model(model_type, **fields)


def _resolve(
    specs: Mapping[str, ModalitySpec], text_config: PretrainedConfig
) -> dict[str, ModalitySpec]:
    resolved = {}
    for name, spec in specs.items():
        if spec.token_id is not None and spec.token_id >= text_config.vocab_size:
            raise ModalityError(
                f"modality {name!r}: token_id is {spec.token_id}, but the text model's embedding "
                f"table has {text_config.vocab_size} rows"
            )
        resolved[name] = spec.settled(text_config.hidden_size)
    return resolved


def is_composite(model_name: str) -> bool:
    """Whether a folder or hub id names a composite checkpoint, not a text model's.

    Raises:
        FileNotFoundError: there is no such model.
    """
    path = Path(model_name)
    if not path.is_dir() and (path.is_absolute() or model_name.startswith((".", "~"))):
        raise FileNotFoundError(f"model folder {model_name} does not exist")
    try:
        config = AutoConfig.from_pretrained(model_name)
    except OSError as error:
        raise FileNotFoundError(f"model {model_name!r} was not found: {error}") from error
    return bool(config.model_type == MODEL_TYPE)
