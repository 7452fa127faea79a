"""`mmqwen build`: link a text model's weights, add projectors, join the two by an index."""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from mmqwen.banks import BankCatalog, parse_banks
from mmqwen.checkpoint import surgery
from mmqwen.checkpoint.banks import place_banks
from mmqwen.checkpoint.index import read_header, read_weight_map, refuse_pointers, write_index
from mmqwen.checkpoint.names import (
    BASE_PREFIX,
    BASE_TENSORS,
    MODEL_TYPE,
    NESTED_PREFIX,
    PROJECTOR_FILE,
    PROJECTOR_PREFIX,
    SMALL_FILES,
    CheckpointError,
    projector_tensor,
)
from mmqwen.checkpoint.nested import add_template, text_part, without_left_out
from mmqwen.checkpoint.projector_files import complete_fields, find_projectors
from mmqwen.checkpoint.projector_sources import gather, read_source
from mmqwen.checkpoint.projectors import cast_projectors, read_tensors, save_projectors
from mmqwen.checkpoint.shards import check_output, copy_with_rows, staged
from mmqwen.checkpoint.surgery import EMBEDDING, copy_extras, place_text_shard
from mmqwen.checkpoint.trained import read_trained, warn_untrained
from mmqwen.hf.configuration import MultimodalQwen3Config
from mmqwen.hf.projector import MultiModalProjector
from mmqwen.modalities import (
    ModalityError,
    ModalitySpec,
    assign_token_ids,
    parse_modalities,
    spec_fields,
)
from mmqwen.text_models import UntestedTextModelWarning, refuse_text_model, untested_warning
from mmqwen.tokens import add_placeholder_tokens, next_token_id

