"""What a file of projectors says that they are, so that none is taken for another of equal shapes.

In the metadata of `projectors.safetensors`: a modality's fields as in `config.json`, none left out.
It travels with projectors that are published alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmqwen.checkpoint.index import read_metadata
from mmqwen.checkpoint.names import CheckpointError
from mmqwen.modalities import (
    PROJECTOR_FIELDS,
    ModalityError,
    ModalitySpec,
    ProjectorSpec,
    parse_modalities,
)

METADATA_KEY = "mmqwen.projectors"


def recorded_fields(spec: ModalitySpec) -> dict[str, Any]:
    """What is recorded of a modality's projector: its sizes where settled, and all that it is."""
    sizes = {"dim": spec.dim}
    if spec.hidden_dim is not None:
        sizes["hidden_dim"] = spec.hidden_dim
    return sizes | kind_fields(spec.projector)


def kind_fields(kind: ProjectorSpec) -> dict[str, Any]:
    """All that a projector is, beside its sizes."""
    fields = {key: getattr(kind, key) for key in PROJECTOR_FIELDS}
    return {key: value for key, value in fields.items() if value is not None}


def spec_metadata(specs: Mapping[str, ModalitySpec]) -> dict[str, str]:
    """The record of some projectors as metadata of a safetensors file.

    An empty one, too, tells a file apart from those that were written before there was a choice.
    """
    record = {name: recorded_fields(spec) for name, spec in sorted(specs.items())}
    return {METADATA_KEY: json.dumps(record)}


def read_recorded(file: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What a file's metadata records of its projectors, by modality.

    Raises:
        CheckpointError: the record is not what `spec_metadata` writes.
    """
    try:
        record = json.loads(metadata.get(METADATA_KEY, "{}"))
        specs = parse_modalities(record)
    except (ValueError, AttributeError, ModalityError) as error:
        raise CheckpointError(f"{file}: its metadata {METADATA_KEY} is wrong: {error}") from error
    return {name: recorded_fields(spec) for name, spec in specs.items()}


def check_recorded(file: Path | None, specs: Mapping[str, ModalitySpec]) -> None:
    """See that a checkpoint's projectors are what its config says.

    Args:
        file: its file of projectors; None, or one without a record: nothing is known.
        specs: by the config, hidden widths settled.

    Raises:
        CheckpointError: they differ: the names of the tensors would not show it.
    """
    if file is None or not file.is_file():
        return
    recorded = read_recorded(file, read_metadata(file))
    for name, spec in specs.items():
        wanted = recorded_fields(spec)
        for key, value in recorded.get(name, {}).items():
            if wanted.get(key) != value:
                raise CheckpointError(
                    f"modality {name!r}: {key} is {wanted.get(key)!r} by config.json, but "
                    f"{value!r} by the metadata of {file}; they must agree"
                )
