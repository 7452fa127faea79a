"""The folder where a training run keeps what it needs to go on: whose it is, and of which data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmqwen.training.config import TrainingError, TrainSettings

RUN_FILE = "settings.json"
DATA_RECORD = "datasets.json"
PLAN_FILE = "plan.safetensors"
LOCK_FILE = ".lock"

_FREE = {"output", "keep", "log_steps", "workers", "validate", "progress", "save_steps", "merge"}
_FREE |= {"attention", "compile", "lean", "liger", "banks"}
"""Settings that may differ when a run goes on: they do not change the loss curve, but for the order
in which sums are taken. (A bank may lie elsewhere by then; its version is held by the plan.)"""


def read_settings(folder: Path) -> TrainSettings:
    """The settings of the run that made a folder.

    Raises:
        TrainingError: it is not a run's folder.
    """
    try:
        raw = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        return TrainSettings(
            **{f.name: raw[f.name] for f in fields(TrainSettings) if f.name in raw}
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder}: not the folder of a training run ({error})") from error


def claim_run_folder(settings: TrainSettings, *, has_checkpoint: bool) -> bool:
    """Make the run's folder, or check that it is of a run with the same settings.

    A run without a checkpoint left nothing to go on with, so that another may take its place.

    Returns:
        Whether the run begins here: if nothing comes of it, `release_run_folder` gives it up.

    Raises:
        TrainingError: it is of another run, or of one whose datasets have been changed since, or
            cannot be written.
    """
    folder = settings.run_folder
    if has_checkpoint and (folder / RUN_FILE).exists():
        old, new = read_settings(folder).to_dict(), settings.to_dict()
        changed = [k for k in new if k not in _FREE and old[k] != new[k]]
        if changed:
            was = ", ".join(f"{key}={old[key]!r}" for key in changed)
            raise TrainingError(
                f"{folder} holds a run with other settings ({was}); remove it, name another "
                "output, or give the same settings to go on with it"
            )
        _check_datasets(folder, settings)
        return False
    record = _fingerprints(settings)  # first: it leaves no folder where there is no dataset
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / DATA_RECORD, record)
        _write(folder / RUN_FILE, settings.to_dict())
    except OSError as error:
        raise TrainingError(f"cannot write {folder}: {error}") from error
    return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other processes from training into the same folder meanwhile.

    Raises:
        TrainingError: one does.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process trains into {folder}; wait for it, or name another output"
            ) from None
        try:
            yield
        finally:
            if not (folder / RUN_FILE).exists():  # nothing came of it
                release_run_folder(folder)


def release_run_folder(folder: Path) -> None:
    """Give up a folder that was claimed for a run without a checkpoint: there is nothing to go on.

    So the same command may be given again with other settings. Logs are kept where there are any.
    """
    for name in (RUN_FILE, DATA_RECORD, PLAN_FILE, LOCK_FILE):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something
        folder.rmdir()


def _write(file: Path, content: dict[str, Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)


def _fingerprints(settings: TrainSettings) -> dict[str, Any]:
    from mmqwen.data.format import fingerprint

    paths = (settings.data, settings.eval_data)
    return {path: fingerprint(path) for path in paths if path is not None}


def _check_datasets(folder: Path, settings: TrainSettings) -> None:
    """See that the files are those that the run began with."""
    record = folder / DATA_RECORD
    try:
        old = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:  # of a version before this record, or removed to go on all the same
        return
    except (OSError, ValueError) as error:
        raise TrainingError(f"{record} cannot be read: {error}") from error
    for path, files in _fingerprints(settings).items():
        before = old.get(path, {})
        changed = sorted(n for n in before.keys() | files if before.get(n) != files.get(n))
        if changed:
            raise TrainingError(
                f"{path} has changed since this run began ({', '.join(changed)}), so that the run "
                f"would go on with other data; name another output to train anew, or remove "
                f"{record} if the content is the same"
            )
