"""Projectors as tensors in files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmqwen.checkpoint.names import (
    PROJECTOR_FILE,
    CheckpointError,
    only_projectors,
    projector_shapes,
    projector_tensor,
)
from mmqwen.checkpoint.projector_files import (
    FoundProjector,
    assign,
    complete_fields,
    find_projectors,
)
from mmqwen.checkpoint.projector_record import spec_metadata
from mmqwen.checkpoint.trained import trained_metadata
from mmqwen.modalities import ModalitySpec, parse_modalities


def load_projectors(
    path: str | Path,
    specs: Mapping[str, ModalitySpec],
    hidden_size: int,
    *,
    require_all: bool = True,
) -> dict[str, Tensor]:
    """Read projectors under their full names, `projectors.<name>.linear_1.weight` and so on.

    Args:
        path: a safetensors file or a directory; see `projector_files` for what it may be.
        specs: the modalities wanted; other projectors are left alone. What a spec does not tell
            (`hidden_dim`, `activation`, ...), the file does.
        hidden_size: width of the text model.
        require_all: whether a modality that the file lacks altogether is an error.

    Returns:
        For each modality, the tensors of `projector_shapes`, in the file's dtype.

    Raises:
        CheckpointError: the file cannot be read, a tensor is missing, of the wrong shape or dtype,
            or holds NaN or infinity; or file and spec disagree, or neither tells the activation.
    """
    found = assign(find_projectors(path), list(specs))
    result: dict[str, Tensor] = {}
    for name, spec in specs.items():
        if name not in found and not require_all:
            continue
        projector = found.get(name) or FoundProjector(name, Path(path))
        fields = complete_fields(name, spec.to_dict(), found.get(name))
        settled = parse_modalities({name: fields})[name].settled(hidden_size)
        result |= read_tensors(projector, settled, hidden_size)
    return result


def read_tensors(
    projector: FoundProjector, spec: ModalitySpec, hidden_size: int
) -> dict[str, Tensor]:
    """The weights of one projector under their full names.

    Args:
        projector: what was found of it.
        spec: its modality, complete.
        hidden_size: width of the text model.

    Raises:
        CheckpointError: a tensor is missing, superfluous, of the wrong shape or dtype, or holds NaN
            or infinity.
    """
    result: dict[str, Tensor] = {}
    shapes = projector_shapes(spec, hidden_size)
    for part, shape in shapes.items():
        full = projector_tensor(spec.name, part)
        if part not in projector.parts:
            raise CheckpointError(f"{projector.path}: tensor {full} is missing")
        file, key = projector.parts[part]
        try:
            with safe_open(file, framework="pt") as handle:
                tensor = handle.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        called = full if full.endswith(key) else f"{full} ({key})"
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{file}: tensor {called} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file}: tensor {called} ({tensor.dtype}) is not floating-point and finite"
            )
        result[full] = tensor
    more = sorted(set(projector.parts) - set(shapes))
    if more:
        raise CheckpointError(
            f"{projector.path}: tensors {more} of modality {spec.name!r} have no place in a "
            f"projector of {spec.projector}"
        )
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
        specs: what the projectors are, for the file's metadata, without which nobody could load it
            but beside its config. None asks the model.

    Raises:
        CheckpointError: there are no projectors, or the file cannot be written.
    """
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if trained is None:
        trained = getattr(projectors, "projectors_trained", {})
    if specs is None:
        specs = getattr(projectors, "specs", {})
    if isinstance(projectors, torch.nn.Module):
        projectors = dict(projectors.named_parameters())
    found = only_projectors(projectors)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    if not tensors:
        raise CheckpointError("no tensor named projectors.* to save")
    known = {name: spec for name, spec in specs.items() if projector_tensor(name) in tensors}
    metadata = {"format": "pt", **trained_metadata(trained), **spec_metadata(known)}
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata=metadata)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


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
