"""Compiles the kernels for GPUs that this machine does not have, and reads what came out.

`python tests/kernels/compiled_kernels.py` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from can_compile import CUOBJDUMP
from triton.backends.compiler import GPUTarget

from mmqwen_kernels import ACTIVATIONS, triton_kernels
from mmqwen_kernels.launcher import ast_source, compiler_options
from mmqwen_kernels.tiles import TileConfig, every_tile

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
MIDDLE = TileConfig(64, 64, 128, num_warps=4, num_stages=4)
KERNELS = {
    "up": triton_kernels._project_up_kernel,
    "down": triton_kernels._project_down_kernel,
    "text": triton_kernels._gather_text_kernel,
}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, its tile and the constexprs that a launch would choose."""

    kernel: str  # one of KERNELS
    capability: int
    tile: TileConfig = MIDDLE
    dtype: torch.dtype = torch.bfloat16
    align_bytes: int = 16
    even_k: bool = False
    entries: int = 4
    by_address: bool = True
    activation: str = "relu"  # or "mixed"
    norms: bool = False
    direct: bool = False
    projected: bool = False
    alone: bool = False  # without a K1 before it

    @property
    def name(self) -> str:
        t = self.tile
        parts = [self.kernel, f"sm{self.capability}", TYPES[self.dtype]]
        if self.kernel in ("up", "down"):
            parts += [f"{t.block_r}x{t.block_n}x{t.block_k}", f"{t.num_warps}w{t.num_stages}s"]
            parts += [f"{self.entries}e", "even" if self.even_k else "masked"]
        if self.by_address and self.kernel == "up":
            parts.append("address")
        parts += [self.activation] if self.activation != "relu" else []
        parts += ["norms"] if self.norms else []
        parts += ["direct"] if self.direct else []
        parts += ["projected"] if self.projected else []
        if self.align_bytes != 16:
            parts.append(f"align{self.align_bytes}")
        return "-".join(parts)

    @property
    def dependent(self) -> bool:
        return self.capability >= 90 and not self.alone


@dataclass(frozen=True)
class Built:
    """What a compilation gave."""

    registers: int
    stack: int
    shared: int
    ptx: str
    serialized: bool
    """Each wgmma waits for the one before it: ptxas saw accumulators used meanwhile (its C7514)."""
    assumes: bool
    """Something is assumed: that loops run."""

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.ptx))

    @property
    def multiplier(self) -> str:
        for name, found in (
            ("wgmma", "wgmma.mma_async"),
            ("tcgen05", r"tcgen05\.mma"),
            ("mma.sync", r"mma\.sync"),
        ):
            if self.count(found):
                return name
        return "fma"


