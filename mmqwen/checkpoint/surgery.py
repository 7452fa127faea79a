"""Checkpoints changed: what a composite one holds taken over, a text model or projector extracted.

Base shards are linked, never copied, unless a model that was saved whole keeps projectors in them.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mmqwen.banks import BankSpec, parse_banks
from mmqwen.checkpoint.index import read_header, read_weight_map, write_index
from mmqwen.checkpoint.names import (
    BASE_PREFIX,
    PROJECTOR_PREFIX,
    SINGLE_FILE,
    CheckpointError,
    only_projectors,
    projector_tensor,
)
from mmqwen.checkpoint.projectors import load_projectors, save_projectors
from mmqwen.checkpoint.shards import check_output, copy_tensors, place_file, staged
from mmqwen.checkpoint.trained import read_trained
from mmqwen.modalities import ModalityError, ModalitySpec

EMBEDDING = "model.embed_tokens.weight"
ADAPTER_FOLDER = "adapter"


@dataclass
class Held:
    """What a base brings along.

    Attributes:
        text: config of its text model.
        weight_map: tensor of the text model to shard.
        tokenizer: with the tokens of `specs`.
        specs: its modalities; none of a text model.
        projectors: their tensors, by full name.
        trained: whether they were ever trained, where that is known.
        banks: its banks, with their files.
    """

    text: Any
    weight_map: dict[str, str]
    tokenizer: Any
    specs: dict[str, ModalitySpec] = field(default_factory=dict)
    projectors: dict[str, Tensor] = field(default_factory=dict)
    trained: dict[str, bool] = field(default_factory=dict)
    banks: dict[str, BankSpec] = field(default_factory=dict)


def take_over(
    folder: Path,
    config: Any,
    tokenizer: Any,
    *,
    drop: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    add: Mapping[str, str] | None = None,
) -> Held:
    """What a composite checkpoint holds, less what is dropped, under new names.

    The ids of placeholders stay as they are, since embeddings stand at them. A placeholder that is
    spelled after its modality is spelled after the new name.

    Args:
        folder: of the checkpoint.
        config: its config.
        tokenizer: its tokenizer.
        drop: modalities to leave out.
        rename: old names to new ones.
        add: modalities that will be added, each with the spelling of its placeholder.

    Raises:
        ModalityError: a modality to drop or rename is not there, or two would have one name.
        CheckpointError: a file cannot be read.

    Warns:
        UserWarning: a LoRA adapter beside the weights is left out.
    """
    rename, add = dict(rename or {}), dict(add or {})
    old = config.modality_specs
    for name in (*drop, *rename):
        if name not in old:
            raise ModalityError(f"{folder} has no modality {name!r}, only {list(old)}")
    names = {name: rename.get(name, name) for name in old if name not in drop}
    for name in set(rename) & set(drop):
        raise ModalityError(f"modality {name!r} is to be dropped and renamed; do one of the two")
    taken: dict[str, str] = {}
    for name, new in (*names.items(), *((one, one) for one in add)):
        if new in taken:
            raise ModalityError(
                f"two modalities would be called {new!r}; drop the one that is there, or choose "
                "another name"
            )
        taken[new] = name
    specs = {new: _renamed(old[name], new) for name, new in names.items()}
    spellings = {
        old[name].token: specs[new].token
        for name, new in names.items()
        if old[name].token != specs[new].token
    }
    gone = [token for token in _own_tokens(old, drop) if token not in add.values()]
    loaded = load_projectors(folder, old, config.hidden_size)
    record = read_trained(folder)
    if (folder / ADAPTER_FOLDER).is_dir():
        warnings.warn(
            f"{folder / ADAPTER_FOLDER}, a LoRA adapter that is not merged, is left out",
            stacklevel=4,
        )
    return Held(
        _text_config(config),
        base_map(folder),
        respelled(tokenizer, spellings, gone),
        specs,
        {
            projector_tensor(new, part): value
            for name, new in names.items()
            for part, value in _parts(loaded, name).items()
        },
        {names[name]: value for name, value in record.items() if name in names},
        {
            bank: replace(spec, modality=names.get(spec.modality, spec.modality))
            for bank, spec in parse_banks(getattr(config, "banks", None), folder).items()
            if spec.modality not in drop
        },
    )


def extract_text(checkpoint: str | Path, config: Any, tokenizer: Any, output: str | Path) -> Path:
    """Write the text model of a composite checkpoint as a plain one; its shards are linked.

    Args:
        checkpoint: directory of the composite checkpoint.
        config: its config.
        tokenizer: its tokenizer; the placeholders `<|NAME|>` at its end are taken out again.
        output: directory to create. It appears whole or not at all.

    Raises:
        CheckpointError: a file cannot be read, or the output is not empty or not writable.
    """
    folder, output = Path(checkpoint), Path(output)
    check_output(output)
    weight_map = base_map(folder)
    if EMBEDDING not in weight_map:
        raise CheckpointError(
            f"{folder} has no {EMBEDDING}: its text model's tensors have other names than a plain "
            "one's; take the text model that the checkpoint was built on"
        )
    text = _text_config(config)
    text.name_or_path = ""
    if not text.architectures:
        text.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]]
    specs = config.modality_specs
    tokenizer = respelled(tokenizer, {}, _own_tokens(specs, specs))
    shards = sorted(set(weight_map.values()))
    names = {shard: shard.removeprefix(BASE_PREFIX) for shard in shards}
    if len(shards) == 1:
        names = {shards[0]: SINGLE_FILE}
    elif SINGLE_FILE in names.values():  # loaders would read it alone
        names = {
            s: f"model-{at:05}-of-{len(shards):05}.safetensors" for at, s in enumerate(shards, 1)
        }
    with staged(output) as stage:
        text.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        copy_extras(folder, stage)
        for shard, name in names.items():
            place_text_shard(folder / shard, stage / name)
        if len(shards) > 1:
            write_index(stage, {tensor: names[shard] for tensor, shard in weight_map.items()})
    return output


def extract_projector(checkpoint: str | Path, config: Any, name: str, output: str | Path) -> Path:
    """Write one projector as a file by itself, with its spec and whether it was ever trained.

    Args:
        checkpoint: directory of the composite checkpoint.
        config: its config.
        name: the modality.
        output: safetensors file to create; a directory takes it as `NAME.safetensors`.

    Raises:
        ModalityError: there is no such modality.
        CheckpointError: a file cannot be read, or the output exists or cannot be written.
    """
    specs = config.modality_specs
    if name not in specs:
        raise ModalityError(f"{checkpoint} has no modality {name!r}, only {list(specs)}")
    output = Path(output)
    output = output / f"{name}.safetensors" if output.is_dir() else output
    if os.path.lexists(output):
        raise CheckpointError(f"output {output} exists; name a new file")
    loaded = load_projectors(checkpoint, specs, config.hidden_size)
    tensors = {projector_tensor(name, part): t for part, t in _parts(loaded, name).items()}
    record = read_trained(checkpoint)
    trained = {name: record[name]} if name in record else {}
    return save_projectors(tensors, output, trained=trained, specs={name: specs[name]})


def base_map(folder: Path) -> dict[str, str]:
    """Tensor name to shard, of the text model of a composite checkpoint."""
    weight_map = read_weight_map(folder)
    return {n: shard for n, shard in weight_map.items() if not n.startswith(PROJECTOR_PREFIX)}


def place_text_shard(source: Path, target: Path, copy_it: bool = False) -> None:
    """Link or copy a shard; copy it without the projectors that it holds, if it does."""
    source = source.resolve()
    held = read_header(source)[0]
    if only_projectors(held):
        copy_tensors(source, target, [name for name in held if name not in only_projectors(held)])
    else:
        place_file(source, target, copy_it)


def copy_extras(folder: Path, stage: Path) -> None:
    """Copy where generation stops, and the licence."""
    for extra in [folder / "generation_config.json", *folder.glob("LICENSE*")]:
        if extra.is_file():
            shutil.copyfile(extra, stage / extra.name)


def _text_config(config: Any) -> Any:
    """The text model's config with its quantization, which stands at the top of a composite's."""
    text = copy.deepcopy(config.text_config)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
        text.quantization_config = _unspared(dict(fields))
    return text


def _unspared(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what `mmqwen build` says of projectors."""
    own = PROJECTOR_PREFIX.rstrip(".")
    for key in ("ignore", "modules_to_not_convert"):
        if fields.get(key):
            fields[key] = [part for part in fields[key] if own not in part]
    return fields


