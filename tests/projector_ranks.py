"""Projectors of every kind, as the workers of an engine load and place them; without an engine.

Apart from the tests that start it, so that a process imports torch and little else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmqwen.checkpoint.names import projector_shapes
from mmqwen.modalities import ModalitySpec
from mmqwen.vllm_plugin.projector import ModalityProjectors
from mmqwen_kernels import fuse_embeddings, project_rows

OUT, HIDDEN, WORDS = 64, 41, 8  # of 41 hidden units, one of two ranks lacks one


def load(specs: dict[str, ModalitySpec], rank: int, ranks: int) -> ModalityProjectors:
    """A rank's shares of projectors whose every weight counts: no zero biases, no norm of ones."""
    shares = ModalityProjectors(specs, OUT, rank=rank, ranks=ranks, dtype=torch.float32, place=True)
    generator = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        for part, shape in projector_shapes(spec, OUT).items():
            drawn = torch.randn(shape, generator=generator)
            scaled = drawn * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.5 * drawn
            shares.load(f"projectors.{name}.{part}", scaled)
    return shares


def run(rank: int, ranks: int, file: str, kinds: Sequence[dict[str, Any]]) -> None:
    """One process: its shares of the projectors and of the vocabulary, and one all-reduce."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=ranks
    )
    specs = {}
    for at, fields in enumerate(kinds):
        hidden = {} if fields["layers"] == 1 else {"hidden_dim": HIDDEN}
        specs[f"m{at}"] = ModalitySpec(f"m{at}", 24 + at % 3, **hidden, **fields)
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(WORDS, OUT, generator=generator)
    items = [
        (at, torch.randn(1 + at % 4, spec.dim, generator=generator))
        for at, spec in enumerate(specs.values())
    ]
    # A word before each item.
    is_row = torch.tensor([flag for _, item in items for flag in [False] + [True] * len(item)])
    ids = torch.zeros(len(is_row), dtype=torch.int64)
    ids[~is_row] = torch.arange(len(items)) % WORDS
    whole = load(specs, 0, 1).weights()
    want = [
        torch.cat([table[at % WORDS][None], project_rows(item, whole[at], backend="torch")])
        for at, item in items
    ]
    begin = rank * WORDS // ranks
    fused = fuse_embeddings(
        ids,
        table[begin : begin + WORDS // ranks],
        items,
        load(specs, rank, ranks).weights(),
        slots=is_row,
        vocab_start=begin,
    )
    torch.distributed.all_reduce(fused)
    torch.testing.assert_close(fused, torch.cat(want), atol=1e-4, rtol=1e-4)
    torch.distributed.destroy_process_group()
