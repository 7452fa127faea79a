"""Host path of the Triton kernels: two launches a step, no sync, nothing built twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch

from mmqwen_kernels import triton_kernels as kernels
from mmqwen_kernels.launcher import INTEGERS, Kernels, current_stream
from mmqwen_kernels.plan import RowPlan, plan_of_rows
from mmqwen_kernels.reference import Projector
from mmqwen_kernels.row_tables import ALIGN_BYTES, num_entries
from mmqwen_kernels.tiles import (
    LaunchConfig,
    TileConfig,
    choose_config,
    every_tile,
    launches_dependently,
    text_columns,
)
from mmqwen_kernels.weights import WeightTable, WeightTables

HIDDEN_ALIGN = 16  # elements; K2's kernel relies on it
_RECIPES_KEPT = 4096


class _Kind(NamedTuple):
    """What a step's kernels are compiled for, beside its projectors and tiles."""

    dtype: torch.dtype
    align: int
    by_address: bool
    ids_dtype: torch.dtype | None  # None: rows are projected alone
    dependent: bool
    block_t: int
    block_d: int
    projected: bool = False


class _Recipe(NamedTuple):
    """A step's launches but for its tensors."""

    up: Any
    up_programs: int
    down: Any
    down_programs: int
    stride: int
    kind: _Kind


