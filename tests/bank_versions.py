"""Versions of banks, and requests that name their rows, for tests of updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engines import TOLERANCE
from mmqwen.banks import BankRows, build_bank

ROWS, WIDTH = 50, 24
TEXT = "what does the sensor say about the engine?"


def table(seed: int, rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    """The rows of a version."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, name: str, rows: torch.Tensor, modality: str = "m1", **fields: Any) -> str:
    """A bank's file, with keys `KEY-0` on."""
    np.save(folder / "rows.npy", rows.numpy())
    keys = folder / "keys.txt"
    keys.write_text("".join(f"KEY-{row}\n" for row in range(len(rows))))
    file = folder / f"{name}.bank"
    build_bank(folder / "rows.npy", file, modality=modality, keys=keys, **fields)
    return str(file)


def asked(bank: str, ids: list[int], text: str = "see <|m1|> now") -> dict[str, Any]:
    """A prompt that names rows."""
    return {"prompt": text, "multi_modal_data": {"m1": [BankRows(bank, ids)]}}


def sent(rows: torch.Tensor, ids: list[int], text: str = "see <|m1|> now") -> dict[str, Any]:
    """The same prompt with the rows themselves."""
    return {"prompt": text, "multi_modal_data": {"m1": [rows[ids]]}}


def first_of(output: Any) -> dict[int, float]:
    """The first token's candidates with their log-probabilities."""
    return {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}


def is_answer(got: Mapping[int, float], expected: Mapping[int, float]) -> bool:
    """Whether two answers are one but for rounding: of candidates as good, any may be missing."""
    shared = got.keys() & expected.keys()
    return len(shared) >= 3 and all(abs(got[t] - expected[t]) <= TOLERANCE for t in shared)
