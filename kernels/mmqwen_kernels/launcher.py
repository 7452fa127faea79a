"""How a kernel is compiled and launched: past Triton's dispatch where that is safe, or by it.

Triton's dispatch reads every argument's type and alignment at each call: 36 us for 20 arguments
against 7 for a launch of the compiled kernel (slow CPU). That launch is no public interface of
Triton's, so `why_dispatch` looks, once a device, at how the installed Triton launches, and
`Dispatched` is the public way for when it does so otherwise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from mmqwen_kernels import triton_kernels as kernels
from mmqwen_kernels.row_tables import ALIGN_BYTES
from mmqwen_kernels.tiles import TRITON_DTYPES, TileConfig

DISPATCH_VARIABLE = "MMQWEN_TRITON_DISPATCH"
"""Set to 1, this environment variable has every kernel launched by Triton's own dispatch."""

INTEGERS = {torch.int32: "i32", torch.int64: "i64"}
_POINTED = {f"*{name}": dtype for dtype, name in (TRITON_DTYPES | INTEGERS).items()}
_WORDS = ("entries_ptr", "weights_ptr", "row_address_ptr", "slots_ptr", "text_ptr")
_ADDRESSES = ("x_address", "w_address", "b_address")
_WIDE = dict.fromkeys(_WORDS, "*i64") | dict.fromkeys(_ADDRESSES, "i64")


def compiler_options(warps: int, stages: int, dependent: bool = False) -> dict[str, Any]:
    """What Triton's compiler is told beside a kernel's types and constants.

    Whether products and sums may be fused is said here, not left to Triton's default, which will be
    another from 3.10 on. Products are fused by name already (`tl.dot`), so that bits do not depend
    on it today; but what was validated and timed on a GPU was compiled so.

    Args:
        warps, stages: of the tile.
        dependent: the kernel is launched before the one that it depends on ends.
    """
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return {**options, "launch_pdl": True} if dependent else options


def types_of(
    kernel: Any, constants: dict[str, Any], dtype: torch.dtype, ids_dtype: torch.dtype
) -> dict[str, str]:
    """Triton's type of each argument of a kernel, "constexpr" for its constants."""
    found: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            found[name] = "constexpr"
        elif name in kernels.ROW_POINTERS:
            found[name] = "*" + TRITON_DTYPES[dtype]
        elif name == "ids_ptr":
            found[name] = "*" + INTEGERS[ids_dtype]
        else:
            found[name] = _WIDE.get(name, "i32")
    return found


def ast_source(
    kernel: Any,
    constants: dict[str, Any],
    dtype: torch.dtype,
    ids_dtype: torch.dtype = torch.int64,
    aligned: bool = True,
) -> ASTSource:
    """What to compile: the kernel with the types and alignments that a launch has.

    Args:
        kernel: one of `triton_kernels`' kernels.
        constants: its constexprs by name.
        dtype: of rows and weights.
        ids_dtype: of token ids.
        aligned: addresses of out and token table are multiples of 16 bytes.
    """
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(kernel.arg_names)
        if name in kernels.ROW_POINTERS and (aligned or name == "hidden_ptr")
    }
    signature = types_of(kernel, constants, dtype, ids_dtype)
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


class Compiled:
    """One compiled kernel, launched with addresses and numbers.

    Goes past Triton's own dispatch: a kernel is fixed by what `ast_source` takes, so nothing has to
    be read at a call. Only where `why_dispatch` has nothing against it.
    """

    def __init__(
        self, source: ASTSource, options: dict[str, Any], constants: Sequence[Any]
    ) -> None:
        # All of it is kept: from triton 3.8 on its end unloads the module that is launched here.
        self.kernel = triton.compile(source, options=options)
        self._run = self.kernel.run  # loads the module onto the current device
        self._fixed = (self.kernel.function, self.kernel.packed_metadata, None, None, None)
        self._constants = tuple(constants)

    def __call__(self, programs: int, stream: int, *args: int) -> None:
        self._run(programs, 1, 1, stream, *self._fixed, *args, *self._constants)


