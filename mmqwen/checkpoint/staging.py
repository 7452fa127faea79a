"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmqwen.checkpoint.names import CheckpointError


def check_output(output: Path) -> None:
    """Refuse a path that holds something.

    Raises:
        CheckpointError: `output` is a file, or a directory that is not empty.
    """
    if output.is_dir():
        if any(output.iterdir()):
            raise CheckpointError(f"output {output} is not empty; name a new directory")
    elif output.exists() or output.is_symlink():
        raise CheckpointError(f"output {output} exists and is not a directory")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A directory beside `output` that takes its name when the block ends, or vanishes.

    Raises:
        CheckpointError: the file system refuses.
    """
    stage: Path | None = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o777 & ~mask)  # mkdtemp's 0700 would hide the checkpoint from other users
        yield stage
        for file in stage.iterdir():  # safetensors writes with mode 0600; links stay
            if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(0o666 & ~mask)
        stage.rename(output)  # over an empty directory at most
    except OSError as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    finally:
        if stage is not None and stage.exists():
            shutil.rmtree(stage, ignore_errors=True)
