"""The choice of tiles: a pure function, total, within each GPU's limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from shared_memory import shared_bytes, shared_limit

from mmqwen_kernels.tiles import LaunchConfig, TileConfig, choose_config, every_tile

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
    for rows, dtype, size, aligned in itertools.product(
        ROWS,
        (torch.bfloat16, torch.float16, torch.float32),
        (64, 1024, 2560, 8192),
        (True, False),
    ):
        for counts in ([rows], [rows, 1], [rows // 4] * 4):
            config = choose(counts, dtype, capability, size, aligned=aligned)
            for tile in (config.up, config.down):
                assert shared_bytes(tile, dtype.itemsize) <= shared_limit(capability)
                for value in (tile.block_r, tile.block_n, tile.block_k, tile.num_warps):
                    assert value & (value - 1) == 0
                assert min(tile.block_r, tile.block_n, tile.block_k) >= 16, "tl.dot's minimum"
                accumulators = tile.block_r * tile.block_n // (32 * tile.num_warps)
                assert accumulators <= 128, "the accumulator alone would fill the registers"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_that_are_normalised_fit_as_well(capability: tuple[int, int]) -> None:
    for rows, size, aligned in itertools.product(ROWS, (1024, 4096), (True, False)):
        tile = choose([rows], capability=capability, size=size, aligned=aligned, norms=True).up
        assert shared_bytes(tile, 2) <= shared_limit(capability)
        assert tile in every_tile(torch.bfloat16, capability, aligned, norms=True)[0]
        if capability == (9, 0) and aligned:
            assert tile.swap
            assert tile.block_n >= 64, "wgmma"


def test_the_narrowest_tile_that_fits_one_wave() -> None:
    """The winners of the sweeps (docs/kernels.md)."""

    def tiles(counts: list[int], size: int = 4096) -> list[tuple[int, int]]:
        config = choose(counts, size=size)
        return [(t.block_r, t.block_n) for t in (config.up, config.down)]

    assert tiles([1]) == tiles([16]) == [(16, 64), (16, 64)]
    assert tiles([17]) == [(32, 64), (32, 64)]
    assert tiles([64]) == [(64, 32), (64, 64)]
    assert tiles([128]) == [(64, 64), (64, 64)]
    assert tiles([64] * 4) == [(64, 128), (64, 128)]
    assert tiles([128] * 4) == [(128, 128), (128, 128)]
    assert tiles([256]) == [(128, 64), (128, 64)]
    assert tiles([1024]) == [(128, 256), (128, 256)]
    assert tiles([8192]) == [(128, 256), (128, 256)]
    assert tiles([256], size=1024) == tiles([512], size=1024) == [(64, 64), (64, 64)]
    assert tiles([256], size=2560) == [(128, 64), (128, 64)]  # 64x64 would take two waves
    assert tiles([1024], size=1024) == [(128, 64), (128, 64)]
    assert tiles([2048], size=2560) == [(128, 128), (128, 128)]  # three waves instead of two
    assert tiles([4096], size=2560) == [(128, 256), (128, 256)]  # five instead of three
    assert tiles([64] * 4, size=5120) == [(64, 128), (64, 128)]  # two waves, no padding
    # The largest modality decides, rows of others ride along.
    assert tiles([1, 1, 1, 64])[1] == (64, 128)


def test_several_waves_of_few_rows_take_a_shorter_pipeline() -> None:
    """So that two programs share a multiprocessor."""
    alone, four = choose([8]), choose([8] * 4)
    assert alone.up.num_stages == 6
    assert alone.down.num_stages == 8
    assert four.up.num_stages == four.down.num_stages == 4
    assert 2 * shared_bytes(four.up, 2) <= shared_limit((9, 0))


def test_wgmma_needs_64_rows_of_one_operand() -> None:
    for rows in ROWS:
        config = choose([rows])
        for tile in (config.up, config.down):
            assert (tile.block_n if tile.swap else tile.block_r) >= 64


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("aligned", [True, False])
def test_every_tile_names_all_that_can_be_chosen(
    capability: tuple[int, int], aligned: bool
) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        ups, downs = every_tile(dtype, capability, aligned)
        assert len(ups) == len(set(ups))
        for counts in ([rows, other] for rows in ROWS for other in (0, 1, 200)):
            for size in (64, 1024, 4096):
                config = choose(counts, dtype, capability, size, aligned=aligned)
                assert config.up in ups
                assert config.down in downs


def test_dependent_launch_from_hopper_on() -> None:
    assert choose([1]).dependent
    assert choose([8192]).dependent
    assert not choose([1], capability=(8, 0)).dependent


def test_same_in_same_out() -> None:
    assert choose([3, 900]) == choose([3, 900])
    assert hash(choose([3])) == hash(choose([3]))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one of each"):
        choose_config([1], [8, 8], [8], 8, torch.float32, (9, 0), 132)


def test_tiles_are_counted_by_modality() -> None:
    tile = TileConfig(64, 128, 64, num_warps=4, num_stages=3)
    assert tile.tiles([65, 0, 1], [129, 500, 128]) == 2 * 2 + 0 + 1
