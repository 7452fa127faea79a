"""Host path of the Triton kernels: two launches a step, no sync, nothing built twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from mmqwen_kernels import triton_kernels as kernels
from mmqwen_kernels.launch import LONG_TEXT, LaunchConfig, Mode, choose_config
from mmqwen_kernels.plan import RowTables, plan_rows
from mmqwen_kernels.reference import Projector

FULL_ALIGN_BYTES = 16
HIDDEN_ALIGN = 16  # elements; K2's kernel relies on it
MAX_MODALITIES = 64
_WEIGHT_TABLES_KEPT = 64
_RECIPES_KEPT = 4096


def interpreting() -> bool:
    """Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    return type(kernels._project_up_kernel).__name__ == "InterpretedFunction"


@lru_cache(maxsize=16)
def device_limits(index: int) -> tuple[tuple[int, int], int]:
    """(compute capability, multiprocessors) of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


class _Launcher:
    """A kernel with its compiled variants, launched without Triton's own argument handling.

    Triton's launch reads every argument's type and alignment; a compiled kernel's takes them as
    they are: 36 against 9 to 18 us measured for 20 arguments (facts in docs/kernels.md, "Host").
    A variant is fixed by its constexprs, options and dtypes, and by pointers aligned to 16 bytes;
    where they are not, Triton's own launch is used.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        programs: int,
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
        tile: tuple[int, int],
        key: tuple[Any, ...] | None,
        dependent: bool = False,
        grid_y: int = 1,
    ) -> None:
        grid = (programs, grid_y, 1)
        if key is not None:
            key = (key, constants, tile, dependent)
            compiled = self._compiled.get(key)
            if compiled is not None:
                compiled[grid](*args, *constants)
                return
        options: dict[str, Any] = {"num_warps": tile[0], "num_stages": tile[1]}
        if dependent:
            options["launch_pdl"] = True
        compiled = self._kernel[grid](*args, *constants, **options)
        if key is not None and compiled is not None:
            self._compiled[key] = compiled


class _Recipe(NamedTuple):
    """A step's launches but for its tensors; constexprs in the order of the parameters."""

    up_programs: int
    up_constants: tuple[Any, ...]
    up_options: tuple[int, int]
    down_programs: int
    down_constants: tuple[Any, ...]
    down_options: tuple[int, int]
    stride: int
    prefetch: int
    dependent: bool
    block_t: int
    block_d: int


class _Weights:
    """The device table of one set of projectors' addresses and sizes."""

    def __init__(
        self, projectors: Sequence[Projector], dtype: torch.dtype, device: torch.device
    ) -> None:
        itemsize = dtype.itemsize
        table = np.zeros((len(projectors), kernels.WEIGHT_FIELDS), dtype=np.int64)
        align = FULL_ALIGN_BYTES
        for m, projector in enumerate(projectors):
            w1, b1, w2, b2 = projector
            _check_projector(m, projector, dtype, device)
            table[m] = (
                w1.data_ptr(),
                b1.data_ptr(),
                w2.data_ptr(),
                0 if b2 is None else b2.data_ptr(),
                w1.shape[1],
                w1.shape[0],
                w1.stride(0),
                w2.stride(0),
            )
            for column in (0, 2):
                align = math.gcd(align, int(table[m, column]))
            for column in (4, 5, 6, 7):
                align = math.gcd(align, int(table[m, column]) * itemsize)
        host = torch.from_numpy(table)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "these projectors are new to the kernels: run the op once before capturing it"
                )
            # Only here does the host wait, once per set of projectors.
            self.table = host.pin_memory().to(device, non_blocking=True)
        else:
            self.table = host
        self.align_bytes = align
        self.widths = tuple(p.w1.shape[1] for p in projectors)
        self.hidden = tuple(p.w1.shape[0] for p in projectors)
        self.columns = projectors[0].w2.shape[0]
        self.recipes: dict[tuple[Any, ...], _Recipe] = {}


def _check_projector(
    m: int, projector: Projector, dtype: torch.dtype, device: torch.device
) -> None:
    w1, b1, w2, b2 = projector
    shapes = {"w1": (w1, 2), "b1": (b1, 1), "w2": (w2, 2)}
    if b2 is not None:
        shapes["b2"] = (b2, 1)
    for name, (tensor, ndim) in shapes.items():
        if tensor.ndim != ndim or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"projector {m}: {name} is {tensor.ndim}-D {tensor.dtype} on {tensor.device}, "
                f"expected {ndim}-D {dtype} on {device}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"projector {m}: {name} is transposed; call .contiguous() on it once")
        if ndim == 2 and tensor.stride(0) * 256 >= 1 << 31:
            raise ValueError(f"projector {m}: rows of {name} lie {tensor.stride(0)} apart, too far")
    units, columns = w1.shape[0], w2.shape[0]
    if b1.shape[0] != units or w2.shape[1] != units or (b2 is not None and len(b2) != columns):
        raise ValueError(
            f"projector {m}: w1 {tuple(w1.shape)}, b1 {tuple(b1.shape)}, w2 {tuple(w2.shape)} "
            f"do not fit together"
        )


