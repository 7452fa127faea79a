"""What the files and tensors of a composite checkpoint are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from mmqwen.modalities import ModalitySpec

MODEL_TYPE = "multimodal_qwen3"
ARCHITECTURE = "MultimodalQwen3ForConditionalGeneration"
"""The name under `architectures` in `config.json` that selects the model class."""
HYBRID_ARCHITECTURE = "MultimodalQwen3HybridForConditionalGeneration"
"""That of a text model with recurrent layers beside attention: vLLM asks the class whether there
are any before it reads a config."""
ARCHITECTURES = (ARCHITECTURE, HYBRID_ARCHITECTURE)

PROJECTOR_FILE = "projectors.safetensors"
BANKS_FOLDER = "banks"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
BASE_PREFIX = "base-"
"""The base's shards are `base-*.safetensors`, so that `save_pretrained` into the same directory
never writes through a link into the base."""
SMALL_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Of what a checkpoint has beside its weights."""
SMALL_FILES = (*(f"*{suffix}" for suffix in SMALL_SUFFIXES), "LICENSE*")

BASE_TENSORS = ("model.", "lm_head.")
"""How the tensors of a text model begin, which keep their names."""
NESTED_PREFIX = "model.language_model."
"""What the text model's `model.` is called inside a vision-language checkpoint."""
LEFT_OUT = ("model.visual.", "mtp.")
"""Parts of a base that nothing here reads: its vision tower, its drafter."""
PROJECTOR_PREFIX = "projectors."
_PARTS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
PROJECTOR_PARTS = ("norm.weight", "norm.bias", *_PARTS)
"""All that a projector can consist of; `projector_shapes` says of what one does."""
FIRST_PART = _PARTS[0]
"""What every projector has."""

_Value = TypeVar("_Value")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written, with the reason."""


def projector_tensor(modality: str, part: str = FIRST_PART) -> str:
    """The full name of a projector's tensor; of that of its first layer, which every one has."""
    return f"{PROJECTOR_PREFIX}{modality}.{part}"


def projector_shapes(spec: ModalitySpec, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each part that a projector of this kind has, to a text model's width.

    Args:
        spec: the modality, its `hidden_dim` settled.
        hidden_size: width of the text model.
    """
    kind, dim, hidden = spec.projector, spec.dim, spec.hidden_dim or 0
    sizes = [(hidden_size, dim)] if kind.layers == 1 else [(hidden, dim), (hidden_size, hidden)]
    shapes: dict[str, tuple[int, ...]] = {}
    if kind.norm != "none":
        shapes["norm.weight"] = (dim,)
    if kind.norm == "layer":
        shapes["norm.bias"] = (dim,)
    for at, size in enumerate(sizes):
        shapes[_PARTS[2 * at]] = size
        if kind.bias:
            shapes[_PARTS[2 * at + 1]] = size[:1]
    return shapes


def only_projectors(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Those of a model's tensors that are projectors'."""
    return {name: value for name, value in tensors.items() if name.startswith(PROJECTOR_PREFIX)}
