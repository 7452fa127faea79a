"""Composite checkpoints: link a text model's weights, add projectors, join the two by an index.

A composite directory holds `config.json`, the tokenizer with its placeholder tokens, the base's
shards as `base-*.safetensors`, `projectors.safetensors`, and `model.safetensors.index.json`. The
prefix keeps `save_pretrained` into the same directory from writing through a link into the base.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmqwen.hf.configuration import MODEL_TYPE, MultimodalQwen3Config
from mmqwen.hf.modeling import MultiModalProjector
from mmqwen.modalities import ModalitySpec, assign_token_ids, parse_modalities
from mmqwen.shards import (
    BASE_PREFIX,
    INDEX_FILE,
    PROJECTOR_FILE,
    SINGLE_FILE,
    CheckpointError,
    check_output,
    copy_with_rows,
    place_file,
    read_header,
    read_index,
    read_weight_map,
    refuse_pointers,
    staged,
)
from mmqwen.text_models import UntestedTextModelWarning, refuse_text_model, untested_warning
from mmqwen.tokens import add_placeholder_tokens, next_token_id
from mmqwen.trained import (
    UntrainedProjectorsWarning,
    read_trained,
    trained_metadata,
    warn_untrained,
)

__all__ = [
    "CheckpointError",
    "UntrainedProjectorsWarning",
    "build_checkpoint",
    "load_projectors",
    "read_config",
    "save_projectors",
]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PARTS = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
TABLE_MULTIPLE = 64
"""A grown embedding table is padded to a multiple of this, which is vLLM's vocabulary padding."""

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]


