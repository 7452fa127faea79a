"""Every configuration compiles for sm_80, sm_90 and sm_100 without a GPU and without spills."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from can_compile import WHY_NOT

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

import triton
from compiled_kernels import Variant, compile_variant, full_list, short_list, tiles_of
from shared_memory import shared_bytes, shared_limit

# Explained exceptions: bytes of stack, on paths that are slow for other reasons. fp32 off 16-byte
# alignment on sm_100 keeps 64 addresses of 4-byte copies live; the rest, by triton 3.7 to 3.9, are
# element-wise copies and fp32's FMA.
KNOWN_SPILLS = {"up-sm100-fp32-64x64x32-8w3s-4e-masked-address-align4": 8}
KNOWN_SPILLS |= {
    "3.7": {
        "up-sm100-fp32-64x64x32-8w3s-4e-masked-address-align4": 16,
        "up-sm90-fp32-16x64x64-4w3s-4e-masked-address": 8,
        "text-sm100-bf16-align2": 104,
    },
    "3.8": {
        "up-sm90-fp32-16x64x64-4w3s-4e-masked-address": 8,
        "down-sm90-fp32-16x64x64-4w3s-4e-masked-align4": 8,
        "down-sm100-bf16-16x64x64-4w2s-4e-masked-align8": 40,
        "text-sm100-bf16-align2": 56,
    },
    "3.9": {
        "up-sm90-fp32-16x64x64-4w3s-4e-masked-address": 8,
        "down-sm100-bf16-16x64x64-4w2s-4e-masked-align8": 40,
        "text-sm100-bf16-align2": 56,
    },
}.get(".".join(triton.__version__.split(".")[:2]), {})
EPILOGUE_SPILLS = 256
"""Bytes of stack, at most, of K1 for projectors other than linear, ReLU, linear: erf, or all
activations, of an accumulator that fills the registers; once a program, behind the loop."""
MULTIPLIER = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def check(v: Variant) -> None:
    built = compile_variant(v)
    other = v.activation != "relu" or v.norms or v.direct
    allowed = EPILOGUE_SPILLS if other else KNOWN_SPILLS.get(v.name, 0)
    assert built.stack <= allowed, f"{built.stack} bytes spilled"
    assert built.shared <= shared_limit((v.capability // 10, v.capability % 10))
    if v.kernel not in ("up", "down"):
        return
    expected = "fma" if v.dtype == torch.float32 else MULTIPLIER[v.capability]
    assert built.multiplier == expected
    assert not built.serialized
    # Without it triton 3.6 alone has K1's 128x256 serialized, 3.7 and 3.9 not.
    assert built.assumes == (v.kernel == "up" and not v.direct)
    if v.align_bytes == 16:
        # Both operands come in by 16-byte asynchronous copies: what the pipeline rests on.
        assert built.count(r"cp\.async\.cg\.shared\.global[^;]*0x10") > 0
        assert built.shared >= (v.tile.num_stages - 1) * (
            shared_bytes(v.tile, v.dtype.itemsize) // v.tile.num_stages
        )
    if v.align_bytes == 16:  # the store too, masked or not
        assert built.count(r"st\.global\.v4\.b32") > 0
        assert built.count(r"st\.global\.b16") == 0
    if v.dependent:
        wanted = "launch_dependents" if v.kernel == "up" else r"griddepcontrol\.wait"
        assert built.count(wanted) == 1


@pytest.mark.parametrize("v", short_list(), ids=lambda v: v.name)
def test_compiles_without_spills(v: Variant) -> None:
    check(v)


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_projected_before_are_read_16_bytes_at_a_time(capability: int) -> None:
    """K2 of a step without other rows: no spills, hardly any shared memory, whole loads."""
    tile = replace(next(t for name, t in tiles_of(capability) if name == "down"), num_stages=1)
    built = compile_variant(Variant("down", capability, tile, projected=True, alone=True))
    assert built.stack == 0
    assert built.shared <= 48 * 1024
    text = compile_variant(Variant("down", capability, tile, alone=True))
    for load in (r"ld\.global(\.\w+)*\.v4\.b32", r"ld\.global(\.\w+)*\.b16"):  # b16: the bias
        assert built.count(load) == text.count(load) > 0
    assert built.count("griddepcontrol") == 0


@pytest.mark.parametrize("kernel", ["up", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled_does_not_depend_on_triton_s_default(
    monkeypatch: pytest.MonkeyPatch, kernel: str, dtype: torch.dtype
) -> None:
    """Products and sums may be fused, by default until Triton 3.10."""
    tile = next(t for name, t in tiles_of(90, dtype) if name == kernel)
    found = []
    for default in (True, False):
        monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", default)
        found.append(compile_variant(Variant(kernel, 90, tile, dtype)).ptx)
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("v", full_list(), ids=lambda v: v.name)
def test_every_configuration_compiles_without_spills(v: Variant) -> None:
    check(v)
