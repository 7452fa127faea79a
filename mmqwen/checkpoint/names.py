"""What the files and tensors of a composite checkpoint are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

MODEL_TYPE = "multimodal_qwen3"
ARCHITECTURE = "MultimodalQwen3ForConditionalGeneration"
"""The name under `architectures` in `config.json` that selects the model class."""

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
PROJECTOR_PREFIX = "projectors."
PROJECTOR_PARTS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")

_Value = TypeVar("_Value")


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written, with the reason."""


def projector_tensor(modality: str, part: str = PROJECTOR_PARTS[0]) -> str:
    """The full name of a projector's tensor; of its first one, which every projector has."""
    return f"{PROJECTOR_PREFIX}{modality}.{part}"


def projector_shapes(dim: int, hidden_dim: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """The shape of each of `PROJECTOR_PARTS`, from rows `dim` wide to a text model's width."""
    shapes = ((hidden_dim, dim), (hidden_dim,), (hidden_size, hidden_dim), (hidden_size,))
    return dict(zip(PROJECTOR_PARTS, shapes, strict=True))


def only_projectors(tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """Those of a model's tensors that are projectors'."""
    return {name: value for name, value in tensors.items() if name.startswith(PROJECTOR_PREFIX)}