def _own_tokens(specs: Mapping[str, ModalitySpec], names: Collection[str]) -> list[str]:
    """Placeholders added for these modalities; one spelled otherwise may be the base's own."""
    return [specs[name].token for name in names if specs[name].token == f"<|{name}|>"]


def _renamed(spec: ModalitySpec, name: str) -> ModalitySpec:
    token = f"<|{name}|>" if spec.token == f"<|{spec.name}|>" else spec.token
    return replace(spec, name=name, token=token)


def _parts(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one projector, by what they are called within it."""
    prefix = f"{PROJECTOR_PREFIX}{name}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


# -- the tokenizer -----------------------------------------------------------------------------


def respelled(tokenizer: Any, spellings: Mapping[str, str], gone: Collection[str] = ()) -> Any:
    """A tokenizer with other spellings of added tokens, whose ids stay.

    Args:
        tokenizer: a tokenizer; not changed.
        spellings: old spellings to new ones.
        gone: tokens to take out, as far as they are the last ones: a token before others keeps its
            place, since theirs would change.

    Raises:
        ModalityError: a new spelling is another token's.
    """
    known = tokenizer.get_added_vocab()
    for old, new in spellings.items():
        if new in tokenizer.get_vocab() and new not in spellings:
            raise ModalityError(f"{new!r}, for {old!r}, is a token of the tokenizer already")
    last = max(tokenizer.get_vocab().values())
    by_id = {token_id: token for token, token_id in known.items()}
    out = set()
    while by_id.get(last) in gone:
        out.add(by_id[last])
        last -= 1
    if not spellings and not out:
        return tokenizer
    with tempfile.TemporaryDirectory(prefix="mmqwen-") as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for file in folder.glob("*.json"):
            data = json.loads(file.read_text(encoding="utf-8"))
            if file.name == "tokenizer.json":  # nothing of the vocabulary itself
                data["added_tokens"] = _replaced(data["added_tokens"], spellings, out)
            else:
                data = _replaced(data, spellings, out)
            file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        changed = AutoTokenizer.from_pretrained(folder)
    changed.name_or_path = ""
    for token, token_id in known.items():
        want = None if token in out else token_id
        got = changed.get_added_vocab().get(spellings.get(token, token))
        if got != want:
            raise ModalityError(
                f"the tokenizer cannot be respelled: {spellings.get(token, token)!r} has id {got}, "
                f"expected {want}"
            )
    return changed


def _replaced(value: Any, spellings: Mapping[str, str], out: Collection[str]) -> Any:
    """JSON with other spellings, and without tokens that go: as strings, keys or objects."""

    def goes(one: Any) -> bool:
        return (one.get("content") if isinstance(one, dict) else one) in out

    if isinstance(value, str):
        return spellings.get(value, value)
    if isinstance(value, list):
        return [
            _replaced(one, spellings, out) for one in value if not _hashable(one) or not goes(one)
        ]
    if isinstance(value, dict):
        return {
            spellings.get(key, key): _replaced(one, spellings, out)
            for key, one in value.items()
            if key not in out and not (isinstance(one, dict) and goes(one))
        }
    return value


def _hashable(one: Any) -> bool:
    return isinstance(one, (str, dict))
