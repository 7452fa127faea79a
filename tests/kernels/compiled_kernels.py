"""Compiles the kernels for GPUs that this machine does not have, and reads what came out.

`python tests/kernels/compiled_kernels.py` prints the table of docs/kernels.md.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmqwen_kernels import launch, triton_kernels
from mmqwen_kernels.launch import TileConfig

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
HOPPER_UP = ("UP_16", "UP_32", "MIDDLE_NARROW", "MIDDLE_WIDE", "LARGE")
HOPPER_DOWN = ("DOWN_16", "DOWN_32", "MIDDLE_NARROW", "MIDDLE_WIDE", "LARGE", "LARGE_WIDE")
DEFAULTS = ("DEFAULT_16", "DEFAULT_MIDDLE", "DEFAULT_LARGE")


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel, its tile and the constexprs that a launch would choose."""

    kernel: str  # "up", "down", "text" or "scatter"
    capability: int
    tile_name: str = "MIDDLE_NARROW"
    dtype: torch.dtype = torch.bfloat16
    align_bytes: int = 16
    even_k: bool = False
    entries: int = 4
    by_address: bool = True
    prefetch: bool = False

    @property
    def tile(self) -> TileConfig:
        tile: TileConfig = getattr(launch, self.tile_name)
        if self.tile_name == "LARGE" and self.capability == 100:
            tile = replace(tile, num_warps=8)
        return tile

    @property
    def name(self) -> str:
        parts = [self.kernel, f"sm{self.capability}", TYPES[self.dtype]]
        if self.kernel in ("up", "down"):
            parts += [self.tile_name, f"{self.entries}e", "even" if self.even_k else "masked"]
        if self.by_address and self.kernel == "up":
            parts.append("address")
        if self.align_bytes != 16:
            parts.append(f"align{self.align_bytes}")
        if self.prefetch:
            parts.append("prefetch")
        return "-".join(parts)


@dataclass(frozen=True)
class Built:
    """What a compilation gave."""

    registers: int
    stack: int
    shared: int
    ptx: str

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
    """Compile as a launch would: pointers of the big tensors aligned, nothing else specialised."""
    tile, dtype = v.tile, TYPES[v.dtype]
    align = max(v.align_bytes // v.dtype.itemsize, 1)
    dependent = v.capability >= 90 and v.tile.block_r <= 64
    precision = "ieee" if v.dtype == torch.float32 else "tf32"
    text = {"BLOCK_T": 4, "BLOCK_D": 1024}
    tiles: dict[str, Any] = {
        "NUM_ENTRIES": v.entries,
        "BLOCK_R": tile.block_r,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_R": tile.group_r,
        "EVEN_K": v.even_k,
        "SWAP": tile.swap,
        "DEPENDENT": dependent,
        "INPUT_PRECISION": precision,
    }
    kernel, constants = {
        "up": (
            triton_kernels._project_up_kernel,
            {**tiles, "BY_ADDRESS": v.by_address, "PREFETCH": v.prefetch},
        ),
        "down": (
            triton_kernels._project_down_kernel,
            {**tiles, **text, "HAS_SLOTS": True, "HAS_TEXT": True},
        ),
        "text": (triton_kernels._gather_text_kernel, {**text, "BLOCK_T": 16}),
        "scatter": (triton_kernels._scatter_rows_kernel, dict(text)),
    }[v.kernel]
    constants["ALIGN"] = align
    pointers = {
        "entries_ptr": "*i64",
        "weights_ptr": "*i64",
        "row_address_ptr": "*i64",
        "ids_ptr": "*i64",
        "slots_ptr": "*i32",
        "slot_table_ptr": "*i32",
    }
    large = ("hidden_ptr", "out_ptr", "table_ptr", "rows_ptr")
    signature, attrs = {}, {}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in large:
            signature[name] = f"*{dtype}"
            if v.align_bytes == 16 or name == "hidden_ptr":
                attrs[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = pointers.get(name, "i32")
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if v.kernel == "down" and dependent:
        options["launch_pdl"] = True
    built = triton.compile(source, target=GPUTarget("cuda", v.capability, 32), options=options)
    registers, stack = _resources(built.asm["cubin"])
    return Built(registers, stack, built.metadata.shared, built.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack per thread): spills are the only use of stack here."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    if found is None:
        raise RuntimeError(f"cuobjdump said {told!r}")
    return int(found[1]), int(found[2])


def tiles_of(capability: int) -> Iterator[tuple[str, str]]:
    """(kernel, tile name) that `choose_config` can give for 16-bit rows."""
    if capability in (90, 100):
        yield from (("up", name) for name in HOPPER_UP)
        # sm_100 goes without the widest tile: it spills there with triton 3.6.
        yield from (("down", name) for name in HOPPER_DOWN[: 6 if capability == 90 else 5])
    else:
        yield from ((kernel, name) for kernel in ("up", "down") for name in DEFAULTS)


def short_list() -> list[Variant]:
    """What the normal suite compiles: every Hopper tile in its most general form, and samples."""
    found = [Variant(kernel, 90, tile) for kernel, tile in tiles_of(90)]
    found += [Variant("down", 80, name) for name in DEFAULTS]
    found += [Variant("down", 100, name) for name in ("DOWN_16", "LARGE", "MIDDLE_WIDE")]
    found += [
        Variant("up", 80, "DEFAULT_LARGE"),
        Variant("up", 100, "LARGE"),
        Variant("up", 90, "UP_16", entries=1, even_k=True, by_address=False, prefetch=True),
        Variant("down", 90, "FP32_MIDDLE", torch.float32),
        Variant("up", 90, "UNALIGNED_MIDDLE", align_bytes=4),
        Variant("text", 90),
        Variant("scatter", 90),
    ]
    return found


def full_list() -> list[Variant]:
    """Every configuration that a launch can meet, for sm_80, sm_90 and sm_100."""
    found = []
    for capability in (80, 90, 100):
        for kernel, tile in tiles_of(capability):
            for dtype in (torch.bfloat16, torch.float16):
                for entries, even_k, by_address in ((1, True, False), (4, False, True)):
                    v = Variant(kernel, capability, tile, dtype, 16, even_k, entries, by_address)
                    found.append(v)
        for kernel in ("up", "down"):
            for tile in ("FP32_16", "FP32_MIDDLE"):
                for align_bytes in (16, 4):
                    found.append(Variant(kernel, capability, tile, torch.float32, align_bytes))
            for tile in ("UNALIGNED_16", "UNALIGNED_MIDDLE"):
                for align_bytes in (8, 4, 2):
                    found.append(Variant(kernel, capability, tile, torch.bfloat16, align_bytes))
        for kernel in ("text", "scatter"):
            for align_bytes in (16, 2):
                found.append(Variant(kernel, capability, align_bytes=align_bytes))
    return found


def main() -> None:
    print(
        "| kernel | GPU | tile (rows x columns x K, warps, stages) | form | registers | spilled "
        "| shared KiB | multiplies by |\n|-|-|-|-|-|-|-|-|"
    )
    for capability in (90, 100, 80):
        for kernel, name in tiles_of(capability):
            v = Variant(kernel, capability, name)
            built, t = compile_variant(v), v.tile
            print(
                f"| {'K1' if kernel == 'up' else 'K2'} | sm_{capability} | {name} "
                f"{t.block_r}x{t.block_n}x{t.block_k}, {t.num_warps}, {t.num_stages} | "
                f"{'swapped' if t.swap else 'plain'} | {built.registers} | {built.stack} | "
                f"{built.shared / 1024:.0f} | {built.multiplier} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
