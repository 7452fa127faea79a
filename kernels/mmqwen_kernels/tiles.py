"""How the kernels are launched: a frozen value from a pure function of shapes and device.

Figures cited here were measured on one H100 80GB HBM3 (bf16, torch 2.11.0, triton 3.6.0,
2026-11-24) by trying 6 to 21 tiles at each of 76 points, one and four modalities of 1 to 8192
rows: D = H of 1024 and 4096 (`benchmarks/results/kernels_sweep_h100.json`), and from 256 rows on
of 2048, 2560 and 5120 (`kernels_sweep_h100_2f395d0.json`); 129 to 512 rows on 2026-11-26
(`kernels_sweep_narrow_h100.json`); docs/kernels.md. "Not measured" marks
choices that only compile (`tests/kernels/test_compile.py`) and compute right under the interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

TRITON_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""What the kernels are written for, with Triton's names."""


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
    """

    up: TileConfig
    down: TileConfig
    block_t: int = 8
    block_d: int = 1024
    dependent: bool = False


# Hopper, 16 bit. One rule for all: of the tiles that fit the largest modality's rows, from narrow
# to wide, the first of which all tiles run at once, at most one a multiprocessor; where there is
# none, the last, unless waves of the one before it cost less (`WIDE_WAVE`).
#
# Every one of them multiplies by wgmma, with the weight rows (swap) or x's as the M of 64, and goes
# through K in order, so that a row's bits do not depend on its batch. Split-K for few rows would
# break that; more stages make up for it.


def _few(rows: int, num_stages: int) -> tuple[TileConfig, TileConfig]:
    tile = TileConfig(rows, 64, 128, num_warps=4, num_stages=num_stages, swap=True)
    return tile, replace(tile, num_stages=4)


FEW = {rows: _few(rows, 6) for rows in (16, 32)}
FEW_DOWN = {rows: _few(rows, 8) for rows in (16, 32)}
"""Up to 16 or 32 rows a modality: weights stream. Several waves run better two to a processor."""
LARGE = (
    TileConfig(128, 64, 128, num_warps=4, num_stages=4),
    TileConfig(128, 128, 64, num_warps=4, num_stages=4, group_r=8),
)
LARGE_UP = (
    *LARGE,
    TileConfig(128, 128, 64, num_warps=4, num_stages=3, group_r=8),
    TileConfig(128, 256, 64, num_warps=8, num_stages=3, group_r=8),
)
LARGE_DOWN = (*LARGE, TileConfig(128, 256, 64, num_warps=8, num_stages=4, group_r=16))
"""At 8192 rows of D = H = 4096 a step takes 467 us with 128x256 for K1, 482 with 128x128, 477 with
256x128; and, K1 with 128x128, 478 and 561 with 128x256 and 128x128 for K2. Of 128x128, K1 runs two
programs a multiprocessor."""
WIDE_WAVE = 1.6
"""A wave of 128x256 taken for as many of 128x128. For K2, three waves of these beat two of those by
4 to 14 us at (D, rows) of (2560, 2048) and (5120, 1024); five lost to three by 0 to 12 at (2560,
4096) and (5120, 2048), sixteen to eight by 80 at (4096, 8192). For K1 the same points say the same:
3 to 4 us gained, 1 to 2 (within the noise) and 14 lost."""
MIDDLE_UP = (
    TileConfig(64, 32, 128, num_warps=4, num_stages=6),
    TileConfig(64, 64, 128, num_warps=4, num_stages=4),
    TileConfig(64, 128, 128, num_warps=4, num_stages=4),
)
MIDDLE_DOWN = (
    TileConfig(64, 64, 128, num_warps=4, num_stages=6),
    TileConfig(64, 128, 128, num_warps=4, num_stages=4),
)
"""33 to 128 rows: two row tiles at most. From 65 on, where even the widest takes several waves,
`LARGE`; up to 64 half of its rows would be padding (119 us instead of 105 to 110, four modalities
of 64 rows at D = 5120, one kernel changed at a time)."""
NARROW = TileConfig(64, 64, 128, num_warps=4, num_stages=4)
"""129 to 512 rows, where all of these run at once: alone in K1 they take a step of D = H = 1024
from 15.5 to 13.2 us at 256 rows and from 16.1 to 14.8 at 512, alone in K2 to 14.0 and 15.3. In two
waves they lose: 25.0 instead of 22.1 at D = 2560, 34.6 instead of 31.6 at 4096 (256 rows)."""
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


def choose_config(
    counts: Sequence[int],
    widths: Sequence[int],
    hidden: Sequence[int],
    columns: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    num_sms: int,
    *,
    aligned: bool = True,
    norms: bool = False,
) -> LaunchConfig:
    """Pick tiles for one step. A pure function; nothing is tuned at run time.

    Args:
        counts: rows per modality, zeros allowed.
        widths: d per modality.
        hidden: H per modality.
        columns: D.
        dtype: of rows and weights.
        capability: (major, minor) of the GPU.
        num_sms: its number of multiprocessors.
        aligned: every address and row stride is a multiple of 16 bytes.
        norms: K1 normalises rows.

    Raises:
        ValueError: the lists differ in length.
    """
    if not len(counts) == len(widths) == len(hidden):
        raise ValueError(
            f"{len(counts)} counts, {len(widths)} widths and {len(hidden)} hidden sizes, expected "
            "one of each per modality"
        )
    most = max(counts, default=0)
    ups, downs = _candidates(most, dtype, capability, aligned, norms)
    up = _cheapest(ups, counts, hidden, num_sms)
    down = _cheapest(downs, counts, [columns] * len(counts), num_sms)
    return LaunchConfig(
        up,
        down,
        block_d=text_columns(columns),
        dependent=launches_dependently(capability),
    )


def text_columns(columns: int) -> int:
    """Columns of a text tile: as many as a row has, where it is narrow, up to a power of two."""
    return min(1024, max(64, 1 << (columns - 1).bit_length()))


def launches_dependently(capability: tuple[int, int]) -> bool:
    """Whether this GPU has programmatic dependent launch."""
    return capability >= (9, 0)


def every_tile(
    dtype: torch.dtype, capability: tuple[int, int], aligned: bool, norms: bool = False
) -> tuple[list[TileConfig], list[TileConfig]]:
    """All tiles of K1 and of K2 that `choose_config` can give."""
    ups: dict[TileConfig, None] = {}
    downs: dict[TileConfig, None] = {}
    for most in ROW_CLASSES:
        up, down = _candidates(most, dtype, capability, aligned, norms)
        ups |= dict.fromkeys(up)
        downs |= dict.fromkeys(down)
    return list(ups), list(downs)


ROW_CLASSES = (16, 32, 64, 128, 512, 513)
"""One number of rows of each class of `_candidates`."""

_Candidates = tuple[Sequence[TileConfig], Sequence[TileConfig]]


def _candidates(
    most: int, dtype: torch.dtype, capability: tuple[int, int], aligned: bool, norms: bool
) -> _Candidates:
    """Tiles of K1 and of K2, each from narrow to wide, for at most `most` rows a modality."""
    if dtype == torch.float32:
        return _alone(FP32_16 if most <= 16 else FP32_MIDDLE)
    if not aligned:
        return _alone(UNALIGNED_16 if most <= 16 else UNALIGNED_MIDDLE)
    if capability not in ((9, 0), (10, 0)):
        if most <= 16:
            return _alone(DEFAULT_16)
        return _alone(DEFAULT_MIDDLE if most <= 128 else DEFAULT_LARGE)
    ups, downs = _hopper(most)
    if capability == (10, 0):
        # Hopper's, not measured here. A 128x128 accumulator in four warps spills 80 bytes, in eight
        # none; a 128x256 one spills 160 bytes with triton 3.6 (3.9: none), so it is left out.
        ups = [_in_more_warps(tile) for tile in ups if tile.block_n < 256]
        downs = [_in_more_warps(tile) for tile in downs if tile.block_n < 256]
    elif norms:  # 128x256 spills up to 1 KB (triton 3.9) where activations differ as well
        ups = [_for_norms(tile) for tile in ups if tile.block_n < 256]
    return ups, downs


def _alone(tile: TileConfig) -> _Candidates:
    return (tile,), (tile,)


def _hopper(most: int) -> _Candidates:
    if most <= 32:
        rows = 16 if most <= 16 else 32
        return FEW[rows], FEW_DOWN[rows]
    if most <= 64:
        return MIDDLE_UP, MIDDLE_DOWN
    if most <= 128:
        return (*MIDDLE_UP, *LARGE_UP), (*MIDDLE_DOWN, *LARGE_DOWN)
    if most <= 512:
        return (NARROW, *LARGE_UP), (NARROW, *LARGE_DOWN)
    return LARGE_UP, LARGE_DOWN


def _for_norms(tile: TileConfig) -> TileConfig:
    """The tile for rows that K1 normalises on their way to the MMA. Not measured, only compiled.

    Rows on its left would stay in registers: each product waits for the one before it (ptxas'
    C7514), and 128x64 spills 384 bytes. On the right they go by shared memory, and neither happens.
    """
    # Fewer weight rows than 64 would fall back to mma.sync.
    return _in_more_warps(replace(tile, swap=True, block_n=max(64, tile.block_n)))


def _in_more_warps(tile: TileConfig) -> TileConfig:
    """A 128x128 tile in eight warps; others as they are."""
    return replace(tile, num_warps=8) if tile.block_r * tile.block_n == 128 * 128 else tile


def _cheapest(
    candidates: Sequence[TileConfig], counts: Sequence[int], columns: Sequence[int], num_sms: int
) -> TileConfig:
    """The first tile of which all run at once; else the last or the one before (`WIDE_WAVE`)."""
    for tile in candidates:
        if tile.tiles(counts, columns) <= num_sms:
            return tile
    last = candidates[-1]
    if last.block_n == 256:  # after 128x128, in `LARGE_UP` and `LARGE_DOWN`
        narrower = candidates[-2]
        waves, more = (-(-tile.tiles(counts, columns) // num_sms) for tile in (last, narrower))
        if more < WIDE_WAVE * waves:
            return narrower
    return last
