"""What projectors a file holds, whoever wrote it: whose names its tensors have, and what is told.

Names that are known, each with `weight` and `bias`:

    [projectors.]NAME.linear_1, .linear_2, .norm   this package's, one a modality
    linear_1, linear_2, norm                       one projector without a name
    multi_modal_projector.linear_1, .linear_2      LLaVA's in transformers (behind any prefix)
    mm_projector.0, .2; mm_projector               LLaVA's own: two layers; one
    [NAME.]0, 2; 0, 1, 3; ...                      an `nn.Sequential`, a norm first or none
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmqwen.checkpoint.index import read_header, read_index, read_metadata
from mmqwen.checkpoint.names import (
    BASE_TENSORS,
    FIRST_PART,
    INDEX_FILE,
    MODEL_TYPE,
    PROJECTOR_FILE,
    PROJECTOR_PARTS,
    PROJECTOR_PREFIX,
    SINGLE_FILE,
    CheckpointError,
    only_projectors,
)
from mmqwen.checkpoint.projector_record import (
    METADATA_KEY,
    kind_fields,
    read_recorded,
    recorded_fields,
)
from mmqwen.checkpoint.trained import METADATA_KEY as TRAINED_KEY
from mmqwen.modalities import (
    NAME_PATTERN,
    PROJECTOR_FIELDS,
    ModalitySpec,
    ProjectorSpec,
    parse_modalities,
    read_field,
)

_COMPARED = ("dim", "hidden_dim", *PROJECTOR_FIELDS)
_LAYERS = tuple(dict.fromkeys(part.partition(".")[0] for part in PROJECTOR_PARTS))
_KEY = re.compile(rf"(?:(.*)\.)?({'|'.join(_LAYERS)}|\d+)\.(weight|bias)")
_LLAVA = ("multi_modal_projector", "mm_projector")
_LLAVA_LINEAR = re.compile(r"(?:.*\.)?mm_projector\.(weight|bias)")
_HF_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "linear": "none",
}
"""transformers' names of what there is here."""


