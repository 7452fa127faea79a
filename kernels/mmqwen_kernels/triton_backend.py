"""Host path of the Triton kernels: two launches a step, no sync, nothing built twice."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from mmqwen_kernels import triton_kernels as kernels
from mmqwen_kernels.launch import (
    LaunchConfig,
    Mode,
    TileConfig,
    choose_config,
    every_tile,
    launches_dependently,
    text_columns,
)
from mmqwen_kernels.launcher import (
    DISPATCH_VARIABLE,
    INTEGERS,
    Compiled,
    Dispatched,
    ast_source,
    types_of,
    why_dispatch,
)
from mmqwen_kernels.plan import RowTables, num_entries, tables_of
from mmqwen_kernels.reference import Projector
from mmqwen_kernels.staging import PerDevice

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


class _Recipe(NamedTuple):
    """A step's launches but for its tensors."""

    up: Any
    up_programs: int
    down: Any
    down_programs: int
    stride: int
    block_t: int
    block_d: int


class _Weights:
    """The device table of one set of projectors' addresses and sizes.

    Attributes:
        captured: a CUDA graph may read the table, so it is kept for good.
    """

    def __init__(
        self,
        projectors: Sequence[Projector],
        dtype: torch.dtype,
        device: torch.device,
        stream: int,
    ) -> None:
        itemsize = dtype.itemsize
        table = np.zeros((len(projectors), kernels.WEIGHT_FIELDS), dtype=np.int64)
        align = FULL_ALIGN_BYTES
        for m, projector in enumerate(projectors):
            w1, b1, w2, b2 = projector
            _check_projector(m, projector, dtype, device)
            if w2.shape[0] != projectors[0].w2.shape[0]:
                raise ValueError(
                    f"projector {m} gives {w2.shape[0]} columns, expected those of the first, "
                    f"{projectors[0].w2.shape[0]}"
                )
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
            # Only here does the host wait, once per set of projectors: other streams may be next.
            self.table = host.to(device)
        else:
            self.table = host
        self.align_bytes = align
        self.widths = tuple(p.w1.shape[1] for p in projectors)
        self.hidden = tuple(p.w1.shape[0] for p in projectors)
        self.columns = projectors[0].w2.shape[0]
        self.rows: list[list[int]] = table.tolist()
        self.address = self.table.data_ptr()
        self.recipes: dict[tuple[Any, ...], _Recipe] = {}
        self.captured = False
        self._streams = {stream}

    def read_on(self, stream: int) -> None:
        """Note that launches on this stream, the current one, read the table.

        Its memory is then not used again before they have run, should it be freed meanwhile.
        """
        if stream not in self._streams and not self.captured:
            self._streams.add(stream)
            self.table.record_stream(torch.cuda.current_stream(self.table.device))


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
    if not (units and columns and w1.shape[1]):
        raise ValueError(f"projector {m}: w1 {tuple(w1.shape)} and w2 {tuple(w2.shape)} are empty")
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
        self._dispatch: bool | None = True if self._interpret else None  # None: not looked yet
        self._variants: dict[tuple[Any, ...], Any] = {}
        self._weights: OrderedDict[tuple[Any, ...], _Weights] = OrderedDict()

    # -- the op and its halves ------------------------------------------------------------------

    def fuse(
        self,
        input_ids: torch.Tensor,
        token_table: torch.Tensor,
        order: torch.Tensor,
        order_at: int,
        tables: RowTables,
        counts: Sequence[int],
        projectors: Sequence[Projector],
        *,
        vocab_start: int = 0,
        out: torch.Tensor | None = None,
        launch: Mode | LaunchConfig = "fastest",
    ) -> torch.Tensor:
        """`fuse_embeddings` of a plan's tensors. See `ops.fuse_embeddings` and `plan.RowPlan`.

        Raises:
            ValueError: tensors differ in dtype or device, or do not fit together.
        """
        tokens, columns = input_ids.shape[0], token_table.shape[1]
        if token_table.stride(1) != 1:
            raise ValueError("the token table is transposed; call .contiguous() on it once")
        dtype = token_table.dtype
        for name, tensor in (("input_ids", input_ids), ("the token table", token_table)):
            if tensor.device != self._device:
                raise ValueError(f"{name} lies on {tensor.device}, expected {self._device}")
        if order.device != self._device or tables.buffer.device != self._device:
            raise ValueError(f"the plan lies on {order.device}, expected {self._device}")
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
        if input_ids.dtype not in INTEGERS or not input_ids.is_contiguous():
            input_ids = input_ids.long().contiguous()
        total = sum(counts)
        with self._on_device():
            if total:
                weights = self._weights_of(projectors, dtype)
                self._project(
                    weights, tables, counts, total, result, launch, (order, order_at),
                    (input_ids, token_table, vocab_start),
                )  # fmt: skip
            elif tokens:
                self._gather_text(input_ids, token_table, vocab_start, result)
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
            rows = rows if rows.stride(1) == 1 else rows.contiguous()
            with self._on_device():
                weights = self._weights_of([projector], rows.dtype)
                tables = tables_of([[rows]], [count], [rows.shape[1]], rows.dtype, rows.device)
                self._project(weights, tables, [count], count, out, launch)
        return out

    def warm_up(
        self, projectors: Sequence[Projector], ids_dtypes: Sequence[torch.dtype] = (torch.int32,)
    ) -> int:
        """Compile every variant that steps with these projectors can meet, and launch none.

        For rows that lie together by modality, as `plan_rows` lays those of packs, in mode
        "fastest", with token table and out aligned to 16 bytes.

        Returns:
            How many variants there are.
        """
        with self._on_device():
            weights = self._weights_of(projectors, projectors[0].w1.dtype)
            dtype = projectors[0].w1.dtype
            align = max(weights.align_bytes // dtype.itemsize, 1)
            aligned = weights.align_bytes == FULL_ALIGN_BYTES
            ups, downs = every_tile(dtype, self.capability, aligned)
            text_tile = (LaunchConfig.block_t, text_columns(weights.columns))
            dependent = self._depends(launches_dependently(self.capability))
            before = len(self._variants)
            entries = num_entries(len(projectors))
            for tile in ups:
                self._up(weights, tile, dtype, align, entries, False, dependent)
            for tile in downs:
                for ids_dtype in ids_dtypes:
                    self._down(
                        weights, tile, dtype, ids_dtype, align, entries, True,
                        text_tile, dependent,
                    )  # fmt: skip
            return len(self._variants) - before

    # -- launches -------------------------------------------------------------------------------

    def _project(
        self,
        weights: _Weights,
        tables: RowTables,
        counts: Sequence[int],
        total: int,
        out: torch.Tensor,
        launch: Mode | LaunchConfig,
        order: tuple[torch.Tensor, int] | None = None,
        text: tuple[torch.Tensor, torch.Tensor, int] | None = None,
    ) -> None:
        """K1 and K2; `order` and `text` (ids, token table, vocab_start) are for `fuse`."""
        tokens, columns = out.shape
        dtype, itemsize = out.dtype, out.dtype.itemsize
        if weights.columns != columns or len(counts) != len(weights.rows):
            raise ValueError(
                f"{len(weights.rows)} projectors to {weights.columns} columns, expected "
                f"{len(counts)} to {columns}"
            )
        tensors = (out,) if text is None else (out, text[1])
        align = _align_of(itemsize, math.gcd(tables.align_bytes, weights.align_bytes), *tensors)
        recipe = self._recipe(
            weights,
            (
                tuple(counts),
                dtype,
                align,
                tables.addresses_at >= 0,
                None if text is None else text[0].dtype,
                launch,
            ),
        )
        hidden = torch.empty(total, recipe.stride, dtype=dtype, device=self._device)
        stream = self._stream()
        weights.read_on(stream)
        entries = self._part(tables.buffer, tables.entries_at)
        addresses = entries
        if tables.addresses_at >= 0:
            addresses = self._part(tables.buffer, tables.addresses_at)
        # For one modality; with several the kernels read their tables.
        w1, b1, w2, b2, width, units, w1_stride, w2_stride = weights.rows[0]
        count = counts[0]
        recipe.up(
            recipe.up_programs,
            stream,
            entries,
            weights.table if self._interpret else weights.address,
            addresses,
            self._at(hidden),
            recipe.stride,
            tables.address,
            tables.stride,
            count,
            w1,
            b1,
            width,
            units,
            w1_stride,
        )
        programs, num_text, vocab_start, vocab_rows, table_stride = recipe.down_programs, 0, 0, 0, 0
        slots = listed = ids = table = entries
        if order is not None and text is not None:
            input_ids, token_table, vocab_start = text
            num_text = tokens - total
            programs += -(-num_text // recipe.block_t) * -(-columns // recipe.block_d)
            listed = self._part(order[0], order[1])
            slots = self._part(order[0], order[1] + 8 * num_text)
            ids, table = self._at(input_ids), self._at(token_table)
            vocab_rows, table_stride = token_table.shape[0], token_table.stride(0)
        else:
            table = self._at(out)
        recipe.down(
            programs,
            stream,
            entries,
            weights.table if self._interpret else weights.address,
            self._at(hidden),
            recipe.stride,
            slots,
            self._at(out),
            out.stride(0),
            columns,
            ids,
            listed,
            num_text,
            table,
            table_stride,
            vocab_start,
            vocab_rows,
            count,
            w2,
            b2,
            units,
            w2_stride,
        )

    def _recipe(self, weights: _Weights, shape: tuple[Any, ...]) -> _Recipe:
        """What a step's launches need beyond its tensors, made once per kind of step."""
        found = weights.recipes.get(shape)
        if found is not None:
            return found
        counts, dtype, align, by_address, ids_dtype, launch = shape
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
                aligned=align * dtype.itemsize == FULL_ALIGN_BYTES,
                mode=config,
            )
        active = [m for m, count in enumerate(counts) if count]
        entries = num_entries(len(counts))
        some = [counts[m] for m in active]
        units = [weights.hidden[m] for m in active]
        dependent = self._depends(config.dependent)
        text_tile = (config.block_t, config.block_d)
        has_text = ids_dtype is not None
        found = _Recipe(
            up=self._up(weights, config.up, dtype, align, entries, by_address, dependent),
            up_programs=config.up.tiles(some, units),
            down=self._down(
                weights, config.down, dtype, ids_dtype or torch.int64, align, entries, has_text,
                text_tile, dependent,
            ),
            down_programs=config.down.tiles(some, [weights.columns] * len(active)),
            stride=-(-max(units) // HIDDEN_ALIGN) * HIDDEN_ALIGN,
            block_t=config.block_t,
            block_d=config.block_d,
        )  # fmt: skip
        if len(weights.recipes) >= _RECIPES_KEPT:
            weights.recipes.clear()
        weights.recipes[shape] = found
        return found

    def _up(
        self,
        weights: _Weights,
        tile: TileConfig,
        dtype: torch.dtype,
        align: int,
        entries: int,
        by_address: bool,
        dependent: bool,
    ) -> Any:
        constants = _tile_constants(tile, weights.widths, dtype, align, entries, dependent)
        constants["BY_ADDRESS"] = by_address
        return self._variant(
            kernels._project_up_kernel, dtype, torch.int64, FULL_ALIGN_BYTES, constants, tile
        )

    def _down(
        self,
        weights: _Weights,
        tile: TileConfig,
        dtype: torch.dtype,
        ids_dtype: torch.dtype,
        align: int,
        entries: int,
        has_text: bool,
        text_tile: tuple[int, int],
        dependent: bool,
    ) -> Any:
        constants = _tile_constants(tile, weights.hidden, dtype, align, entries, dependent)
        # Slots are listed where there are tokens; rows projected alone go to out[r].
        constants |= {"HAS_SLOTS": has_text, "HAS_TEXT": has_text}
        constants["BLOCK_T"], constants["BLOCK_D"] = text_tile
        return self._variant(
            kernels._project_down_kernel, dtype, ids_dtype, align * dtype.itemsize, constants, tile,
            dependent,
        )  # fmt: skip

    def _gather_text(
        self,
        input_ids: torch.Tensor,
        token_table: torch.Tensor,
        vocab_start: int,
        out: torch.Tensor,
    ) -> None:
        tokens, columns = out.shape
        align = _align_of(out.dtype.itemsize, FULL_ALIGN_BYTES, out, token_table)
        block_t, block_d = LaunchConfig.block_t, text_columns(columns)
        variant = self._variant(
            kernels._gather_text_kernel,
            out.dtype,
            input_ids.dtype,
            align * out.dtype.itemsize,
            {"ALIGN": align, "BLOCK_T": block_t, "BLOCK_D": block_d},
        )
        variant(
            -(-tokens // block_t) * -(-columns // block_d),
            self._stream(),
            self._at(input_ids),
            self._at(token_table),
            token_table.stride(0),
            vocab_start,
            token_table.shape[0],
            self._at(out),
            out.stride(0),
            tokens,
            columns,
        )

    def _variant(
        self,
        kernel: Any,
        dtype: torch.dtype,
        ids_dtype: torch.dtype,
        align_bytes: int,
        constants: dict[str, Any],
        tile: TileConfig | None = None,
        dependent: bool = False,
    ) -> Any:
        """A kernel compiled for these types and constants, once."""
        aligned = align_bytes == FULL_ALIGN_BYTES
        warps, stages = (4, 1) if tile is None else (tile.num_warps, tile.num_stages)
        key = (
            kernel, dtype, ids_dtype, aligned, tuple(constants.values()), warps, stages, dependent
        )  # fmt: skip
        found = self._variants.get(key)
        if found is None:
            in_order = [constants[name] for name in kernel.arg_names if name in constants]
            options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
            if dependent:
                options["launch_pdl"] = True
            if self._dispatches():
                types = types_of(kernel, constants, dtype, ids_dtype)
                found = Dispatched(kernel, types, options, in_order)
                if not self._interpret:
                    found.compile()
            else:
                source = ast_source(kernel, constants, dtype, ids_dtype, aligned)
                found = Compiled(source, options, in_order)
            self._variants[key] = found
        return found

    def _dispatches(self) -> bool:
        """Whether kernels are launched by Triton's own dispatch; looked at once, with a warning.

        Raises:
            RuntimeError: the current stream is being captured, and nobody has looked yet.
        """
        if self._dispatch is None:
            if self._capturing():
                raise RuntimeError(
                    "the kernels are new to this device: run the op once before capturing it"
                )
            reason = why_dispatch(self._device, self._stream())
            self._dispatch = reason is not None
            if reason is not None and DISPATCH_VARIABLE not in reason:
                warnings.warn(
                    f"triton {triton.__version__} launches kernels otherwise than is known here "
                    f"({reason}): they go by its own dispatch, which takes the host longer",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return self._dispatch

    def _depends(self, wanted: bool) -> bool:
        """Whether K2 is launched before K1 ends, where that is `wanted`."""
        return wanted and not self._dispatches() and hasattr(tl.extra.cuda, "gdc_wait")

    # -- small things ---------------------------------------------------------------------------

    def _at(self, tensor: torch.Tensor) -> Any:
        """What a launch takes for a tensor: its address; the interpreter wants the tensor."""
        return tensor if self._interpret else tensor.data_ptr()

    def _part(self, buffer: torch.Tensor, at: int) -> Any:
        """The same for the int64 words of a buffer from byte `at` on."""
        return buffer[at:].view(torch.int64) if self._interpret else buffer.data_ptr() + at

    def _stream(self) -> int:
        if self._interpret:
            return 0
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def _capturing(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _on_device(self) -> Any:
        """Launches go to the current device: make it ours, at no cost where it is."""
        if self._interpret or torch.cuda.current_device() == self._device.index:
            return _NOTHING
        return torch.cuda.device(self._device)

    def _weights_of(self, projectors: Sequence[Projector], dtype: torch.dtype) -> _Weights:
        # The key holds all that is looked at where a table is made, so that no set of weights can
        # pass for another, whoever owned the addresses before.
        key = (dtype, *[_identity(projector) for projector in projectors])
        found = self._weights.get(key)
        if found is not None:
            self._weights.move_to_end(key)
        else:
            if len(projectors) > MAX_MODALITIES:
                raise ValueError(f"{len(projectors)} modalities, expected {MAX_MODALITIES} at most")
            found = _Weights(projectors, dtype, self._device, self._stream())
            # The least recently used go, but for those that a graph reads.
            free = [old for old, weights in self._weights.items() if not weights.captured]
            for old in free[: max(0, len(free) + 1 - _WEIGHT_TABLES_KEPT)]:
                del self._weights[old]
            self._weights[key] = found
        if not found.captured and self._capturing():
            found.captured = True
        return found


def _tile_constants(
    tile: TileConfig,
    depths: Sequence[int],
    dtype: torch.dtype,
    align: int,
    entries: int,
    dependent: bool,
) -> dict[str, Any]:
    """The constexprs that K1 and K2 share; `depths` are what they multiply along."""
    return {
        "NUM_ENTRIES": entries,
        "BLOCK_R": tile.block_r,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_R": tile.group_r,
        "ALIGN": align,
        "EVEN_K": all(depth % tile.block_k == 0 for depth in depths),
        "SWAP": tile.swap,
        "DEPENDENT": dependent,
        "INPUT_PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


_NOTHING = _Nothing()


def _identity(projector: Projector) -> tuple[Any, ...]:
    """All of a projector that `_Weights` reads or checks."""
    found: list[Any] = []
    for tensor in projector:
        if tensor is None:
            found.append(None)
        else:
            found += (
                tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
            )  # fmt: skip
    return tuple(found)


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


triton_backend = PerDevice(TritonBackend)