class TritonBackend:
    """Runs the op by the Triton kernels on one CUDA device, or on the CPU under the interpreter.

    Holds the weights' address tables (64 bytes per projector; the weights themselves are not kept
    alive) and the compiled kernels. Scratch memory comes from torch's caching allocator at every
    call: a buffer of our own would be shared between streams, and freed under a captured graph
    when it grows.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._interpret = device.type != "cuda"
        if self._interpret:
            self.capability, self.num_sms = (8, 0), 4
        else:
            self.capability, self.num_sms = device_limits(device.index)
        self._up = _Launcher(kernels._project_up_kernel)
        self._down = _Launcher(kernels._project_down_kernel)
        self._text = _Launcher(kernels._gather_text_kernel)
        self._scatter = _Launcher(kernels._scatter_rows_kernel)
        self._weights: dict[tuple[Any, ...], _Weights] = {}

    # -- the op and its halves ------------------------------------------------------------------

    def fuse(
        self,
        input_ids: torch.Tensor,
        token_table: torch.Tensor,
        slot_table: torch.Tensor,
        all_slots: torch.Tensor,
        tables: RowTables,
        counts: Sequence[int],
        projectors: Sequence[Projector],
        *,
        vocab_start: int = 0,
        out: torch.Tensor | None = None,
        launch: Mode | LaunchConfig = "fastest",
    ) -> torch.Tensor:
        """`fuse_embeddings` of a plan's tensors. See `ops.fuse_embeddings`.

        Raises:
            ValueError: tensors differ in dtype or device, or do not fit together.
        """
        tokens, columns = input_ids.shape[0], token_table.shape[1]
        if slot_table.shape[0] != tokens:
            raise ValueError(f"{tokens} token ids for a plan of {slot_table.shape[0]} tokens")
        if token_table.stride(1) != 1:
            raise ValueError("the token table is transposed; call .contiguous() on it once")
        dtype = token_table.dtype
        if out is None:
            result = torch.empty(tokens, columns, dtype=dtype, device=self._device)
        elif out.shape != (tokens, columns) or out.dtype != dtype or out.device != self._device:
            raise ValueError(
                f"out is {tuple(out.shape)} of {out.dtype} on {out.device}, expected "
                f"{(tokens, columns)} of {dtype} on {self._device}"
            )
        elif out.stride(1) != 1:
            result = torch.empty(tokens, columns, dtype=dtype, device=self._device)
        else:
            result = out
        if tokens:
            self._run(
                input_ids if input_ids.is_contiguous() else input_ids.contiguous(),
                token_table,
                slot_table,
                all_slots,
                tables,
                counts,
                projectors,
                vocab_start,
                result,
                launch,
            )
        return result if out is None or result is out else out.copy_(result)

    def project(
        self,
        rows: torch.Tensor,
        projector: Projector,
        *,
        launch: Mode | LaunchConfig = "fastest",
    ) -> torch.Tensor:
        """`project_rows`: `[R, d]` -> `[R, D]`, two launches.

        Raises:
            ValueError: rows and projector differ in dtype, device or width.
        """
        if rows.ndim != 2 or rows.shape[1] != projector.w1.shape[1]:
            raise ValueError(f"rows are {tuple(rows.shape)}, expected [R, {projector.w1.shape[1]}]")
        count, columns = rows.shape[0], projector.w2.shape[0]
        out = torch.empty(count, columns, dtype=rows.dtype, device=self._device)
        if count:
            plan = plan_rows(
                [(0, rows)],
                range(count),
                count,
                [rows.shape[1]],
                dtype=rows.dtype,
                device=self._device,
            )
            self._run(None, None, None, None, plan.tables, plan.counts, [projector], 0, out, launch)
        return out

    def scatter(self, out: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """`scatter_rows`: `out[slots[r]] = rows[r]` in place, one launch.

        Raises:
            ValueError: out and rows differ in dtype or width, or an inner stride is not 1.
        """
        if rows.ndim != 2 or out.ndim != 2 or rows.shape[1] != out.shape[1]:
            raise ValueError(f"rows are {tuple(rows.shape)}, out is {tuple(out.shape)}")
        if rows.dtype != out.dtype or slots.shape != rows.shape[:1]:
            raise ValueError(
                f"rows are {rows.dtype} with {tuple(slots.shape)} slots, out is {out.dtype}"
            )
        if out.stride(1) != 1:
            raise ValueError("out is transposed, expected rows whose elements are adjacent")
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        count, columns = rows.shape
        if not count or not columns:
            return out
        align = _align_of(rows.dtype.itemsize, FULL_ALIGN_BYTES, out, rows)
        block_d = min(1024, max(64, 1 << (columns - 1).bit_length()))
        with self._on_device():
            self._scatter(
                -(-count // 4),
                (out, out.stride(0), slots, rows, rows.stride(0), count, columns),
                (align, 4, block_d),
                (4, 1),
                self._key(align, rows.dtype, slots.dtype),
                grid_y=-(-columns // block_d),
            )
        return out

    # -- launches -------------------------------------------------------------------------------

    def _run(
        self,
        input_ids: torch.Tensor | None,
        token_table: torch.Tensor | None,
        slot_table: torch.Tensor | None,
        all_slots: torch.Tensor | None,
        tables: RowTables,
        counts: Sequence[int],
        projectors: Sequence[Projector],
        vocab_start: int,
        out: torch.Tensor,
        launch: Mode | LaunchConfig,
    ) -> None:
        tokens, columns = out.shape
        dtype, itemsize = out.dtype, out.dtype.itemsize
        total = sum(counts)
        has_text = token_table is not None and total < tokens
        tensors = (out,) if token_table is None else (out, token_table)
        with self._on_device():
            if not total:
                if has_text:
                    self._gather_text(input_ids, slot_table, token_table, vocab_start, out, launch)
                return
            weights = self._weights_of(projectors, dtype)
            if weights.columns != columns or len(counts) != len(projectors):
                raise ValueError(
                    f"{len(projectors)} projectors to {weights.columns} columns, expected "
                    f"{len(counts)} to {columns}"
                )
            align = _align_of(itemsize, math.gcd(tables.align_bytes, weights.align_bytes), *tensors)
            addresses = tables.row_addresses
            entries = tables.entries.shape[0]
            recipe = self._recipe(
                weights,
                (
                    tuple(counts),
                    dtype,
                    align,
                    entries,
                    addresses is not None,
                    all_slots is not None,
                    has_text,
                    tokens > LONG_TEXT,
                    launch,
                ),
            )
            hidden = torch.empty(total, recipe.stride, dtype=dtype, device=self._device)
            self._up(
                recipe.up_programs,
                (
                    tables.entries,
                    weights.table,
                    tables.entries if addresses is None else addresses,
                    hidden,
                    recipe.stride,
                    columns,
                    recipe.prefetch,
                ),
                recipe.up_constants,
                recipe.up_options,
                self._key(align, dtype),
            )
            text_tiles = 0
            if has_text:
                text_tiles = -(-tokens // recipe.block_t) * -(-columns // recipe.block_d)
            ids = tables.entries if input_ids is None else input_ids
            self._down(
                recipe.down_programs + text_tiles,
                (
                    tables.entries,
                    weights.table,
                    hidden,
                    recipe.stride,
                    tables.entries if all_slots is None else all_slots,
                    out,
                    out.stride(0),
                    columns,
                    ids,
                    tables.entries if slot_table is None else slot_table,
                    out if token_table is None else token_table,
                    columns if token_table is None else token_table.stride(0),
                    vocab_start,
                    0 if token_table is None else token_table.shape[0],
                    tokens,
                ),
                recipe.down_constants,
                recipe.down_options,
                self._key(align, dtype, ids.dtype),
                recipe.dependent,
            )

    def _recipe(self, weights: _Weights, shape: tuple[Any, ...]) -> _Recipe:
        """What a step's launches need beyond its tensors, made once per kind of step."""
        found = weights.recipes.get(shape)
        if found is not None:
            return found
        counts, dtype, align, entries, by_address, has_slots, has_text, long_text, launch = shape
        config = launch
        if not isinstance(config, LaunchConfig):
            config = choose_config(
                counts,
                weights.widths,
                weights.hidden,
                weights.columns,
                dtype,
                self.capability,
                self.num_sms,
                num_tokens=LONG_TEXT + 1 if long_text else LONG_TEXT,
                aligned=align * dtype.itemsize == FULL_ALIGN_BYTES,
                mode=config,
            )
        up, down = config.up, config.down
        dependent = config.dependent and not self._interpret
        prefetch = 0 if self._interpret else config.prefetch_programs
        active = [m for m, count in enumerate(counts) if count]
        some = [counts[m] for m in active]
        units = [weights.hidden[m] for m in active]
        precision = "ieee" if dtype == torch.float32 else "tf32"
        found = _Recipe(
            up_programs=up.tiles(some, units) + prefetch,
            up_constants=(
                entries,
                up.block_r,
                up.block_n,
                up.block_k,
                up.group_r,
                align,
                all(weights.widths[m] % up.block_k == 0 for m in active),
                up.swap,
                by_address,
                dependent,
                prefetch > 0,
                precision,
            ),
            up_options=(up.num_warps, up.num_stages),
            down_programs=down.tiles(some, [weights.columns] * len(active)),
            down_constants=(
                entries,
                down.block_r,
                down.block_n,
                down.block_k,
                down.group_r,
                align,
                all(n % down.block_k == 0 for n in units),
                down.swap,
                has_slots,
                has_text,
                dependent,
                precision,
                config.block_t,
                config.block_d,
            ),
            down_options=(down.num_warps, down.num_stages),
            stride=-(-max(units) // HIDDEN_ALIGN) * HIDDEN_ALIGN,
            prefetch=prefetch,
            dependent=dependent,
            block_t=config.block_t,
            block_d=config.block_d,
        )
        if len(weights.recipes) >= _RECIPES_KEPT:
            weights.recipes.clear()
        weights.recipes[shape] = found
        return found

    def _gather_text(
        self,
        input_ids: torch.Tensor | None,
        slot_table: torch.Tensor | None,
        token_table: torch.Tensor | None,
        vocab_start: int,
        out: torch.Tensor,
        launch: Mode | LaunchConfig,
    ) -> None:
        if input_ids is None or slot_table is None or token_table is None:
            raise AssertionError("text needs ids, a slot table and a token table")
        tokens, columns = out.shape
        align = _align_of(out.dtype.itemsize, FULL_ALIGN_BYTES, out, token_table)
        block_d = min(1024, max(64, 1 << (columns - 1).bit_length()))
        block_t = 4 if tokens <= LONG_TEXT else 16
        if isinstance(launch, LaunchConfig):
            block_t, block_d = launch.block_t, launch.block_d
        self._text(
            -(-tokens // block_t) * -(-columns // block_d),
            (
                input_ids,
                slot_table,
                token_table,
                token_table.stride(0),
                vocab_start,
                token_table.shape[0],
                out,
                out.stride(0),
                tokens,
                columns,
            ),
            (align, block_t, block_d),
            (4, 1),
            self._key(align, out.dtype, input_ids.dtype),
        )

    def _key(self, align: int, dtype: torch.dtype, *more: torch.dtype) -> tuple[Any, ...] | None:
        """What fixes a compiled variant beside its constexprs; None: leave it to Triton."""
        if self._interpret or align * dtype.itemsize != FULL_ALIGN_BYTES:
            return None
        return (dtype, *more)

    def _on_device(self) -> Any:
        """Launches go to the current device: make it ours, at no cost where it is."""
        if self._interpret or torch.cuda.current_device() == self._device.index:
            return _NOTHING
        return torch.cuda.device(self._device)

    def _weights_of(self, projectors: Sequence[Projector], dtype: torch.dtype) -> _Weights:
        # The key holds all that the table does, so that it cannot be stale, whoever owned the
        # addresses before.
        key = (dtype, *[_identity(projector) for projector in projectors])
        found = self._weights.get(key)
        if found is None:
            if len(projectors) > MAX_MODALITIES:
                raise ValueError(f"{len(projectors)} modalities, expected {MAX_MODALITIES} at most")
            found = _Weights(projectors, dtype, self._device)
            while len(self._weights) >= _WEIGHT_TABLES_KEPT:
                self._weights.pop(next(iter(self._weights)))
            self._weights[key] = found
        return found


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def _identity(projector: Projector) -> tuple[Any, ...]:
    w1, b1, w2, b2 = projector
    return (
        w1.dtype,
        w1.data_ptr(),
        w1.shape,
        w1.stride(),
        b1.data_ptr(),
        b1.shape,
        w2.data_ptr(),
        w2.shape,
        w2.stride(),
        0 if b2 is None else b2.data_ptr(),
    )


def _align_of(itemsize: int, align_bytes: int, *tensors: torch.Tensor) -> int:
    """Elements to which these tensors' addresses, row strides and rows are aligned, to 16 bytes."""
    for tensor in tensors:
        align_bytes = math.gcd(
            align_bytes,
            tensor.data_ptr(),
            tensor.stride(0) * itemsize,
            tensor.shape[1] * itemsize,
        )
    return max(align_bytes // itemsize, 1)


_BACKENDS: dict[torch.device, TritonBackend] = {}


def triton_backend(device: torch.device) -> TritonBackend:
    """The backend of a device, made on first use."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    backend = _BACKENDS.get(device)
    if backend is None:
        backend = _BACKENDS.setdefault(device, TritonBackend(device))
    return backend
