"""Stands for a CUDA driver in Triton: real compilation and dispatch, launches upon host memory.

Triton compiles for sm_90 as it would on an H100, keeps and collects its `CompiledKernel`s and
calls its launcher; here the module is a number, and `_gather_text_kernel` is computed by numpy.
"""

from __future__ import annotations

import ctypes
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton.backends.compiler import GPUTarget
from triton.runtime import driver as active

_numbers = itertools.count(100)  # of devices and modules: Triton keeps kernels by device


class Driver:
    """What Triton asks of a driver.

    Attributes:
        launches: names of the kernels launched.
        loaded: modules that a launch may use.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[str] = []
        self.loaded: set[int] = set()
        self._device = next(_numbers)
        self.utils = SimpleNamespace(
            load_binary=self._load,
            unload_module=self.loaded.discard,
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )
        monkeypatch.setattr(active, "_active", self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *call: self._launch(source, *call)

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, ...]:
        module = next(_numbers)
        self.loaded.add(module)
        return module, module, 32, 0, 1024

    def _launch(
        self,
        source: Any,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        if function not in self.loaded:
            raise RuntimeError("Triton Error [CUDA]: invalid resource handle")
        self.launches.append(source.fn.__name__)
        if source.fn.__name__ == "_gather_text_kernel":
            named = dict(zip(source.fn.arg_names, args, strict=True))
            _gather({n: a if isinstance(a, int) else a.data_ptr() for n, a in named.items()})


def _gather(call: dict[str, int]) -> None:
    """`_gather_text_kernel` of float32 and int64 ids, on the host."""

    def view(address: int, kind: Any, *shape: int) -> np.ndarray:
        size = int(np.prod(shape))
        return np.ctypeslib.as_array((kind * size).from_address(address)).reshape(shape)

    tokens, columns = call["num_tokens"], call["columns"]
    ids = view(call["ids_ptr"], ctypes.c_int64, tokens)
    table = view(call["table_ptr"], ctypes.c_float, call["vocab_rows"], call["table_stride"])
    out = view(call["out_ptr"], ctypes.c_float, tokens, call["out_stride"])
    out[:, :columns] = table[ids - call["vocab_start"], :columns]
