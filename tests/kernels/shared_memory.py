"""How much shared memory a tile takes, and how much a GPU has."""

from __future__ import annotations

from mmqwen_kernels.tiles import TileConfig

LIMITS = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448}
"""Bytes of a block, at most, by capability (CUDA C++ Programming Guide, "Compute Capabilities")."""
SMALLEST_LIMIT = 101_376
"""Of 8.6, 8.9 and 12.0; others are taken to have no less."""


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a program may use on this GPU."""
    return LIMITS.get(capability, SMALLEST_LIMIT)


def shared_bytes(tile: TileConfig, itemsize: int) -> int:
    """Bytes of the pipeline's ring: every stage holds a tile of x and one of the weights."""
    return tile.num_stages * (tile.block_r + tile.block_n) * tile.block_k * itemsize
