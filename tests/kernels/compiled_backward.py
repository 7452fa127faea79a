"""Compiles the backward's kernels for GPUs that this machine does not have.

`python tests/kernels/compiled_backward.py` prints registers, spills, shared memory and multiplier.
"""

from __future__ import annotations

import sys

import triton
from compiled_kernels import Built, built_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmqwen_kernels import backward, backward_kernels
from mmqwen_kernels.backward import Tile

KERNELS = {
    "hidden": backward_kernels._hidden_kernel,
    "below": backward_kernels._hidden_gradient_kernel,
    "weights": backward_kernels._weight_gradient_kernel,
}
ROW_TILES = [tile for _, tile in backward.FEW_ROWS] + list(backward.ROW_TILES)
WEIGHT_TILES = [tile for _, tile in backward.WEIGHT_TILES] + [backward.WEIGHT_TILE_LARGE]
WEIGHT_TILES += [Tile(64, 64, tile.k, 4, 3) for tile in WEIGHT_TILES[:3]]


def compile_backward(
    kernel: str,
    tile: Tile,
    capability: int = 90,
    entries: int = 4,
    even: bool = True,
    parts: tuple[bool, bool] = (True, True),
    dtype: str = "bf16",
    flat: str = "bf16",
) -> Built:
    """Compile as a launch would."""
    function = KERNELS[kernel]
    if kernel == "weights" and not parts[1]:
        tile = tile._replace(stages=max(tile.stages - 1, 2))
    constants = {"NUM_ENTRIES": entries, "GROUP": tile.group, "ALIGN": 8, "BLOCK_K": tile.k}
    if kernel == "weights":
        constants |= {"BLOCK_M": tile.a, "BLOCK_N": tile.b, "BIAS_K": 64}
        constants |= {"FIRST": parts[0], "SECOND": parts[1]}
    else:
        constants |= {"BLOCK_R": tile.a, "BLOCK_N": tile.b, "EVEN_K": even, "SWAP": tile.swap}
    signature, attrs = {}, {}
    for at, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "facts_ptr" or name == "slots_ptr":
            signature[name] = "*i64"
        elif name.endswith("_ptr"):
            signature[name] = f"*{flat if name == 'flat_ptr' else dtype}"
            attrs[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return built_of(built)


def main() -> None:
    for kernel in sys.argv[1:] or KERNELS:
        for tile in WEIGHT_TILES if kernel == "weights" else ROW_TILES:
            built = compile_backward(kernel, tile)
            print(
                f"{kernel:8} {tile.a:3}x{tile.b}x{tile.k} warps {tile.warps} stages {tile.stages} "
                f"swap {tile.swap:d}: {built.registers} registers, {built.stack} spilled, "
                f"{built.shared / 1024:.0f} KiB, {built.multiplier}, "
                f"{built.count('cp.async.c')} async copies",
                flush=True,
            )


if __name__ == "__main__":
    main()
