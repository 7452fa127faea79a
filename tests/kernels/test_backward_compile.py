"""The backward's kernels compile without a GPU and use the tensor cores; one may spill a little."""

from __future__ import annotations

import pytest
from can_compile import WHY_NOT

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

import triton
from compiled_backward import ROW_TILES, WEIGHT_TILES, compile_backward

from mmqwen_kernels.launch import shared_limit

CASES = [("below", tile) for tile in ROW_TILES]
CASES += [("hidden", tile) for tile in ROW_TILES]
CASES += [("weights", tile) for tile in WEIGHT_TILES]


def spilled(kernel, tile, even):
    """Bytes of stack that are known: B2's 128x256 wants up to 4 registers more than there are.

    By triton 3.7 always, by others where D is no multiple of 64.
    """
    wide = kernel == "below" and tile.b == 256
    return 16 if wide and (not even or triton.__version__.startswith("3.7.")) else 0


@pytest.mark.parametrize(("kernel", "tile"), CASES, ids=str)
def test_sm_90(kernel, tile):
    built = compile_backward(kernel, tile)
    assert built.stack <= spilled(kernel, tile, even=True)
    assert built.multiplier == "wgmma"
    # Few rows: weights stream, products wait for memory anyhow.
    assert built.serialized == (kernel == "below" and tile.swap)
    assert built.assumes == (kernel != "weights")
    assert built.count("cp.async.c") > 0
    assert built.shared <= shared_limit((9, 0))


@pytest.mark.parametrize("parts", [(True, False), (False, True)])
def test_one_half_at_a_time_and_float32_gradients(parts):
    built = compile_backward("weights", WEIGHT_TILES[-4], parts=parts, flat="fp32", entries=1)
    assert built.stack == 0
    masked = compile_backward("below", ROW_TILES[2], even=False, dtype="fp16")
    assert masked.stack <= spilled("below", ROW_TILES[2], even=False)