class Pointer:
    """An address as `triton.jit` takes it: an object with `data_ptr()` and `dtype`."""

    __slots__ = ("_address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self._address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        """The address."""
        return self._address


class Dispatched:
    """A kernel launched by Triton's own dispatch, on a GPU or under the interpreter.

    Args:
        kernel: one of `triton_kernels`' kernels.
        types: as `types_of` gives them.
        options: of the compiler (`num_warps`, ...).
        constants: the constexprs in order.
    """

    def __init__(
        self, kernel: Any, types: dict[str, str], options: dict[str, Any], constants: Sequence[Any]
    ) -> None:
        self._kernel = kernel
        self._types = [kind for kind in types.values() if kind != "constexpr"]
        self._pointed = [_POINTED.get(kind) for kind in self._types]
        self._options = options
        self._constants = tuple(constants)

    def __call__(self, programs: int, stream: int, *args: Any) -> Any:
        """Launch on the current stream, which `stream` is; tensors may stand for addresses."""
        given = [
            Pointer(arg, dtype) if dtype is not None and isinstance(arg, int) else arg
            for arg, dtype in zip(args, self._pointed, strict=True)
        ]
        return self._kernel[(programs, 1, 1)](*given, *self._constants, **self._options)

    def compile(self) -> None:
        """Compile for arguments of these types, aligned to 16 bytes, and launch nothing."""
        some = {"i32": 2, "i64": 1 << 40}
        args = [_POINTED.get(kind) or some[kind] for kind in self._types]
        self._kernel.warmup(*args, *self._constants, grid=(1, 1, 1), **self._options)


# -- is it safe? ---------------------------------------------------------------------------------


def why_dispatch(device: torch.device, stream: int) -> str | None:
    """What is against launches past Triton's dispatch on the current device; None: nothing.

    A small kernel is compiled by both ways, and Triton's own call of its launcher is looked at,
    with the launcher replaced, so that nothing runs: where its arguments are not those of
    `Compiled`, a launch would read them wrongly, in the worst case as addresses. Only then is the
    kernel run by both. Takes one compilation of each way, and waits for the device.

    Args:
        device: the current one, whose memory the kernel uses.
        stream: the current stream.
    """
    if os.environ.get(DISPATCH_VARIABLE) == "1":
        return f"{DISPATCH_VARIABLE} is 1"
    try:
        return _difference(device, stream)
    except Exception as error:  # whatever a Triton that nobody has seen yet may raise
        return f"{type(error).__name__}: {error}"


def _difference(device: torch.device, stream: int) -> str | None:
    """The first thing in which `Compiled` and Triton's dispatch differ."""
    kernel, dtype = kernels._gather_text_kernel, torch.float32
    constants = {"ALIGN": 4, "BLOCK_T": 2, "BLOCK_D": 16}
    in_order, options = list(constants.values()), compiler_options(4, 1)
    ids = torch.tensor([2, 0], device=device)
    table = torch.arange(48, dtype=dtype, device=device).view(3, 16)
    want, got = torch.zeros(2, 16, device=device), torch.zeros(2, 16, device=device)
    head = (ids.data_ptr(), table.data_ptr(), 16, 0, 3)
    tail = (16, 2, 16)

    public = Dispatched(kernel, types_of(kernel, constants, dtype, ids.dtype), options, in_order)
    theirs = public(1, stream, *head, want.data_ptr(), *tail)
    source = ast_source(kernel, constants, dtype, ids.dtype)
    ours = Compiled(source, options, in_order)
    for name in ("signature", "constants", "attrs"):
        expected, found = (getattr(s, name) for s in (theirs.src, source))
        expected = {key: value for key, value in expected.items() if value != []}
        if expected != found:
            return f"Triton compiles a kernel with {name} {expected}, this package with {found}"
    call = _call_of_launcher(theirs, lambda: public(1, stream, *head, got.data_ptr(), *tail))
    # Of the three that `Compiled` leaves out, what Triton notes for profilers is made at each call.
    notes, hooks = theirs.launch_metadata((1, 1, 1), stream), triton.knobs.runtime
    told = [1, 1, 1, stream, theirs.function, theirs.packed_metadata, notes]
    told += [hooks.launch_enter_hook, hooks.launch_exit_hook]
    told += [*head, got.data_ptr(), *tail, *in_order]
    said = [arg.data_ptr() if isinstance(arg, Pointer) else arg for arg in call]
    if len(said) != len(told):
        return f"Triton's launcher takes {len(said)} arguments, expected {len(told)}"
    for at, (found, expected) in enumerate(zip(said, told, strict=True)):
        if type(found) is not type(expected) or (found != expected and expected is not notes):
            return f"argument {at} of Triton's launcher is {found!r}, expected {expected!r}"
    ours(1, stream, *head, got.data_ptr(), *tail)
    if not torch.equal(want, table[ids]) or not torch.equal(got, want):
        return "a kernel launched past Triton's dispatch gave another result"
    return None


def _call_of_launcher(compiled: Any, dispatch: Any) -> tuple[Any, ...]:
    """What `dispatch`, which launches `compiled`, hands to Triton's launcher; nothing is launched.

    Raises:
        RuntimeError: the launcher was not called once.
    """
    calls: list[tuple[Any, ...]] = []
    kind = type(compiled)
    noting = property(lambda self: lambda *args: calls.append(args))
    compiled.__class__ = type(kind.__name__, (kind,), {"run": noting})
    try:
        dispatch()
    finally:
        compiled.__class__ = kind
    if len(calls) != 1:
        raise RuntimeError(f"Triton called a kernel's launcher {len(calls)} times, expected once")
    return calls[0]


# -- all kernels of a device ---------------------------------------------------------------------


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return type(kernels._project_up_kernel).__name__ == "InterpretedFunction"


def current_stream(device: torch.device) -> int:
    """The current stream's handle; 0 where there are no streams."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Kernels:
    """The kernels that were made ready for one device, each once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._variants: dict[tuple[Any, ...], Any] = {}
        # None: not looked yet.
        self._dispatch: bool | None = None if device.type == "cuda" else True

    def __len__(self) -> int:
        return len(self._variants)

    def get(
        self,
        kernel: Any,
        dtype: torch.dtype,
        ids_dtype: torch.dtype,
        constants: dict[str, Any],
        tile: TileConfig | None = None,
        dependent: bool = False,
    ) -> Any:
        """A kernel compiled for these types and constants, once."""
        aligned = constants["ALIGN"] * dtype.itemsize == ALIGN_BYTES
        warps, stages = (4, 1) if tile is None else (tile.num_warps, tile.num_stages)
        key = (
            kernel, dtype, ids_dtype, aligned, tuple(constants.values()), warps, stages, dependent
        )  # fmt: skip
        found = self._variants.get(key)
        if found is None:
            in_order = [constants[name] for name in kernel.arg_names if name in constants]
            options = compiler_options(warps, stages, dependent)
            if self.dispatches():
                types = types_of(kernel, constants, dtype, ids_dtype)
                found = Dispatched(kernel, types, options, in_order)
                if self._device.type == "cuda":
                    found.compile()
            else:
                source = ast_source(kernel, constants, dtype, ids_dtype, aligned)
                found = Compiled(source, options, in_order)
            self._variants[key] = found
        return found

    def dispatches(self) -> bool:
        """Whether kernels are launched by Triton's own dispatch; looked at once, with a warning.

        Raises:
            RuntimeError: the current stream is being captured, and nobody has looked yet.
        """
        if self._dispatch is None:
            if capturing(self._device):
                raise RuntimeError(
                    "the kernels are new to this device: run the op once before capturing it"
                )
            reason = why_dispatch(self._device, current_stream(self._device))
            self._dispatch = reason is not None
            if reason is not None and DISPATCH_VARIABLE not in reason:
                warnings.warn(
                    f"triton {triton.__version__} launches kernels otherwise than is known here "
                    f"({reason}): they go by its own dispatch, which takes the host longer",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._dispatch

    def depends(self, wanted: bool) -> bool:
        """Whether K2 is launched before K1 ends, where that is `wanted`."""
        return wanted and not self.dispatches() and hasattr(tl.extra.cuda, "gdc_wait")