NESTED_EMBEDDING = NESTED_PREFIX + EMBEDDING.removeprefix("model.")
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
    drop: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    banks: Mapping[str, Any] | None = None,
    copy: bool = False,
    seed: int = 0,
    revision: str | None = None,
) -> Path:
    """Make a composite checkpoint from a text model, or from another composite one, without loading
    its weights.

    Args:
        base: directory of a text checkpoint with safetensors weights, or a model id on the Hub;
            also of a vision-language one, of which the text model is taken, or of a composite one,
            of which all is kept.
        modalities: `{"m1": 768}` or `{"m1": {"dim": 768, ...}}`. Missing token ids are assigned at
            unused rows of the embedding table. What else is missing (`dim`, `hidden_dim`,
            `activation`, ...) is the projector file's, or else the text model's hidden size and
            what `ProjectorSpec` says.
        output: directory to create; it may exist if it is empty. It appears whole or not at all.
        projector: safetensors file or files, or directories of composite checkpoints or LLaVA
            models, with trained projectors; as text also `NAME=FILE` and `NAME=FILE:OLD`. See
            `checkpoint.projector_files` for whose names are known. What they record as never
            trained stays so recorded. They replace what a composite base has.
        drop: modalities of a composite base to leave out. A placeholder token that others follow
            stays in the tokenizer, so that their ids do not change.
        rename: modalities of a composite base to call otherwise, old names to new ones; their
            placeholders keep their ids.
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
        CheckpointError: the base or a projector file is missing, truncated or not usable; what was
            asked for, a file and its config disagree, or none tells a projector's activation; or
            the output is not empty or not writable.
        ModalityError: a modality's description is wrong, or its token id is taken; one to drop or
            rename is not there, or two would have one name.
        BankError: a bank's file cannot be used, or does not fit its modality.

    Warns:
        LeftOutWarning: a file holds projectors that were not asked for.
        UntrainedProjectorsWarning: a modality has no trained projector.
        UntestedTextModelWarning: rows were never tried beside the base's type of text model.
        LeftOutWarning: the base has a vision tower or a drafter, which is left out.
    """
    output = Path(output)
    check_output(output)
    folder = _find_base(base, revision)
    files = [projector] if isinstance(projector, (str, Path)) else list(projector or ())
    added = {name: spec_fields(name, value) for name, value in modalities.items()}
    held = _read_base(folder, drop, rename or {}, added)
    text, weight_map, tokenizer = held.text, held.weight_map, held.tokenizer
    specs, given, trained = _read_projectors(files, added, held)
    specs = assign_token_ids(specs, tokenizer.get_added_vocab(), next_token_id(tokenizer))
    add_placeholder_tokens(tokenizer, specs)

    embedding = EMBEDDING if EMBEDDING in weight_map else NESTED_EMBEDDING
    rows = read_header(folder / weight_map[embedding])[0][embedding]["shape"][0]
    needed = max(spec.token_id for spec in specs.values() if spec.token_id is not None) + 1
    grown = 0 if needed <= rows else -(-needed // TABLE_MULTIPLE) * TABLE_MULTIPLE - rows
    text.vocab_size, text.name_or_path = rows + grown, ""  # a local path is nobody's business
    config = MultimodalQwen3Config(text_config=text, modalities=specs)
    if getattr(config, "quantization_config", None):
        config.quantization_config = _spare_projectors(config.quantization_config)
    tensors, fresh = _complete(given, config, seed)
    trained.update(dict.fromkeys(fresh, False))

    catalog = BankCatalog({**held.banks, **parse_banks(banks)}, specs, config.text_config.dtype)

    with staged(output) as stage:
        if catalog.banks:
            config.banks = place_banks(catalog, stage, copy)
        config.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        copy_extras(folder, stage)
        names = {
            shard: BASE_PREFIX + shard.removeprefix(BASE_PREFIX) for shard in weight_map.values()
        }
        for shard, name in sorted(names.items()):
            source, target = folder / shard, stage / name
            resized = {n for n in (embedding, HEAD) if grown and weight_map.get(n) == shard}
            if not resized:
                place_text_shard(source, target, copy)
                continue
            place_text_shard(source, plain := stage / f".{name}")
            copy_with_rows(plain.resolve(), target, resized, grown)
            plain.unlink()
        save_projectors(
            tensors, stage / PROJECTOR_FILE, trained=trained, specs=config.modality_specs
        )
        joined = {name: names[shard] for name, shard in weight_map.items()}
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


def _read_projectors(
    sources: Iterable[str | Path], added: Mapping[str, dict[str, Any]], held: surgery.Held
) -> tuple[dict[str, ModalitySpec], dict[str, Tensor], dict[str, bool]]:
    """Complete specs, the weights that files or the base give, and which of these were trained."""
    sources, hidden_size = list(sources), held.text.hidden_size
    asked = {name: dict(fields) for name, fields in added.items()}
    for source in sources:  # NAME=FILE asks for NAME, FILE for those of the base that it has
        wanted, path, _ = read_source(source)
        for name in find_projectors(path) if wanted is None else [wanted]:
            if name in held.specs:
                asked.setdefault(name, held.specs[name].to_dict())
            elif wanted is not None:
                asked.setdefault(wanted, {})
    if not asked and not held.specs:
        raise CheckpointError(
            "no modality given, or left: a composite checkpoint needs at least one (`mmqwen "
            "extract text` makes a plain model)"
        )
    if not asked:  # a file that does not say whose its projector is
        asked = {name: spec.to_dict() for name, spec in held.specs.items()}
    found = gather(sources, asked)
    complete = {
        name: complete_fields(name, fields, found[name][0] if name in found else None)
        for name, fields in asked.items()
    }
    specs = parse_modalities({**held.specs, **complete})
    given, trained = dict(held.projectors), dict(held.trained)
    for name, (projector, path) in found.items():
        given |= read_tensors(projector, specs[name].settled(hidden_size), hidden_size)
        trained[name] = read_trained(path).get(projector.name or name, True)
    return specs, given, trained


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


def extract_text(checkpoint: str | Path, output: str | Path) -> Path:
    """Write the text model of a composite checkpoint as a plain one; see `surgery.extract_text`."""
    folder = _find_base(checkpoint, None)
    return surgery.extract_text(folder, read_config(folder), _read_tokenizer(folder), output)


def extract_projector(checkpoint: str | Path, name: str, output: str | Path) -> Path:
    """Write one projector as a file by itself; see `surgery.extract_projector`."""
    folder = _find_base(checkpoint, None)
    return surgery.extract_projector(folder, read_config(folder), name, output)


def _read_base(
    folder: Path, drop: Collection[str], rename: Mapping[str, str], add: Mapping[str, Any]
) -> surgery.Held:
    """What a text model or a composite checkpoint brings along."""
    config = _read_config(folder)
    if isinstance(config, MultimodalQwen3Config):
        spelled = {name: fields.get("token") or f"<|{name}|>" for name, fields in add.items()}
        tokenizer = _read_tokenizer(folder)
        return surgery.take_over(folder, config, tokenizer, drop=drop, rename=rename, add=spelled)
    for name in (*drop, *rename):
        raise ModalityError(f"{folder} is a text model, which has no modality {name!r}")
    text, weight_map = _read_text(folder, config)
    return surgery.Held(text, weight_map, _read_tokenizer(folder))


def _read_text(folder: Path, config: PretrainedConfig) -> tuple[PretrainedConfig, dict[str, str]]:
    """The text model's config, and its tensors by shard."""
    weight_map: dict[str, str] = {}
    if getattr(config, "text_config", None) is not None:
        weight_map = read_weight_map(folder)
        try:
            config = text_part(config, weight_map)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from error
    if not hasattr(config, "hidden_size") or not hasattr(config, "vocab_size"):
        raise CheckpointError(f"{folder}: {config.model_type!r} is not a plain text model")
    try:
        refuse_text_model(config.model_type)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return config, _read_base_map(folder, weight_map or read_weight_map(folder), tied)


def _read_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    add_template(tokenizer, folder)
    return tokenizer


def _read_base_map(folder: Path, held: dict[str, str], tied: bool) -> dict[str, str]:
    """Tensor name to shard, of the text model of a base that holds these tensors."""
    weight_map = without_left_out(held)
    nested = NESTED_EMBEDDING in weight_map
    known = (NESTED_PREFIX, "lm_head.") if nested else BASE_TENSORS
    strange = sorted(n for n in weight_map if not n.startswith(known))
    if strange or "lm_head.bias" in weight_map:
        name = strange[0] if strange else "lm_head.bias"
        raise CheckpointError(
            f"{folder}: tensor {name!r}: expected only {known[0]}* and lm_head.weight"
        )
    if not nested and EMBEDDING not in weight_map:
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
        module = MultiModalProjector.of(spec, config.hidden_size, output_std=std)
        # A hash of both: torch's CPU generator uses 32 bits of its seed.
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        module.reset_parameters(stream)
        tensors |= {projector_tensor(name, k): v for k, v in module.state_dict().items()}
    otherwise = f"overflows in {dtype}, the text model's dtype"
    return cast_projectors(tensors, dtype, otherwise), fresh