def build_checkpoint(
    base: str | Path,
    modalities: Mapping[str, Any],
    output: str | Path,
    *,
    projector: str | Path | Iterable[str | Path] | None = None,
    copy: bool = False,
    seed: int = 0,
    revision: str | None = None,
) -> Path:
    """Make a composite checkpoint from a text model, without loading its weights.

    Args:
        base: directory of a text checkpoint with safetensors weights, or a model id on the Hub.
        modalities: `{"m1": 768}` or `{"m1": {"dim": 768, ...}}`. Missing token ids are assigned at
            unused rows of the embedding table; a missing `hidden_dim` is the projector file's, or
            else the text model's hidden size.
        output: directory to create; it may exist if it is empty. It appears whole or not at all.
        projector: safetensors file or files, or composite directories, with trained projectors.
            What they record as never trained stays so recorded.
        copy: copy the base's shards. Otherwise they are hard-linked, so that they outlive the
            base's directory; across file systems, linked symbolically.
        seed: seed of projectors that no file gives. Each modality draws from its own stream, so
            adding one does not change another.
        revision: branch, tag or commit of a Hub model.

    Returns:
        `output` as a path.

    Raises:
        CheckpointError: the base or a projector file is missing, truncated or not usable, or the
            output is not empty or not writable.
        ModalityError: a modality's description is wrong, or its token id is taken.

    Warns:
        UntrainedProjectorsWarning: a modality has no trained projector.
        UntestedTextModelWarning: rows were never tried beside the base's type of text model.
    """
    output = Path(output)
    check_output(output)
    specs = parse_modalities(modalities)
    if not specs:
        raise CheckpointError("no modality given; a composite checkpoint needs at least one")
    folder = _find_base(base, revision)
    text = _read_base_config(folder)
    weight_map = _read_base_map(folder, tied=bool(getattr(text, "tie_word_embeddings", False)))
    tokenizer = _read_tokenizer(folder)
    first_free = next_token_id(tokenizer)
    specs = assign_token_ids(specs, tokenizer.get_added_vocab(), first_free)
    add_placeholder_tokens(tokenizer, specs)

    files = [projector] if isinstance(projector, (str, Path)) else list(projector or ())
    given: dict[str, Tensor] = {}
    trained: dict[str, bool] = {}
    for file in files:
        loaded = load_projectors(file, specs, text.hidden_size, require_all=False)
        given.update(loaded)
        record = read_trained(file)
        for name in specs:
            if f"projectors.{name}.linear_1.weight" in loaded:
                trained[name] = record.get(name, True)
    for name, spec in specs.items():
        weight = given.get(f"projectors.{name}.linear_1.weight")
        if spec.hidden_dim is None and weight is not None:
            specs[name] = replace(spec, hidden_dim=weight.shape[0])

    rows = read_header(folder / weight_map[EMBEDDING])[0][EMBEDDING]["shape"][0]
    needed = max(spec.token_id for spec in specs.values() if spec.token_id is not None) + 1
    grown = 0 if needed <= rows else -(-needed // TABLE_MULTIPLE) * TABLE_MULTIPLE - rows
    text.vocab_size, text.name_or_path = rows + grown, ""  # a local path is nobody's business
    config = MultimodalQwen3Config(text_config=text, modalities=specs)
    if getattr(config, "quantization_config", None):
        config.quantization_config = _spare_projectors(config.quantization_config)
    tensors, fresh = _complete(given, config, seed)
    trained.update(dict.fromkeys(fresh, False))

    with staged(output) as stage:
        config.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        for extra in [folder / "generation_config.json", *folder.glob("LICENSE*")]:
            if extra.is_file():
                shutil.copyfile(extra, stage / extra.name)
        for shard in sorted(set(weight_map.values())):
            source, target = folder / shard, stage / (BASE_PREFIX + shard)
            resized = {n for n in (EMBEDDING, HEAD) if grown and weight_map.get(n) == shard}
            if resized:
                copy_with_rows(source, target, resized, grown)
            else:
                place_file(source.resolve(), target, copy)
        save_projectors(tensors, stage / PROJECTOR_FILE, trained=trained)
        joined = {name: BASE_PREFIX + shard for name, shard in weight_map.items()}
        joined.update(dict.fromkeys(tensors, PROJECTOR_FILE))
        size = sum((stage / file).stat().st_size for file in set(joined.values()))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(joined.items()))}
        (stage / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    untested = untested_warning(text.model_type)
    if untested is not None:
        warnings.warn(untested, UntestedTextModelWarning, stacklevel=2)
    warn_untrained(trained, specs, stacklevel=2)
    return output


def read_config(path: str | Path) -> MultimodalQwen3Config:
    """The config of a composite checkpoint's directory.

    Raises:
        CheckpointError: there is none, or it is not of a composite checkpoint.
    """
    config = _read_config(Path(path))
    if not isinstance(config, MultimodalQwen3Config):
        raise CheckpointError(
            f"{path}: model_type is {config.model_type!r}, expected {MODEL_TYPE!r}; "
            "`mmqwen build` makes a composite checkpoint from a text model"
        )
    return config


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
        own = {part: found.get(f"projectors.{name}.{part}") for part in PARTS}
        if not require_all and all(tensor is None for tensor in own.values()):
            continue
        first = own["linear_1.weight"]
        hidden = spec.hidden_dim or (first.shape[0] if first is not None and first.ndim else 0)
        shapes = ((hidden, spec.dim), (hidden,), (hidden_size, hidden), (hidden_size,))
        for (part, tensor), shape in zip(own.items(), shapes, strict=True):
            full = f"projectors.{name}.{part}"
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
) -> Path:
    """Write projectors to a safetensors file, whole or not at all.

    Args:
        projectors: a model with `projectors.*` weights, or a mapping that holds them; its other
            tensors are left out.
        path: a file, or a directory in which `projectors.safetensors` is written.
        trained: modality to whether its projector was ever trained, for the file's metadata;
            what is not known is left out. None asks the model.

    Raises:
        CheckpointError: there are no projectors, or the file cannot be written.
    """
    path = Path(path)
    path = path / PROJECTOR_FILE if path.is_dir() else path
    if trained is None:
        trained = getattr(projectors, "projectors_trained", {})
    if isinstance(projectors, torch.nn.Module):
        projectors = dict(projectors.named_parameters())
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in projectors.items()
        if name.startswith("projectors.")
    }
    if not tensors:
        raise CheckpointError("no tensor named projectors.* to save")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"format": "pt", **trained_metadata(trained)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return path


# -- the base ----------------------------------------------------------------------------------