class TritonBackend:
    """Runs the op by the Triton kernels on one CUDA device, or on the CPU under the interpreter.

    Holds the weights' address tables and the compiled kernels. Scratch memory comes from torch's
    caching allocator at every call: a buffer of our own would be shared between streams, and freed
    under a captured graph when it grows.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._interpret = device.type != "cuda"
        if self._interpret:
            self.capability, self.num_sms = (8, 0), 4
        else:
            found = torch.cuda.get_device_properties(device.index)
            self.capability, self.num_sms = (found.major, found.minor), found.multi_processor_count
        self.kernels = Kernels(device)
        self._weights = WeightTables(device)

    # -- the op and its halves ------------------------------------------------------------------

    def fuse(
        self,
        input_ids: torch.Tensor,
        token_table: torch.Tensor,
        plan: RowPlan,
        projectors: Sequence[Projector],
        *,
        vocab_start: int = 0,
        out: torch.Tensor | None = None,
        launch: LaunchConfig | None = None,
    ) -> torch.Tensor:
        """`fuse_embeddings` of a plan. See `ops.fuse_embeddings`.

        Raises:
            ValueError: tensors differ in dtype or device, or do not fit together.
        """
        tokens, columns = input_ids.shape[0], token_table.shape[1]
        if token_table.stride(1) != 1:
            raise ValueError("the token table is transposed; call .contiguous() on it once")
        dtype = token_table.dtype
        where = {"input_ids": input_ids, "the token table": token_table, "the plan": plan.buffer}
        for name, tensor in where.items():
            if tensor.device != self._device:
                raise ValueError(f"{name} lies on {tensor.device}, expected {self._device}")
        shape = (tokens, columns)
        if out is not None and (out.shape, out.dtype, out.device) != (shape, dtype, self._device):
            raise ValueError(
                f"out is {tuple(out.shape)} of {out.dtype} on {out.device}, expected "
                f"{shape} of {dtype} on {self._device}"
            )
        if out is None or out.stride(1) != 1:
            result = torch.empty(shape, dtype=dtype, device=self._device)
        else:
            result = out
        if input_ids.dtype not in INTEGERS or not input_ids.is_contiguous():
            input_ids = input_ids.long().contiguous()
        with self._on_device():
            if plan.num_rows or plan.num_projected:
                weights = self._weights.of(projectors, dtype)
                text = (input_ids, token_table, vocab_start)
                self._project(weights, plan, result, launch, text)
            elif tokens:
                self._gather_text(input_ids, token_table, vocab_start, result)
        return result if out is None or result is out else out.copy_(result)

    def project(
        self, rows: torch.Tensor, projector: Projector, *, launch: LaunchConfig | None = None
    ) -> torch.Tensor:
        """`project_rows`: `[R, d]` -> `[R, D]`, two launches.

        Raises:
            ValueError: rows and projector differ in dtype, device or width.
        """
        if rows.ndim != 2 or rows.shape[1] != projector.width:
            raise ValueError(f"rows are {tuple(rows.shape)}, expected [R, {projector.width}]")
        count, columns = rows.shape[0], projector.w2.shape[0]
        out = torch.empty(count, columns, dtype=rows.dtype, device=self._device)
        if count:
            with self._on_device():
                weights = self._weights.of([projector], rows.dtype)
                self._project(weights, plan_of_rows(rows), out, launch)
        return out

    def warm_up(
        self, projectors: Sequence[Projector], *, resident: bool = False, projected: bool = False
    ) -> int:
        """Compile every variant that steps with these projectors can meet, and launch none.

        For int32 ids and rows that lie together by modality, as `plan_rows` lays those that it
        copies, with token table and out aligned to 16 bytes; where some are `resident`, also for
        rows by address, and where some are `projected`, also for those.

        Returns:
            How many variants there are.
        """
        with self._on_device():
            dtype = projectors[0].w2.dtype
            weights = self._weights.of(projectors, dtype)
            align = max(weights.align_bytes // dtype.itemsize, 1)
            aligned = weights.align_bytes == ALIGN_BYTES
            ups, downs = every_tile(dtype, self.capability, aligned, weights.norms)
            dependent = self.kernels.depends(launches_dependently(self.capability))
            text_tile = (LaunchConfig.block_t, text_columns(weights.columns))
            kind = _Kind(dtype, align, False, torch.int32, dependent, *text_tile)
            before = len(self.kernels)
            for tile in ups:
                for by_address in (False, True) if resident else (False,):
                    self._up(weights, tile, kind._replace(by_address=by_address))
            for tile in downs:
                for done in (False, True) if projected else (False,):
                    self._down(weights, tile, kind._replace(projected=done))
            if projected:
                none = (0,) * len(projectors)
                self._recipe(weights, (none, dtype, align, False, torch.int32, None, True))
            return len(self.kernels) - before

    # -- launches -------------------------------------------------------------------------------

    def _project(
        self,
        weights: WeightTable,
        plan: RowPlan,
        out: torch.Tensor,
        launch: LaunchConfig | None,
        text: tuple[torch.Tensor, torch.Tensor, int] | None = None,
    ) -> None:
        """K1 and K2; `text` (ids, token table, vocab_start) is for `fuse`."""
        columns, total = out.shape[1], plan.num_rows
        counts, dtype = plan.counts, out.dtype
        if weights.columns != columns:
            raise ValueError(
                f"{len(counts)} projectors to {weights.columns} columns, expected {len(counts)} to "
                f"{columns}"
            )
        tensors = (out,) if text is None else (out, text[1])
        align = _align_of(dtype.itemsize, math.gcd(plan.align_bytes, weights.align_bytes), *tensors)
        ids_dtype = None if text is None else text[0].dtype
        shape = (counts, dtype, align, plan.addresses_at >= 0, ids_dtype, launch)
        recipe = self._recipe(weights, (*shape, plan.num_projected > 0))
        hidden = torch.empty(total, recipe.stride, dtype=dtype, device=self._device)
        stream = current_stream(self._device)
        weights.read_on(stream)
        table = weights.table if self._interpret else weights.address
        slots = addresses = entries = self._part(plan.buffer, 0)
        if plan.addresses_at >= 0:
            addresses = self._part(plan.buffer, plan.addresses_at)
        # Counts, what is `alone`, address and stride are for one modality; with several the kernels
        # read their tables.
        if total:
            recipe.up(
                recipe.up_programs,
                stream,
                entries,
                table,
                addresses,
                self._at(hidden),
                recipe.stride,
                plan.address,
                plan.stride,
                counts[0],
                *weights.up_alone,
            )
        programs = recipe.down_programs
        gathered = (entries, entries, 0, self._at(out), 0, 0, 0)
        if text is not None:
            ids, vocabulary, vocab_start = text
            num_text = len(ids) - total
            programs += -(-num_text // recipe.kind.block_t) * -(-columns // recipe.kind.block_d)
            slots = self._part(plan.buffer, plan.order_at + 8 * num_text)
            gathered = (
                self._at(ids),
                self._part(plan.buffer, plan.order_at),
                num_text,
                self._at(vocabulary),
                vocabulary.stride(0),
                vocab_start,
                vocabulary.shape[0],
            )
        recipe.down(
            programs,
            stream,
            entries,
            table,
            self._at(hidden),
            recipe.stride,
            slots,
            self._at(out),
            out.stride(0),
            columns,
            *gathered,
            counts[0],
            *weights.down_alone,
        )

    def _recipe(self, weights: WeightTable, shape: tuple[Any, ...]) -> _Recipe:
        """What a step's launches need beyond its tensors, made once per kind of step."""
        found = weights.recipes.get(shape)
        if found is not None:
            return found
        counts, dtype, align, by_address, ids_dtype, launch, projected = shape
        config = launch or choose_config(
            counts,
            weights.widths,
            weights.hidden,
            weights.columns,
            dtype,
            self.capability,
            self.num_sms,
            aligned=align * dtype.itemsize == ALIGN_BYTES,
            norms=weights.norms,
        )
        if not any(counts):
            # All rows were projected before: K2's text tiles alone, which without K1 before them
            # have nothing that they may overtake, and need no memory for a product.
            small = replace(config.down, num_stages=1, group_r=1)
            config = replace(config, down=small, dependent=False)
        active = [m for m, count in enumerate(counts) if count] or [0]
        some = [counts[m] for m in active]
        units = [weights.hidden[m] for m in active]
        dependent = self.kernels.depends(config.dependent)
        text_tile = (config.block_t, config.block_d)
        kind = _Kind(dtype, align, by_address, ids_dtype, dependent, *text_tile, projected)
        found = _Recipe(
            up=self._up(weights, config.up, kind) if any(counts) else None,
            up_programs=config.up.tiles(some, units),
            down=self._down(weights, config.down, kind),
            down_programs=config.down.tiles(some, [weights.columns] * len(active)),
            stride=-(-max(units) // HIDDEN_ALIGN) * HIDDEN_ALIGN,
            kind=kind,
        )
        if len(weights.recipes) >= _RECIPES_KEPT:
            weights.recipes.clear()
        weights.recipes[shape] = found
        return found

    def _up(self, weights: WeightTable, tile: TileConfig, kind: _Kind) -> Any:
        constants = _tile_constants(tile, weights.widths, kind)
        constants["BY_ADDRESS"] = kind.by_address
        constants["ACTIVATION"] = weights.activation
        constants["NORMS"], constants["DIRECT"] = weights.norms, weights.direct
        return self.kernels.get(
            kernels._project_up_kernel, kind.dtype, torch.int64, constants, tile
        )

    def _down(self, weights: WeightTable, tile: TileConfig, kind: _Kind) -> Any:
        constants = _tile_constants(tile, weights.hidden, kind)
        constants["HAS_TOKENS"] = kind.ids_dtype is not None
        constants["BLOCK_T"], constants["BLOCK_D"] = kind.block_t, kind.block_d
        constants["PROJECTED"] = kind.projected
        ids_dtype = kind.ids_dtype or torch.int64
        return self.kernels.get(
            kernels._project_down_kernel, kind.dtype, ids_dtype, constants, tile, kind.dependent
        )

    def _gather_text(
        self,
        input_ids: torch.Tensor,
        token_table: torch.Tensor,
        vocab_start: int,
        out: torch.Tensor,
    ) -> None:
        tokens, columns = out.shape
        align = _align_of(out.dtype.itemsize, ALIGN_BYTES, out, token_table)
        block_t, block_d = LaunchConfig.block_t, text_columns(columns)
        variant = self.kernels.get(
            kernels._gather_text_kernel,
            out.dtype,
            input_ids.dtype,
            {"ALIGN": align, "BLOCK_T": block_t, "BLOCK_D": block_d},
        )
        variant(
            -(-tokens // block_t) * -(-columns // block_d),
            current_stream(self._device),
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

    # -- small things ---------------------------------------------------------------------------

    def _at(self, tensor: torch.Tensor) -> Any:
        """What a launch takes for a tensor: its address; the interpreter wants the tensor."""
        return tensor if self._interpret else tensor.data_ptr()

    def _part(self, buffer: torch.Tensor, at: int) -> Any:
        """The same for the int64 words of a buffer from byte `at` on."""
        return buffer[at:].view(torch.int64) if self._interpret else buffer.data_ptr() + at

    def _on_device(self) -> Any:
        """Launches go to the current device: make it ours, at no cost where it is."""
        if self._interpret or torch.cuda.current_device() == self._device.index:
            return _NOTHING
        return torch.cuda.device(self._device)


def _tile_constants(tile: TileConfig, depths: Sequence[int], kind: _Kind) -> dict[str, Any]:
    """The constexprs that K1 and K2 share; `depths` are what they multiply along."""
    return {
        "NUM_ENTRIES": num_entries(len(depths)),
        "BLOCK_R": tile.block_r,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_R": tile.group_r,
        "ALIGN": kind.align,
        "EVEN_K": all(depth % tile.block_k == 0 for depth in depths),
        "SWAP": tile.swap,
        "DEPENDENT": kind.dependent,
        "INPUT_PRECISION": "ieee" if kind.dtype == torch.float32 else "tf32",
    }


_NOTHING = nullcontext()


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


triton_backend = cache(TritonBackend)
"""A device's own."""
