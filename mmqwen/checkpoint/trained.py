"""Which projectors were ever trained, so that no random start passes for a trained one.

The record is `{"m1": true, "site": false}`; a modality that it does not name is unknown, as all are
in checkpoints without a record, and nobody is warned about it. It stands in the metadata of
`projectors.safetensors`, and so travels with projectors that are published alone; a model that
transformers saved whole has no such file, and its record stands in `config.json`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmqwen.checkpoint.index import read_metadata
from mmqwen.checkpoint.names import PROJECTOR_FILE, CheckpointError

METADATA_KEY = "mmqwen.trained"
CONFIG_FIELD = "projectors_trained"


class UntrainedProjectorsWarning(UserWarning):
    """Projectors are the random start that `mmqwen build` gave them."""


def read_trained(
    path: str | os.PathLike[str],
    config: Any = None,
    *,
    revision: str | None = None,
    cache: str | Path | None = None,
) -> dict[str, bool]:
    """Modality to whether its projector was ever trained, where that is recorded.

    Looks at local files only. What cannot be read is unknown: whoever loads the weights says why.

    Args:
        path: a safetensors file of projectors, a checkpoint's directory, or the id of a Hub model
            that has been downloaded.
        config: the checkpoint's config, if the caller has it; its directory's `config.json` if not.
        revision: of the Hub model.
        cache: directory of the Hub's cache, unless it is the usual one.
    """
    folder, file = Path(path), projector_file(path, revision=revision, cache=cache)
    try:
        if file is not None and file.exists():
            return _clean(json.loads(read_metadata(file).get(METADATA_KEY, "{}")))
        if config is None and folder.is_dir():
            config = json.loads((folder / "config.json").read_bytes())
    except (CheckpointError, OSError, ValueError):
        return {}
    field = config.get(CONFIG_FIELD) if isinstance(config, dict) else None
    return _clean(getattr(config, CONFIG_FIELD, field))


def projector_file(
    path: str | os.PathLike[str], *, revision: str | None = None, cache: str | Path | None = None
) -> Path | None:
    """Where the projectors' file of a checkpoint is or would be; None: not downloaded.

    Args:
        path, revision, cache: see `read_trained`.
    """
    folder = Path(path)
    if not folder.exists():
        return _cached(str(path), revision, cache)
    return folder / PROJECTOR_FILE if folder.is_dir() else folder


def trained_metadata(trained: Mapping[str, bool]) -> dict[str, str]:
    """The record as metadata of a safetensors file; empty where nothing is known."""
    return {METADATA_KEY: json.dumps(dict(sorted(trained.items())))} if trained else {}


def untrained(trained: Mapping[str, bool], names: Iterable[str]) -> list[str]:
    """Those of the modalities `names` that are recorded as never trained."""
    return [name for name in names if trained.get(name) is False]


def untrained_message(names: Iterable[str]) -> str:
    """What to tell a user about modalities whose projectors were never trained."""
    return (
        f"the projectors of {', '.join(names)} are UNTRAINED (random): the model will answer about "
        "their rows at random until they are trained (`mmqwen train`) or given (`mmqwen build "
        "--projector FILE`)"
    )


def warn_untrained(trained: Mapping[str, bool], names: Iterable[str], stacklevel: int = 1) -> None:
    """Warn of those of the modalities `names` that were never trained.

    Warns:
        UntrainedProjectorsWarning: there are such.
    """
    found = untrained(trained, names)
    if found:
        message = untrained_message(found)
        warnings.warn(message, UntrainedProjectorsWarning, stacklevel=stacklevel + 1)


def _clean(record: Any) -> dict[str, bool]:
    if not isinstance(record, dict):
        return {}
    return {name: value for name, value in record.items() if isinstance(value, bool)}


def _cached(name: str, revision: str | None, cache: str | Path | None) -> Path | None:
    """The projector file of a Hub model, where it has been downloaded."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, PROJECTOR_FILE, cache_dir=cache, revision=revision)
    except ValueError:  # no name that the Hub could have
        return None
    return Path(found) if isinstance(found, str) else None