def _find_base(base: str | Path, revision: str | None) -> Path:
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    name = str(base)
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or "\\" in name:
        raise CheckpointError(f"base {name!r}: no such directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the Hub's errors have no common class below Exception
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"base {name!r} is neither a directory nor a model that the Hub gave: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder} is a LoRA adapter, expected a whole model; merge it into its base first"
            )
        raise CheckpointError(f"{folder}: no config.json, so it is not a checkpoint")
    refuse_pointers(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: config.json cannot be read: {error}") from error


def _read_base_config(folder: Path) -> PretrainedConfig:
    config = _read_config(folder)
    if isinstance(config, MultimodalQwen3Config):
        raise CheckpointError(f"{folder} is a composite checkpoint already; give its text model")
    if not hasattr(config, "hidden_size") or not hasattr(config, "vocab_size"):
        raise CheckpointError(f"{folder}: {config.model_type!r} is not a plain text model")
    try:
        refuse_text_model(config.model_type)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return config


def _read_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error


def _read_base_map(folder: Path, tied: bool) -> dict[str, str]:
    """Tensor name to shard, of a text model's base."""
    weight_map = read_weight_map(folder)
    strange = sorted(n for n in weight_map if not n.startswith(("model.", "lm_head.")))
    if strange or "lm_head.bias" in weight_map:
        name = strange[0] if strange else "lm_head.bias"
        raise CheckpointError(
            f"{folder}: tensor {name!r}: expected only model.* and lm_head.weight"
        )
    if EMBEDDING not in weight_map:
        raise CheckpointError(f"{folder}: tensor {EMBEDDING} is missing")
    if not tied and not any(n.startswith("lm_head.") for n in weight_map):
        raise CheckpointError(f"{folder}: {HEAD} is missing, and tie_word_embeddings is false")
    return weight_map


def _spare_projectors(quantization: Any) -> Any:
    """Tell transformers' quantizers to leave the projectors, which are not quantised, alone."""
    config = quantization if isinstance(quantization, dict) else quantization.to_dict()
    config = dict(config)
    if config.get("quant_method") == "compressed-tensors":
        config["ignore"] = [*(config.get("ignore") or []), "re:projectors\\..*"]
    elif config.get("quant_method") in ("fp8", "awq", "bitsandbytes", "fbgemm_fp8", "mxfp4"):
        skip = config.get("modules_to_not_convert")
        config["modules_to_not_convert"] = [*(["lm_head"] if skip is None else skip), "projectors"]
    return config


# -- projectors --------------------------------------------------------------------------------


def _projector_keys(path: Path) -> Iterator[tuple[Path, str]]:
    """Files and the names of the projector tensors in them."""
    index = path / INDEX_FILE
    if (path / PROJECTOR_FILE).is_file():
        files = [path / PROJECTOR_FILE]
    elif index.is_file():  # written by save_pretrained
        weight_map = read_index(index)
        files = sorted({path / f for n, f in weight_map.items() if n.startswith("projectors.")})
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
            if not (path.is_dir() and key.startswith(("model.", "lm_head."))):
                yield file, key


def _full_name(key: str, specs: Mapping[str, ModalitySpec], file: Path) -> str:
    short = key.removeprefix("projectors.")
    if short in PARTS and len(specs) == 1:
        return f"projectors.{next(iter(specs))}.{short}"
    name, _, part = short.partition(".")
    if name in specs and part in PARTS:
        return f"projectors.{short}"
    raise CheckpointError(
        f"{file}: tensor {key!r} belongs to none of the modalities {sorted(specs)}; expected "
        "projectors.<name>.linear_1|linear_2.weight|bias"
    )


def _complete(
    given: Mapping[str, Tensor], config: MultimodalQwen3Config, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """All projectors in the model's dtype, and the names of those that were drawn afresh."""
    dtype = config.text_config.dtype or torch.float32
    std = getattr(config.text_config, "initializer_range", None) or 0.02
    tensors, fresh = dict(given), []
    for name, spec in config.modality_specs.items():
        if f"projectors.{name}.linear_1.weight" in given:
            continue
        fresh.append(name)
        module = MultiModalProjector(
            spec.dim, spec.hidden_dim or config.hidden_size, config.hidden_size, output_std=std
        )
        # A hash of both: torch's CPU generator uses 32 bits of its seed.
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        module.reset_parameters(stream)
        tensors.update({f"projectors.{name}.{k}": v for k, v in module.state_dict().items()})
    cast = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in cast.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"tensor {name} overflows in {dtype}, the text model's dtype")
    return cast, fresh
