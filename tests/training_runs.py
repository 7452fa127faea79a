"""A small dataset, short training runs over it, and their loss curves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mmqwen.data import DatasetWriter
from mmqwen.training import TrainSettings

WORDS = (" picture", " sensor", " train")
WIDTHS = {"m1": 24, "m2": 40}

SAME_CURVE = 1e-4
"""Largest relative difference of a loss between runs of up to ten steps that differ in the order of
sums alone. A loss, a mean of several tokens, rounds by some 1e-7, and a step's update passes on at
most twice what it was given: 1e-7 * 2**10. Another sample, weight or random state shows at 1e-2.
"""


def write_data(path: Path, samples: int = 24, seed: int = 0) -> Path:
    """Rows with a mark that says the answer; every fourth sample has m2 too, the last has none."""
    g = torch.Generator().manual_seed(seed)
    with DatasetWriter(path, WIDTHS) as writer:
        for index in range(samples):
            kind = index % 3
            rows = torch.randn(1 + index % 4, 24, generator=g)
            rows[:, kind] += 5
            if index == samples - 1:
                writer.add("Describe the", WORDS[kind])
            elif index % 4:
                writer.add("Describe <|m1|> the", WORDS[kind], {"m1": [rows]})
            else:
                question = {"role": "user", "content": "What <|m1|> <|m2|>?"}
                answer = {"role": "assistant", "content": WORDS[kind].strip()}
                extra = torch.randn(40, generator=g)
                writer.add_messages([question, answer], {"m1": [rows], "m2": [extra]})
    return path


def losses(folder: Path) -> list[float]:
    """The loss of each step, from the report of an output."""
    log = json.loads((folder / "training.json").read_text())["log"]
    return [entry["loss"] for entry in log if "loss" in entry]


def settings_for(places, name: str, **options) -> TrainSettings:
    model, data, folder = places
    fields = {"max_steps": 6, "tokens_per_step": 96, "lr": 1e-2, "log_steps": 1, "save_steps": 3}
    fields |= {"cpu": True, "progress": False, **options}
    return TrainSettings(model=model, data=data, output=folder / name, **fields)
