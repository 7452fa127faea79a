"""From a plain folder of .npy files to a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmqwen.data.banks import BankItem
from mmqwen.data.errors import DatasetError
from mmqwen.data.format import TextLines, read_sample
from mmqwen.data.writer import DatasetWriter

SAMPLES_FILE = "samples.jsonl"


def from_npy_folder(
    folder: str | Path,
    output: str | Path,
    modalities: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Make a dataset from a folder with `samples.jsonl` and the .npy files that it names.

    A line is that of a dataset with file names in place of item numbers:
    `{"prompt": "<|m1|> is", "answer": " a cat", "items": {"m1": ["cats/0001.npy"]}}`. A file that
    several samples name is stored once. Rows of a bank may be named as in a dataset.

    Args:
        folder: the folder; file names are relative to it and stay within it.
        output: directory to create.
        modalities: `{"m1": 768}` or specs.
        dtype: of the stored rows.

    Returns:
        `output` as a path.

    Raises:
        DatasetError: with file and line, if a line, a file or its rows cannot be used. Nothing is
            written then.
    """
    folder, output = Path(folder), Path(output)
    file = folder / SAMPLES_FILE
    if not file.is_file():
        raise DatasetError(f"{folder}: there is no {SAMPLES_FILE}")
    known: dict[tuple[str, str], int] = {}
    with DatasetWriter(output, modalities, dtype=dtype) as writer:
        for number, raw in enumerate(TextLines(file), start=1):
            try:
                sample = read_sample(raw, str)
                items: dict[str, list[Any]] = {}
                for name, given in sample.items.items():
                    for one in given:
                        if isinstance(one, str) and (name, one) not in known:
                            known[name, one] = writer.add_item(name, _load(folder, one))
                    items[name] = [
                        one.rows if isinstance(one, BankItem) else known[name, one] for one in given
                    ]
                if sample.prompt is not None and sample.answer is not None:
                    writer.add(sample.prompt, sample.answer, items, choices=sample.choices)
                else:
                    writer.add_messages(sample.messages, items, choices=sample.choices)
            except (ValueError, OSError) as error:
                text = str(error).removeprefix(f"{output}, sample {number}: ")
                raise DatasetError(f"{file}:{number}: {text}") from error
    return output


def _load(folder: Path, name: str) -> np.ndarray:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name} lies outside of {folder}")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
