"""Where the projectors of a model come from, as a user names files of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmqwen.checkpoint.names import CheckpointError
from mmqwen.checkpoint.nested import LeftOutWarning
from mmqwen.checkpoint.projector_files import FoundProjector, assign, find_projectors
from mmqwen.modalities import NAME_PATTERN


def gather(
    sources: Iterable[str | Path], asked: Mapping[str, Mapping[str, Any]]
) -> dict[str, tuple[FoundProjector, Path]]:
    """The projectors of all modalities that some source has, and the file or directory of each.

    Args:
        sources: `FILE`, or as text also `NAME=FILE` (it is modality NAME's) and `NAME=FILE:OLD`
            (it is called OLD there).
        asked: the modalities that are wanted.

    Raises:
        CheckpointError: a source cannot be read, holds nothing of what was asked for, or holds what
            another one does.

    Warns:
        LeftOutWarning: a source holds more.
    """
    taken: dict[str, tuple[FoundProjector, Path]] = {}
    for source in sources:
        wanted, path, old = read_source(source)
        found = find_projectors(path)
        if wanted is None:
            free = [name for name in asked if name in found or name not in taken]
            here = assign(found, free)
        else:
            here = {wanted: _only_one(found, wanted, path, old)}
        if not here:
            raise CheckpointError(
                f"{path} holds projectors of {sorted(map(str, found))}, none of the modalities "
                f"{sorted(asked)}; take one by another name: --projector NAME={path}:OLD"
            )
        for name, projector in here.items():
            if name in taken:
                raise CheckpointError(
                    f"modality {name!r} is in {taken[name][1]} and in {path}; give one of them"
                )
            taken[name] = (projector, path)
        used = {id(projector) for projector in here.values()}
        more = sorted(str(name) for name, p in found.items() if id(p) not in used)
        if more:
            message = f"{path} also holds projectors of {more}, not asked for: left out"
            warnings.warn(message, LeftOutWarning, stacklevel=3)
    return taken


def _only_one(
    found: Mapping[str | None, FoundProjector], wanted: str, path: Path, old: str | None
) -> FoundProjector:
    """The projector that a source means: the one of name `old`, of name `wanted`, or the only."""
    key = old if old is not None else wanted if wanted in found else None
    if key is None and len(found) == 1:
        key = next(iter(found))
    if key not in found:
        names = sorted(map(str, found))
        remedy = "" if old is not None else f"; say which: --projector {wanted}={path}:OLD"
        raise CheckpointError(f"{path} holds projectors of {names}, not {old or wanted!r}{remedy}")
    return found[key]


def read_source(source: str | Path) -> tuple[str | None, Path, str | None]:
    """(modality, file or directory, name there) of `FILE`, `NAME=FILE` or `NAME=FILE:OLD`."""
    if isinstance(source, Path) or os.path.lexists(source):
        return None, Path(source), None
    name, separator, rest = source.partition("=")
    if not separator or not NAME_PATTERN.fullmatch(name):
        return None, Path(source), None
    file, colon, old = rest.rpartition(":")
    if os.path.lexists(rest) or not colon or not NAME_PATTERN.fullmatch(old):
        return name, Path(rest), None
    return name, Path(file), old
