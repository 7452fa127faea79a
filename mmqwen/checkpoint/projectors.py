"""Projectors as tensors in files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmqwen.checkpoint.index import read_header, read_index
from mmqwen.checkpoint.names import (
    BASE_TENSORS,
    INDEX_FILE,
    PROJECTOR_FILE,
    PROJECTOR_PARTS,
    PROJECTOR_PREFIX,
    SINGLE_FILE,
    CheckpointError,
    only_projectors,
    projector_shapes,
    projector_tensor,
)
from mmqwen.checkpoint.trained import trained_metadata
from mmqwen.modalities import ModalitySpec

SPECS_KEY = "mmqwen.projectors"


def load_projectors(
    path: str | Path,
    specs: Mapping[str, ModalitySpec],
    hidden_size: int,
    *,
    require_all: bool = True,
) -> dict[str, Tensor]:
    """Read projectors under their full names, `projectors.<name>.linear_1.weight` and so on.

    Args:
        path: a safetensors file, or the directory of a composite checkpoint. Names may lack
            `projectors.`; with a single modality also `<name>.`.
        specs: the modalities wanted. Where `hidden_dim` is None, the file's is taken.
        hidden_size: width of the text model.
        require_all: whether a modality that the file lacks altogether is an error.

    Returns:
        For each modality, `linear_1.weight` `[hidden_dim, dim]`, `linear_1.bias` `[hidden_dim]`,
        `linear_2.weight` `[hidden_size, hidden_dim]`, `linear_2.bias` `[hidden_size]`, in the
        file's dtype.

    Raises:
        CheckpointError: the file cannot be read, a tensor is missing, unknown, of the wrong shape
            or dtype, or holds NaN or infinity.
    """
    found: dict[str, Tensor] = {}
    for file, key in _projector_keys(Path(path)):
        name = _full_name(key, specs, file)
        if name in found:
            raise CheckpointError(f"{file}: tensor {name} appears twice")
        try:
            with safe_open(file, framework="pt") as handle:
                found[name] = handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    result: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if not (require_all or any(projector_tensor(name, p) in found for p in PROJECTOR_PARTS)):
            continue
        first = found.get(projector_tensor(name))
        hidden = spec.hidden_dim or (first.shape[0] if first is not None and first.ndim else 0)
        for part, shape in projector_shapes(spec.dim, hidden, hidden_size).items():
            full = projector_tensor(name, part)
            tensor = found.get(full)
            if tensor is None:
                raise CheckpointError(f"{path}: tensor {full} is missing")
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{path}: tensor {full} has shape {list(tensor.shape)}, expected {list(shape)}"
                )
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise CheckpointError(
                    f"{path}: tensor {full} ({tensor.dtype}) is not floating-point and finite"
                )
            result[full] = tensor
    return result


def save_projectors(
    projectors: torch.nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    trained: Mapping[str, bool] | None = None,
    specs: Mapping[str, ModalitySpec] | None = None,
) -> Path:
    """Write projectors to a safetensors file, whole or not at all.

    Args:
        projectors: a model with `projectors.*` weights, or a mapping that holds them; its other
            tensors are left out.
        path: a file, or a directory in which `projectors.safetensors` is written.
        trained: modality to whether its projector was ever trained, for the file's metadata;
            what is not known is left out. None asks the model.
        specs: what the projectors are, for the file's metadata.

    Raises:
        CheckpointError: there are no projectors, or the file cannot be written.
    """
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if trained is None:
        trained = getattr(projectors, "projectors_trained", {})
    if isinstance(projectors, torch.nn.Module):
        projectors = dict(projectors.named_parameters())
    found = only_projectors(projectors)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    if not tensors:
        raise CheckpointError("no tensor named projectors.* to save")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"format": "pt", **trained_metadata(trained), **_specs_metadata(specs or {})}
        save_file(tensors, part, metadata=about)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


def _specs_metadata(specs: Mapping[str, ModalitySpec]) -> dict[str, str]:
    entries = {
        name: {
            k: v for k, v in spec.to_dict().items() if k not in ("token", "token_id", "max_rows")
        }
        for name, spec in specs.items()
    }
    return {SPECS_KEY: json.dumps(entries)} if entries else {}


def cast_projectors(
    projectors: Mapping[str, Tensor], dtype: torch.dtype, otherwise: str
) -> dict[str, Tensor]:
    """Projectors in the dtype in which they are stored.

    Raises:
        CheckpointError: one holds NaN or infinity there; `otherwise` says so of it.
    """
    cast = {name: tensor.detach().to(dtype) for name, tensor in projectors.items()}
    for name, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"tensor {name} {otherwise}")
    return cast


def _projector_keys(path: Path) -> Iterator[tuple[Path, str]]:
    """Files and the names of the projector tensors in them."""
    index = path / INDEX_FILE
    if (path / PROJECTOR_FILE).is_file():
        files = [path / PROJECTOR_FILE]
    elif index.is_file():  # written by save_pretrained
        weight_map = read_index(index)
        files = sorted({path / f for n, f in weight_map.items() if n.startswith(PROJECTOR_PREFIX)})
    elif path.is_dir() and not os.path.lexists(path / SINGLE_FILE):
        raise CheckpointError(
            f"{path} is a directory without {PROJECTOR_FILE}, {INDEX_FILE} or {SINGLE_FILE}; "
            "expected a safetensors file or a composite checkpoint"
        )
    else:
        files = [path / SINGLE_FILE] if path.is_dir() else [path]
    for file in files:
        if not os.path.lexists(file):
            raise CheckpointError(f"projector file {file} not found; expected a safetensors file")
        for key in read_header(file)[0]:
            if not (path.is_dir() and key.startswith(BASE_TENSORS)):
                yield file, key


def _full_name(key: str, specs: Mapping[str, ModalitySpec], file: Path) -> str:
    short = key.removeprefix(PROJECTOR_PREFIX)
    if short in PROJECTOR_PARTS and len(specs) == 1:
        return projector_tensor(next(iter(specs)), short)
    name, _, part = short.partition(".")
    if name in specs and part in PROJECTOR_PARTS:
        return projector_tensor(name, part)
    raise CheckpointError(
        f"{file}: tensor {key!r} belongs to none of the modalities {sorted(specs)}; expected "
        "projectors.<name>.linear_1|linear_2.weight|bias"
    )
