"""The choice of tiles: a pure function, total, within each GPU's limits."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmqwen_kernels import launch
from mmqwen_kernels.launch import LaunchConfig, TileConfig, choose_config, shared_limit

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
ROWS = [0, 1, 7, 8, 16, 17, 32, 33, 64, 128, 129, 256, 512, 1024, 4096, 8192]


def choose(
    counts: list[int],
    dtype: torch.dtype = torch.bfloat16,
    capability: tuple[int, int] = (9, 0),
    size: int = 4096,
    **more: object,
) -> LaunchConfig:
    widths, hidden = [1024] * len(counts), [size] * len(counts)
    return choose_config(counts, widths, hidden, size, dtype, capability, 132, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_choice_fits_the_gpu(capability: tuple[int, int]) -> None:
    for rows, dtype, size, aligned, mode in itertools.product(
        ROWS,
        (torch.bfloat16, torch.float16, torch.float32),
        (64, 1024, 2560, 8192),
        (True, False),
        launch.MODES,
    ):
        for counts in ([rows], [rows, 1], [rows // 4] * 4):
            config = choose(counts, dtype, capability, size, aligned=aligned, mode=mode)
            for tile in (config.up, config.down):
                assert tile.shared_bytes(dtype.itemsize) <= shared_limit(capability)
                for value in (tile.block_r, tile.block_n, tile.block_k, tile.num_warps):
                    assert value & (value - 1) == 0
                assert min(tile.block_r, tile.block_n, tile.block_k) >= 16, "tl.dot's minimum"
                accumulators = tile.block_r * tile.block_n // (32 * tile.num_warps)
                assert accumulators <= 128, "the accumulator alone would fill the registers"
            assert config.reason


def test_hopper_thresholds_follow_the_measured_winners() -> None:
    assert choose([1]).up == launch.UP_16
    assert choose([16]).down == launch.DOWN_16
    assert choose([17]).down == launch.DOWN_32
    assert choose([32]).up == launch.UP_32
    assert choose([33]).up == choose([128]).up == launch.MIDDLE_NARROW
    assert choose([8192]).up == launch.LARGE
    assert choose([8192]).down == launch.LARGE_WIDE
    assert choose([1]).up.swap
    assert not choose([64]).up.swap
    # The largest modality decides, rows of others ride along.
    assert choose([1, 1, 1, 64]).down == launch.MIDDLE_NARROW


def test_wgmma_needs_64_rows_of_one_operand() -> None:
    for rows in ROWS:
        config = choose([rows])
        for tile in (config.up, config.down):
            assert (tile.block_n if tile.swap else tile.block_r) >= 64


def test_mid_sizes_avoid_an_almost_empty_last_wave() -> None:
    """Four modalities of 128 to 1024 rows: never worse than always taking the widest tile."""
    columns = [4096] * 4

    def cost(tile: TileConfig, counts: list[int]) -> float:
        waves = -(-tile.tiles(counts, columns) // 132)
        return waves * tile.block_r * tile.block_n / launch.EFFICIENCY[tile]

    for rows in range(130, 1025, 37):
        counts = [rows] * 4
        assert cost(choose(counts).down, counts) <= cost(launch.LARGE_WIDE, counts)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("aligned", [True, False])
def test_batch_invariant_does_not_look_at_the_batch(
    capability: tuple[int, int], dtype: torch.dtype, aligned: bool
) -> None:
    tiles = {
        (config.up, config.down)
        for config in (
            choose([rows], dtype, capability, aligned=aligned, mode="batch_invariant")
            for rows in ROWS
        )
    }
    assert len(tiles) == 1


def test_dependent_launch_on_hopper_with_few_rows_only() -> None:
    assert choose([1]).dependent
    assert not choose([8192]).dependent
    assert not choose([1], capability=(8, 0)).dependent


def test_same_in_same_out() -> None:
    assert choose([3, 900]) == choose([3, 900])
    assert hash(choose([3])) == hash(choose([3]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        choose([1], mode="best")
    with pytest.raises(ValueError, match="one of each"):
        choose_config([1], [8, 8], [8], 8, torch.float32, (9, 0), 132)


def test_shared_bytes_and_tiles() -> None:
    tile = TileConfig(64, 128, 64, num_warps=4, num_stages=3)
    assert tile.shared_bytes(2) == 3 * (64 + 128) * 64 * 2
    assert tile.tiles([65, 0, 1], [129, 500, 128]) == 2 * 2 + 0 + 1