@dataclass
class FoundProjector:
    """One projector of a file.

    Attributes:
        name: of its modality in the file; None: it has none.
        path: what was looked into, for messages.
        parts: where each of `PROJECTOR_PARTS` lies: file and name of the tensor.
        shapes: of each.
        told: what it is, by whom: fields of a `ModalitySpec`.
    """

    name: str | None
    path: Path
    parts: dict[str, tuple[Path, str]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    told: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


def find_projectors(path: str | Path) -> dict[str | None, FoundProjector]:
    """The projectors of a file or a directory, by the names that they have there.

    Reads headers, metadata and `config.json`, no tensors.

    Args:
        path: a safetensors file, or a directory of a composite checkpoint or a LLaVA model.

    Raises:
        CheckpointError: it cannot be read, or holds tensors of nothing that is known.
    """
    path = Path(path)
    found: dict[str | None, FoundProjector] = {}
    layers: dict[str | None, dict[str, dict[str, tuple[Path, str, list[int]]]]] = {}
    strange: list[tuple[Path, str]] = []
    foreign = False
    files = _files_of(path)
    for file in files:
        for key, entry in read_header(file)[0].items():
            placed = _place(key)
            if placed is None:
                if not (path.is_dir() and key.startswith(BASE_TENSORS)):
                    strange.append((file, key))
                continue
            name, layer, kind, llava = placed
            foreign = foreign or llava
            of = layers.setdefault(name, {}).setdefault(layer, {})
            if kind in of:
                here = f"{name}.{layer}.{kind}" if name else f"{layer}.{kind}"
                raise CheckpointError(f"{file}: tensor {here} appears twice: {of[kind][1]}, {key}")
            of[kind] = (file, key, list(entry["shape"]))
    if strange and not foreign:  # the other tensors of a LLaVA model are no projector's
        file, key = strange[0]
        raise CheckpointError(
            f"{file}: tensor {key!r} belongs to none of the projectors that are known; expected "
            "projectors.<name>.linear_1|linear_2|norm.weight|bias, LLaVA's multi_modal_projector.* "
            "or mm_projector.*, or an nn.Sequential's 0.weight, ..."
        )
    for name, parts in layers.items():
        projector = found[name] = FoundProjector(name, path)
        _arrange(projector, parts)
        projector.told += _told_beside(path, files, name)
    return found


def _files_of(path: Path) -> list[Path]:
    """The files that may hold projectors."""
    index = path / INDEX_FILE
    if (path / PROJECTOR_FILE).is_file():
        files = [path / PROJECTOR_FILE]
    elif index.is_file():  # of transformers' save_pretrained
        weight_map = read_index(index)
        ours = only_projectors(weight_map)
        wanted = ours or [n for n in weight_map if any(f"{part}." in n for part in _LLAVA)]
        files = sorted({path / weight_map[name] for name in wanted})
    elif path.is_dir() and not os.path.lexists(path / SINGLE_FILE):
        raise CheckpointError(
            f"{path} is a directory without {PROJECTOR_FILE}, {INDEX_FILE} or {SINGLE_FILE}; "
            "expected a safetensors file, a composite checkpoint or a LLaVA model"
        )
    else:
        files = [path / SINGLE_FILE] if path.is_dir() else [path]
    for file in files:
        if not os.path.lexists(file):
            raise CheckpointError(f"projector file {file} not found; expected a safetensors file")
        if file.suffix in (".bin", ".pt", ".pth"):
            raise CheckpointError(
                f"{file} is a pickle, which can run code, expected a safetensors file; convert it: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
            )
    return files


def _place(key: str) -> tuple[str | None, str, str, bool] | None:
    """(name, layer, weight or bias, whether LLaVA's) of a tensor; None: not a projector's."""
    linear = _LLAVA_LINEAR.fullmatch(key)
    if linear:
        return None, "0", linear[1], True
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    prefix, layer, kind = match[1] or "", match[2], match[3]
    if prefix.rpartition(".")[2] in _LLAVA:
        return None, layer, kind, True
    if key.startswith(BASE_TENSORS):
        return None
    name = prefix.removeprefix(PROJECTOR_PREFIX)
    if not name:
        return None, layer, kind, False
    return (name, layer, kind, False) if NAME_PATTERN.fullmatch(name) else None


def _arrange(
    projector: FoundProjector, layers: dict[str, dict[str, tuple[Path, str, list[int]]]]
) -> None:
    """Give tensors the names of `PROJECTOR_PARTS`, and note what they tell of the projector."""
    facts: dict[str, Any] = {}
    numbers = sorted(int(layer) for layer in layers if layer.isdigit())
    if numbers:
        layers = dict(layers)
        if len(numbers) < len(layers):
            raise CheckpointError(
                f"{projector.path}: layers {sorted(layers)}, expected names or numbers, not both"
            )
        first = layers[str(numbers[0])].get("weight")
        order = ["linear_1", "linear_2"]
        if first is not None and len(first[2]) == 1:
            order.insert(0, "norm")
        if len(numbers) > len(order):
            raise CheckpointError(
                f"{projector.path}: layers {numbers}, expected one or two linear ones, and a norm "
                "before them or none"
            )
        renamed = dict(zip(order, numbers, strict=False))
        facts["layers"] = 2 if "linear_2" in renamed else 1
        if facts["layers"] == 2 and renamed["linear_2"] == renamed["linear_1"] + 1:
            facts["activation"] = "none"
        layers = {layer: layers[str(number)] for layer, number in renamed.items()}
    for layer, of in layers.items():
        for kind, (file, key, shape) in of.items():
            projector.parts[f"{layer}.{kind}"] = (file, key)
            projector.shapes[f"{layer}.{kind}"] = shape
    if "linear_2" in layers:
        facts["layers"] = 2
    facts["bias"] = any("bias" in of for layer, of in layers.items() if layer != "norm")
    if "norm" not in layers:
        facts["norm"] = "none"
    elif "bias" in layers["norm"]:
        facts["norm"] = "layer"
    projector.told.append((f"the tensors of {projector.path}", facts))


def _told_beside(
    path: Path, files: list[Path], name: str | None
) -> list[tuple[str, dict[str, Any]]]:
    """What the file's metadata and the directory's `config.json` tell of a projector."""
    told: list[tuple[str, dict[str, Any]]] = []
    for file in files:
        metadata = read_metadata(file)
        fields = read_recorded(file, metadata).get(name or "")
        old = TRAINED_KEY in metadata and METADATA_KEY not in metadata
        if fields is None and old and name is not None:
            # Written before there was a choice.
            fields = kind_fields(ProjectorSpec())
        if fields is None:
            given = {key: metadata[key] for key in _COMPARED if key in metadata}
            fields = {key: read_field(key, text) for key, text in given.items()}
        if fields:
            told.append((f"the metadata of {file}", fields))
    folder = path.parent if path.name == PROJECTOR_FILE else path  # a checkpoint's, named itself
    if (folder / "config.json").is_file():
        told.append((str(folder / "config.json"), _told_by_config(folder / "config.json", name)))
    return told


def _told_by_config(file: Path, name: str | None) -> dict[str, Any]:
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no object")
        if config.get("model_type") == MODEL_TYPE:
            spec = parse_modalities(config.get("modalities") or {}).get(name or "")
            return {} if spec is None else recorded_fields(spec)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    act, kind = config.get("projector_hidden_act"), config.get("mm_projector_type")
    if kind == "linear":
        return {"layers": 1}
    if isinstance(kind, str) and re.fullmatch(r"mlp\d+x_gelu", kind):
        act = "gelu"
    if act is None:
        return {}
    if act not in _HF_ACTIVATIONS:
        raise CheckpointError(
            f"{file}: the projector's activation is {act!r}, expected one of "
            f"{list(_HF_ACTIVATIONS)}"
        )
    return {"activation": _HF_ACTIVATIONS[act]}


# -- what was told, held together -----------------------------------------------------------------


def complete_fields(
    name: str, asked: Mapping[str, Any], projector: FoundProjector | None
) -> dict[str, Any]:
    """What is known of a modality: what was asked for, what its projector's file tells, and where.

    Args:
        name: the modality.
        asked: fields of its `ModalitySpec`, or some of them.
        projector: its projector, if a file holds one.

    Raises:
        CheckpointError: two of them differ, or the activation or norm cannot be told.
    """
    known = dict(asked)
    if projector is None:
        return known
    by = dict.fromkeys(known, "what was asked for")
    for source, fields in projector.told:
        for key, value in fields.items():
            if key in known and known[key] != value:
                raise CheckpointError(
                    f"modality {name!r}: {key} is {known[key]!r} by {by[key]}, but {value!r} by "
                    f"{source}; they must agree"
                )
            known[key] = value
            by.setdefault(key, source)
    first = projector.shapes.get(FIRST_PART)
    if first is not None and len(first) == 2:
        known.setdefault("dim", first[1])
        if known.get("layers", 2) == 2:
            known.setdefault("hidden_dim", first[0])
    for key, needed in (("activation", known.get("layers", 2) == 2), ("norm", True)):
        if needed and key not in known:
            raise CheckpointError(
                f"modality {name!r}: {projector.path} does not tell the projector's {key}, and a "
                f"wrong one would answer wrongly without a word; say it: --modality "
                f"{name}={known.get('dim', 'WIDTH')}:{key}=... (in Python, {key!r} among the "
                f"modality's fields)"
            )
    return known


def complete_specs(path: str | Path, specs: Mapping[str, ModalitySpec]) -> dict[str, ModalitySpec]:
    """The modalities with what a file of projectors tells of them.

    As `mmqwen build` records them; here for an engine that is given the file itself.

    Raises:
        CheckpointError: as for `find_projectors` and `complete_fields`.
    """
    found = assign(find_projectors(path), list(specs))
    return parse_modalities(
        {name: complete_fields(name, s.to_dict(), found.get(name)) for name, s in specs.items()}
    )


def assign(
    found: Mapping[str | None, FoundProjector], names: list[str]
) -> dict[str, FoundProjector]:
    """The projectors of the modalities `names`; one without a name is the only modality's.

    Raises:
        CheckpointError: a projector without a name could be of several modalities.
    """
    taken = {name: found[name] for name in names if name in found}
    if None in found:
        free = [name for name in names if name not in taken]
        if len(names) != 1 or not free:
            raise CheckpointError(
                f"{found[None].path} holds a projector without a name, expected one of a modality "
                f"of {names}; say whose it is: --projector NAME=FILE"
            )
        taken[free[0]] = found[None]
    return taken
