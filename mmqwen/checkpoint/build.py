"""`mmqwen build`: link a text model's weights, add projectors, join the two by an index."""

from __future__ import annotations

import re
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmqwen.banks import BankCatalog, parse_banks
from mmqwen.checkpoint.banks import place_banks
from mmqwen.checkpoint.index import read_header, read_weight_map, refuse_pointers, write_index
from mmqwen.checkpoint.names import (
    BASE_PREFIX,
    BASE_TENSORS,
    MODEL_TYPE,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    SMALL_FILES,
    CheckpointError,
    projector_tensor,
)
from mmqwen.checkpoint.projectors import cast_projectors, load_projectors, save_projectors
from mmqwen.checkpoint.shards import check_output, copy_with_rows, place_file, staged
from mmqwen.checkpoint.trained import read_trained, warn_untrained
from mmqwen.hf.configuration import MultimodalQwen3Config
from mmqwen.hf.modeling import MultiModalProjector
from mmqwen.modalities import assign_token_ids, parse_modalities
from mmqwen.text_models import UntestedTextModelWarning, refuse_text_model, untested_warning
from mmqwen.tokens import add_placeholder_tokens, next_token_id

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TABLE_MULTIPLE = 64
"""A grown embedding table is padded to a multiple of this, which is vLLM's vocabulary padding."""

_HUB_FILES = ["*.safetensors", *SMALL_FILES]


def build_checkpoint(
    base: str | Path,
    modalities: Mapping[str, Any],
    output: str | Path,
    *,
    projector: str | Path | Iterable[str | Path] | None = None,
    banks: Mapping[str, Any] | None = None,
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
        banks: `{"items": FILE}`, or a dict with `file`, `modality` and `placement`: rows that
            requests may name. Linked as shards are, into the folder `banks`.
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
        BankError: a bank's file cannot be used, or does not fit its modality.

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
            if projector_tensor(name) in loaded:
                trained[name] = record.get(name, True)
    for name, spec in specs.items():
        weight = given.get(projector_tensor(name))
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

    catalog = BankCatalog(parse_banks(banks), specs, config.text_config.dtype)

    with staged(output) as stage:
        if catalog.banks:
            config.banks = place_banks(catalog, stage, copy)
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
        write_index(stage, joined)

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
    strange = sorted(n for n in weight_map if not n.startswith(BASE_TENSORS))
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
        config["ignore"] = [*(config.get("ignore") or []), f"re:{re.escape(PROJECTOR_PREFIX)}.*"]
    elif config.get("quant_method") in ("fp8", "awq", "bitsandbytes", "fbgemm_fp8", "mxfp4"):
        skip = config.get("modules_to_not_convert")
        config["modules_to_not_convert"] = [
            *(["lm_head"] if skip is None else skip),
            PROJECTOR_PREFIX.rstrip("."),
        ]
    return config


def _complete(
    given: Mapping[str, Tensor], config: MultimodalQwen3Config, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """All projectors in the model's dtype, and the names of those that were drawn afresh."""
    dtype = config.text_config.dtype or torch.float32
    std = getattr(config.text_config, "initializer_range", None) or 0.02
    tensors, fresh = dict(given), []
    for name, spec in config.modality_specs.items():
        if projector_tensor(name) in given:
            continue
        fresh.append(name)
        module = MultiModalProjector(
            spec.dim, spec.hidden_dim or config.hidden_size, config.hidden_size, output_std=std
        )
        # A hash of both: torch's CPU generator uses 32 bits of its seed.
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        module.reset_parameters(stream)
        tensors |= {projector_tensor(name, k): v for k, v in module.state_dict().items()}
    otherwise = f"overflows in {dtype}, the text model's dtype"
    return cast_projectors(tensors, dtype, otherwise), fresh
