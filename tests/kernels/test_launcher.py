"""How kernels are launched: compiled ones are kept, and what Triton may change is noticed."""

from __future__ import annotations

import gc
import inspect
import re
import textwrap
import warnings
from typing import Any

import pytest
import torch
from can_compile import WHY_NOT

if WHY_NOT:
    pytest.skip(WHY_NOT, allow_module_level=True)

from driver_stub import Driver
from fusion_cases import make_case
from triton.runtime import jit

from mmqwen_kernels import launcher, plan_rows, triton_backend, triton_kernels

CPU = torch.device("cpu")
CONSTANTS = {"ALIGN": 4, "BLOCK_T": 2, "BLOCK_D": 16}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.delenv(launcher.DISPATCH_VARIABLE, raising=False)
    return Driver(monkeypatch)


def gather_args() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor([2, 0]), torch.arange(48.0).view(3, 16), torch.zeros(2, 16)


def test_a_compiled_kernel_outlives_a_collection(driver: Driver) -> None:
    """From triton 3.8 on a `CompiledKernel` unloads its module when it is collected."""
    source = launcher.ast_source(triton_kernels._gather_text_kernel, CONSTANTS, torch.float32)
    variant = launcher.Compiled(source, {"num_warps": 4, "num_stages": 1}, CONSTANTS.values())
    del source
    gc.collect()
    ids, table, out = gather_args()
    variant(1, 0, ids.data_ptr(), table.data_ptr(), 16, 0, 3, out.data_ptr(), 16, 2, 16)
    assert torch.equal(out, table[ids])


def test_dispatch_takes_addresses(driver: Driver) -> None:
    kernel = triton_kernels._gather_text_kernel
    types = launcher.types_of(kernel, CONSTANTS, torch.float32, torch.int64)
    dispatched = launcher.Dispatched(kernel, types, {"num_warps": 4}, CONSTANTS.values())
    dispatched.compile()
    assert not driver.launches
    ids, table, out = gather_args()
    dispatched(1, 0, ids.data_ptr(), table.data_ptr(), 16, 0, 3, out.data_ptr(), 16, 2, 16)
    assert torch.equal(out, table[ids])
    assert len(kernel.device_caches[driver.get_current_device()][0]) == 1, "compiled ahead"


def test_the_installed_triton_launches_as_we_do(driver: Driver) -> None:
    assert launcher.why_dispatch(CPU, 0) is None


CALL = "stream, kernel.function, kernel.packed_metadata, launch_metadata,"
CHANGES = {
    "swapped": (CALL, "stream, kernel.packed_metadata, kernel.function, launch_metadata,"),
    "one more": (CALL, f"{CALL} None,"),
    "one less": (CALL, "stream, kernel.function, launch_metadata,"),
    "others": (CALL, "stream, kernel.function, (1, 2, 3), launch_metadata,"),
    "no constants": ("*bound_args.values())", "*list(bound_args.values())[:-3])"),
    "another order": ("*bound_args.values())", "*list(bound_args.values())[::-1])"),
    "by name": ("*bound_args.values())", "*bound_args.values(), cluster=1)"),
    "another method": ("kernel.run(", "kernel._run("),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_call_of_the_launcher_is_noticed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The dispatch of a Triton to come: today's text, with its call of the launcher changed.

    Called as today's, a changed launcher would take numbers for addresses.
    """
    change_dispatch(monkeypatch, *CHANGES[change])
    monkeypatch.setattr(
        launcher.Compiled, "__call__", lambda *_: pytest.fail("launched all the same")
    )
    assert launcher.why_dispatch(CPU, 0) is not None


def change_dispatch(monkeypatch: pytest.MonkeyPatch, before: str, after: str) -> None:
    """Change how `JITFunction.run` calls the launcher, but for its first launch, which compiles."""

    def changed(call: re.Match[str]) -> str:
        text = " ".join(call[0].split())
        assert before in text, "Triton's own text is another: mend this test"
        return text.replace(before, after)

    own = jit.JITFunction.run
    source = textwrap.dedent(inspect.getsource(own))
    scope: dict[str, Any] = {}
    text = re.sub(r"kernel\.run\(.*?values\(\)\)", changed, source, flags=re.DOTALL)
    exec(text, vars(jit), scope)
    launched: list[None] = []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(None)
        return (own if len(launched) == 1 else scope["run"])(self, *args, **kwargs)

    monkeypatch.setattr(jit.JITFunction, "run", run)


def test_a_triton_that_compiles_otherwise_is_noticed(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(launcher._WIDE, "columns", "i64")
    assert "with signature" in str(launcher.why_dispatch(CPU, 0))
    monkeypatch.setattr(launcher.triton, "compile", None)
    assert "TypeError" in str(launcher.why_dispatch(CPU, 0))


def test_another_result_is_noticed(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.Compiled, "__call__", lambda *_: None)
    assert "another result" in str(launcher.why_dispatch(CPU, 0))


def test_the_environment_asks_for_dispatch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher.DISPATCH_VARIABLE, "1")
    assert launcher.why_dispatch(CPU, 0) == "MMQWEN_TRITON_DISPATCH is 1"
    assert not driver.launches


# -- a backend that falls back -------------------------------------------------------------------


@pytest.mark.parametrize("low", [False, True])
def test_a_backend_falls_back_with_one_warning(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, low: bool
) -> None:
    """`low`: with weights below 2^31, where a process's first allocations may lie."""
    if low:
        call = launcher.Dispatched.__call__

        def lowered(self: launcher.Dispatched, programs: int, stream: int, *args: Any) -> Any:
            own = [
                1 << 20 if kind == "i64" else arg
                for kind, arg in zip(self._types, args, strict=True)
            ]
            return call(self, programs, stream, *own)

        monkeypatch.setattr(launcher.Dispatched, "__call__", lowered)
    looked: list[None] = []

    def look(device: torch.device, stream: int) -> str:
        looked.append(None)
        return "the launcher is another"

    monkeypatch.setattr(launcher, "why_dispatch", look)
    backend = triton_backend.TritonBackend(CPU)
    backend.capability, backend.num_sms = (9, 0), 132
    backend._interpret, backend.kernels._dispatch = False, None
    monkeypatch.setattr(backend, "_on_device", lambda: triton_backend._NOTHING)

    def fuse(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        case = make_case([16, 24], counts, torch.float32, hidden=64, columns=64, text=5)
        plan = plan_rows(
            case.items, case.slots, len(case.input_ids), [16, 24], dtype=torch.float32, device=CPU
        )
        out = backend.fuse(case.input_ids, case.table, plan, case.projectors)
        return out, case.table[case.input_ids]

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out, text = fuse([0, 0])
        fuse([3, 2])
        fuse([2, 3])
    said = [str(w.message) for w in seen if w.category is RuntimeWarning]
    assert len(said) == len(looked) == 1
    assert "the launcher is another" in said[0]
    assert torch.equal(out, text)
    step = ["_project_up_kernel", "_project_down_kernel"]
    assert driver.launches == ["_gather_text_kernel", *step, *step]
    assert all(type(v) is launcher.Dispatched for v in backend.kernels._variants.values())
    assert not any(key[-1] for key in backend.kernels._variants), (
        "no kernel is launched dependently"
    )
