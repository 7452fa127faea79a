"""How the kernels are launched: a frozen value from a pure function of shapes and device.

Figures cited here are those of `docs/kernels.md`, section "Where the tiles come from": measured
with a prototype on one H100 80GB (bf16, torch 2.11, triton 3.6). Those marked *not measured* are
choices that only compile (`tests/kernels/test_compile.py`) and compute right under the
interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

Mode = Literal["fastest", "batch_invariant"]
MODES: tuple[Mode, ...] = ("fastest", "batch_invariant")

SHARED_BYTES = {(8, 0): 166_912, (8, 7): 166_912, (9, 0): 232_448, (10, 0): 232_448}
"""Shared memory of a block, at most, by capability (CUDA C++ Programming Guide, "Compute
Capabilities"). Others are taken to have what the smallest, 8.6, 8.9 and 12.0, have."""
SHARED_BYTES_DEFAULT = 101_376


@dataclass(frozen=True)
class TileConfig:
    """Tile of one grouped multiplication, rows x columns, and how it is run.

    Attributes:
        block_r: rows of x in a tile.
        block_n: weight rows (output columns) in a tile.
        block_k: depth of one step of the loop.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        group_r: row tiles that share their weight tiles in L2; 1: plain order.
        swap: the weight rows fill the MMA's M, so that few rows of x waste nothing.
    """

    block_r: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_r: int = 1
    swap: bool = False

    def shared_bytes(self, itemsize: int) -> int:
        """Bytes of the pipeline's ring: every stage holds a tile of x and one of the weights."""
        return self.num_stages * (self.block_r + self.block_n) * self.block_k * itemsize

    def tiles(self, counts: Sequence[int], columns: Sequence[int]) -> int:
        """Programs for `counts` rows per modality with `columns` output columns each."""
        return sum(
            -(-count // self.block_r) * -(-width // self.block_n)
            for count, width in zip(counts, columns, strict=True)
        )


@dataclass(frozen=True)
class LaunchConfig:
    """Everything that a step's launches need to know beyond its tensors.

    Attributes:
        up: tiles of K1, `hidden = relu(W1 x + b1)`.
        down: tiles of K2, `out = W2 hidden + b2`.
        block_t: tokens in a tile of text rows.
        block_d: columns in a tile of text rows.
        dependent: K2 is launched before K1 ends (programmatic dependent launch).
        prefetch_programs: programs of K1 that bring W2 into L2; 0: none. An experiment.
        reason: why these, in words.
    """

    up: TileConfig
    down: TileConfig
    block_t: int = 4
    block_d: int = 1024
    dependent: bool = False
    prefetch_programs: int = 0
    reason: str = ""


# Few rows: reading the weights is all the work, so many loads in flight. Best of the prototype:
# K1 swapped 64x16, K 128, with split-K 2; K2 swapped 64x16, K 256, 4 stages; 24.4 us for both at
# R = 1, D = H = 4096, against 37 to 51 by torch. Split-K is left out: it makes a row's bits depend
# on its batch. 6 stages in place of the second half of the split: not measured.
UP_16 = TileConfig(16, 64, 128, num_warps=4, num_stages=6, swap=True)
DOWN_16 = TileConfig(16, 64, 256, num_warps=4, num_stages=4, swap=True)
# R <= 32: swapped 64x32 won (unswapped tiles of 16 or 32 rows fall back from wgmma to mma.sync).
UP_32 = TileConfig(32, 64, 128, num_warps=4, num_stages=4, swap=True)
DOWN_32 = TileConfig(32, 64, 128, num_warps=4, num_stages=4, swap=True)
# R = 33 to 128: 64x64 or 64x128 won, 27 to 30 us. Which of them, by the number of tiles.
MIDDLE_NARROW = TileConfig(64, 64, 64, num_warps=4, num_stages=4)
MIDDLE_WIDE = TileConfig(64, 128, 64, num_warps=4, num_stages=4)
# R > 128: K1 128x128x64, 3 stages, 4 warps (505 TFLOP/s with gathered rows); K2 128x256x64,
# 4 stages, 8 warps, groups of 16 (770 TFLOP/s at R = 8192; 8192^3 by cuBLAS: 790).
LARGE = TileConfig(128, 128, 64, num_warps=4, num_stages=3, group_r=8)
LARGE_WIDE = TileConfig(128, 256, 64, num_warps=8, num_stages=4, group_r=16)
# Any other GPU: not measured. Fits the 99 KiB of shared memory of 8.6, 8.9 and 12.0.
DEFAULT_16 = TileConfig(16, 64, 128, num_warps=4, num_stages=3, swap=True)
DEFAULT_MIDDLE = TileConfig(64, 64, 64, num_warps=4, num_stages=3)
DEFAULT_LARGE = TileConfig(128, 128, 64, num_warps=8, num_stages=3, group_r=8)
# fp32 is multiplied in full fp32 (FMA, no tensor cores): not measured.
FP32_16 = TileConfig(16, 64, 64, num_warps=4, num_stages=3)
FP32_MIDDLE = TileConfig(64, 64, 32, num_warps=8, num_stages=3)
# Rows that are not 16-byte aligned cannot be copied 16 bytes at a time: not measured.
UNALIGNED_16 = TileConfig(16, 64, 64, num_warps=4, num_stages=2, swap=True)
UNALIGNED_MIDDLE = TileConfig(64, 64, 32, num_warps=4, num_stages=2)

EFFICIENCY = {LARGE_WIDE: 0.97, LARGE: 0.75, MIDDLE_WIDE: 0.55, MIDDLE_NARROW: 0.42}
"""Share of the tensor cores' peak that a tile keeps busy once there are many. LARGE_WIDE: 770 of
790 TFLOP/s. LARGE: between its 505 of 790 with gathered rows and what contiguous rows should give.
The middle ones: not measured, in proportion to the shared-memory traffic of a tile."""


LONG_TEXT = 1024
"""Tokens from which text tiles are large: not measured."""
UP_LARGE = (LARGE, MIDDLE_WIDE, MIDDLE_NARROW)
DOWN_LARGE = (LARGE_WIDE, LARGE, MIDDLE_WIDE, MIDDLE_NARROW)


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a program may use on this GPU."""
    return SHARED_BYTES.get(capability, SHARED_BYTES_DEFAULT)


def choose_config(
    counts: Sequence[int],
    widths: Sequence[int],
    hidden: Sequence[int],
    columns: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    num_sms: int,
    *,
    num_tokens: int = 0,
    aligned: bool = True,
    mode: Mode = "fastest",
) -> LaunchConfig:
    """Pick tiles for one step. A pure function; nothing is tuned at run time.

    A row's bits do not depend on the tile in principle: no config splits K, all go through it in
    the same order, and tensor cores add in steps of 16 in each. That is not yet verified on a GPU,
    so `mode="batch_invariant"` exists: there the tiles do not depend on `counts` at all.

    Args:
        counts: rows per modality, zeros allowed.
        widths: d per modality.
        hidden: H per modality.
        columns: D.
        dtype: of rows and weights.
        capability: (major, minor) of the GPU.
        num_sms: its number of multiprocessors.
        num_tokens: T, text or not.
        aligned: every address and row stride is a multiple of 16 bytes.
        mode: one of `MODES`.

    Raises:
        ValueError: `mode` is unknown, or the lists differ in length.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}, expected one of {MODES}")
    if not len(counts) == len(widths) == len(hidden):
        raise ValueError(
            f"{len(counts)} counts, {len(widths)} widths and {len(hidden)} hidden sizes, expected "
            "one of each per modality"
        )
    most = max(counts, default=0)
    if dtype == torch.float32:
        up, down, reason = _pick_plain(most, mode, FP32_16, FP32_MIDDLE, "fp32 by FMA")
    elif not aligned:
        up, down, reason = _pick_plain(
            most, mode, UNALIGNED_16, UNALIGNED_MIDDLE, "rows not 16-byte aligned"
        )
    elif capability in ((9, 0), (10, 0)):
        hopper = capability == (9, 0)
        up, down, reason = _pick_hopper(
            counts, hidden, columns, num_sms, mode, DOWN_LARGE if hopper else DOWN_LARGE[1:]
        )
        if not hopper:
            # On sm_100 a 128x128 accumulator in four warps spills 80 bytes, in eight none; a
            # 128x256 one spills 160 bytes with triton 3.6 (3.9: none), so it is left out.
            up, down = (replace(t, num_warps=8) if t is LARGE else t for t in (up, down))
            reason += " (Hopper's tiles, not measured here)"
    elif mode == "batch_invariant":
        up, down, reason = DEFAULT_MIDDLE, DEFAULT_MIDDLE, "default, same tiles for every batch"
    elif most <= 16:
        up, down, reason = DEFAULT_16, DEFAULT_16, "default for up to 16 rows"
    elif most <= 128:
        up, down, reason = DEFAULT_MIDDLE, DEFAULT_MIDDLE, "default for up to 128 rows"
    else:
        up, down, reason = DEFAULT_LARGE, DEFAULT_LARGE, "default for more than 128 rows"
    # Dependent launch saved 1 to 3 us at small R and nothing at large R.
    dependent = capability >= (9, 0) and most <= 256
    # Text tiles: enough programs for a short step, enough bytes in flight in each for a long one.
    block_d = min(1024, max(64, 1 << (columns - 1).bit_length()))
    return LaunchConfig(
        up, down, 4 if num_tokens <= LONG_TEXT else 16, block_d, dependent=dependent, reason=reason
    )


def _pick_plain(
    most: int, mode: Mode, few: TileConfig, many: TileConfig, why: str
) -> tuple[TileConfig, TileConfig, str]:
    if mode == "batch_invariant":
        return many, many, f"{why}, same tiles for every batch"
    tile = few if most <= 16 else many
    return tile, tile, f"{why}, {most} rows at most"


def _pick_hopper(
    counts: Sequence[int],
    hidden: Sequence[int],
    columns: int,
    num_sms: int,
    mode: Mode,
    down_large: Sequence[TileConfig],
) -> tuple[TileConfig, TileConfig, str]:
    if mode == "batch_invariant":
        return MIDDLE_WIDE, MIDDLE_WIDE, "same tiles for every batch"
    most = max(counts, default=0)
    if most <= 16:
        return UP_16, DOWN_16, "up to 16 rows: swapped, weights stream"
    if most <= 32:
        return UP_32, DOWN_32, "up to 32 rows: swapped, weights stream"
    down_columns = [columns] * len(counts)
    if most <= 128:
        up, down = (
            MIDDLE_NARROW if MIDDLE_NARROW.tiles(counts, of) <= 2 * num_sms else MIDDLE_WIDE
            for of in (hidden, down_columns)
        )
        return up, down, "33 to 128 rows"
    # K1's depth d is short, so that its wide tile's prologue would show; and 128x128 won there.
    up = _least_waves(counts, hidden, num_sms, UP_LARGE)
    down = _least_waves(counts, down_columns, num_sms, down_large)
    return up, down, "more than 128 rows: least predicted time by whole waves"


def _least_waves(
    counts: Sequence[int], columns: Sequence[int], num_sms: int, candidates: Sequence[TileConfig]
) -> TileConfig:
    """The tile whose waves, each as long as its area over its efficiency, are over first.

    Padding to whole row tiles and the last, partly filled wave are what costs with several
    modalities of 100 to 1000 rows (288 tiles on 132 multiprocessors).
    """

    def time(tile: TileConfig) -> float:
        waves = -(-tile.tiles(counts, columns) // num_sms)
        return waves * tile.block_r * tile.block_n / EFFICIENCY[tile]

    return min(candidates, key=time)