def compile_variant(v: Variant) -> Built:
    """Compile as a launch would."""
    tile = v.tile
    kernel = KERNELS[v.kernel]
    constants: dict[str, Any] = {"ALIGN": max(v.align_bytes // v.dtype.itemsize, 1)}
    if v.kernel in ("up", "down"):
        constants |= {
            "NUM_ENTRIES": v.entries,
            "BLOCK_R": tile.block_r,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "GROUP_R": tile.group_r,
            "EVEN_K": v.even_k,
            "SWAP": tile.swap,
            "DEPENDENT": v.dependent,
            "INPUT_PRECISION": "ieee" if v.dtype == torch.float32 else "tf32",
        }
    if v.kernel == "up":
        constants["BY_ADDRESS"] = v.by_address
        places = triton_kernels.ACTIVATION_PLACES
        constants["ACTIVATION"] = places.get(v.activation, triton_kernels.MIXED)
        constants["NORMS"], constants["DIRECT"] = v.norms, v.direct
    else:
        constants |= {"BLOCK_T": 8, "BLOCK_D": 1024}
    if v.kernel == "down":
        constants |= {"HAS_TOKENS": True, "PROJECTED": v.projected}
    source = ast_source(kernel, constants, v.dtype, aligned=v.align_bytes == 16)
    options = compiler_options(tile.num_warps, tile.num_stages, v.kernel == "down" and v.dependent)
    built = triton.compile(source, target=GPUTarget("cuda", v.capability, 32), options=options)
    return built_of(built)


def built_of(compiled: Any) -> Built:
    """What `triton.compile` gave; spills are the only use of stack here."""
    registers, stack, serialized = _read_cubin(compiled.asm["cubin"])
    return Built(
        registers,
        stack,
        compiled.metadata.shared,
        compiled.asm["ptx"],
        serialized,
        "llvm.intr.assume" in compiled.asm["ttir"],
    )


def _read_cubin(cubin: bytes) -> tuple[int, int, bool]:
    """Registers, bytes of stack per thread, and whether products are serialized."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump said {told!r}")
    products = len(re.findall(r"\bHGMMA", told))
    arrivals = len(re.findall(r"\bWARPGROUP\.ARRIVE", told))
    if bool(products) != bool(arrivals):
        raise RuntimeError(f"{products} HGMMA and {arrivals} WARPGROUP.ARRIVE in the SASS")
    return int(found[1]), int(found[2]), arrivals >= products > 1


def tiles_of(
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    aligned: bool = True,
    norms: bool = False,
) -> Iterator[tuple[str, TileConfig]]:
    """(kernel, tile) that `choose_config` can give."""
    ups, downs = every_tile(dtype, (capability // 10, capability % 10), aligned, norms)
    yield from (("up", tile) for tile in ups)
    yield from (("down", tile) for tile in downs)


def short_list() -> list[Variant]:
    """What the normal suite compiles: every Hopper tile in its most general form, and samples."""
    found = [Variant(kernel, 90, tile) for kernel, tile in tiles_of(90)]
    found += [Variant("down", 80, tile) for kernel, tile in tiles_of(80) if kernel == "down"]
    found += [Variant(kernel, 100, tile) for kernel, tile in list(tiles_of(100))[-3:]]
    few = next(iter(tiles_of(90)))[1]
    fp32 = list(tiles_of(90, torch.float32))[-1][1]
    unaligned = list(tiles_of(90, aligned=False))[-1][1]
    found += [
        Variant("up", 90, few, entries=1, even_k=True, by_address=False),
        Variant("down", 90, fp32, torch.float32),
        Variant("up", 90, unaligned, align_bytes=4),
        Variant("text", 90),
    ]
    found += [Variant("down", 90, tile, projected=True) for _, tile in list(tiles_of(90))[-2:]]
    kinds = other_kinds(90)
    return [*found, kinds[0], *kinds[-2:]]


def other_kinds(capability: int) -> list[Variant]:
    """K1 for projectors other than two layers with ReLU between them."""
    plain: list[dict[str, Any]] = [
        {"activation": name, "entries": 1, "by_address": False}
        for name in ACTIVATIONS
        if name != "relu"
    ]
    plain.append({"direct": True})
    normed: list[dict[str, Any]] = [
        {"norms": True, "entries": 1, "by_address": False},
        {"activation": "mixed", "norms": True, "direct": True},
    ]
    return [
        Variant("up", capability, tile, **kind)
        for kinds, norms in ((plain, False), (normed, True))
        for kernel, tile in tiles_of(capability, norms=norms)
        if kernel == "up"
        for kind in kinds
    ]


def full_list() -> list[Variant]:
    """Every configuration that a launch can meet, for sm_80, sm_90 and sm_100."""
    found = []
    for capability in (80, 90, 100):
        for kernel, tile in tiles_of(capability):
            for dtype in (torch.bfloat16, torch.float16):
                for entries, even_k, by_address in ((1, True, False), (4, False, True)):
                    v = Variant(kernel, capability, tile, dtype, 16, even_k, entries, by_address)
                    found.append(v)
        for align_bytes in (16, 4):
            for kernel, tile in tiles_of(capability, torch.float32, align_bytes == 16):
                found.append(Variant(kernel, capability, tile, torch.float32, align_bytes))
        for align_bytes in (8, 4, 2):
            for kernel, tile in tiles_of(capability, aligned=False):
                found.append(Variant(kernel, capability, tile, torch.bfloat16, align_bytes))
        for align_bytes in (16, 2):
            found.append(Variant("text", capability, align_bytes=align_bytes))
        found += other_kinds(capability)
    return found


def main() -> None:
    print(
        "| kernel | GPU | tile (rows x columns x K, warps, stages) | form | registers | spilled "
        "| shared KiB | multiplies by |\n|-|-|-|-|-|-|-|-|"
    )
    for capability in (90, 100, 80):
        for kernel, t in tiles_of(capability):
            built = compile_variant(Variant(kernel, capability, t))
            print(
                f"| {'K1' if kernel == 'up' else 'K2'} | sm_{capability} | "
                f"{t.block_r}x{t.block_n}x{t.block_k}, {t.num_warps}, {t.num_stages} | "
                f"{'swapped' if t.swap else 'plain'} | {built.registers} | {built.stack} | "
                f"{built.shared / 1024:.0f} | {built.multiplier} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
