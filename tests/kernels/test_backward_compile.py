"""The backward's kernels compile without a GPU, without spills, and use the tensor cores."""

from __future__ import annotations

import pytest
from can_compile import WHY_NOT

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

from compiled_backward import ROW_TILES, WEIGHT_TILES, compile_backward

from mmqwen_kernels.launch import shared_limit

CASES = [("below", tile) for tile in ROW_TILES]
CASES += [("hidden", tile) for tile in ROW_TILES]
CASES += [("weights", tile) for tile in WEIGHT_TILES]


@pytest.mark.parametrize(("kernel", "tile"), CASES, ids=str)
def test_sm_90(kernel, tile):
    built = compile_backward(kernel, tile)
    assert built.stack == 0
    assert built.multiplier == "wgmma"
    # Few rows: weights stream, products wait for memory anyhow.
    assert not built.serialized or (kernel == "below" and tile.swap)
    assert built.count("cp.async.c") > 0
    assert built.shared <= shared_limit((9, 0))


@pytest.mark.parametrize("parts", [(True, False), (False, True)])
def test_one_half_at_a_time_and_float32_gradients(parts):
    built = compile_backward("weights", WEIGHT_TILES[-4], parts=parts, flat="fp32", entries=1)
    assert built.stack == 0
    # Of 255 registers two to four are too few where D is no multiple of 64, outside the loop.
    assert compile_backward("below", ROW_TILES[2], even=False, dtype="fp16").stack <= 16
