"""One item, whatever a caller made it of: shape, dtype and kind checked before a byte is copied."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mmqwen.modalities import ROW_DTYPES, ModalitySpec
from mmqwen.transport.errors import SHOWN, refuse, show

if TYPE_CHECKING:
    import torch


# -- shapes ------------------------------------------------------------------------------------


def count_rows(shape: Sequence[int], spec: ModalitySpec, index: int | None) -> int:
    """Rows of an item of this shape, or a refusal."""
    dims = len(shape)
    if dims == 2:
        rows, width = shape
    elif dims == 1:
        rows, width = 1, shape[0]
    else:
        sizes = ", ".join(map(show, shape[:8]))
        refuse(
            "dims", spec.name, index, f"{dims} dimensions, shape [{sizes}]",
            f"[{spec.dim}] or [rows, {spec.dim}]",
            "pass a batch as a list with one array per item",
        )  # fmt: skip
    if width != spec.dim:
        refuse(
            "width", spec.name, index, f"rows of width {show(width)}", f"width {spec.dim}",
            "use the encoder that this modality's projector was made for",
        )  # fmt: skip
    if not 0 < rows <= spec.max_rows:
        refuse(
            "rows", spec.name, index, f"{show(rows)} rows", f"1 to {spec.max_rows} rows",
            "leave empty items out, and split long ones or raise the modality's max_rows",
        )  # fmt: skip
    return rows


def bad_dtype(modality: str | None, index: int | None, got: object) -> NoReturn:
    refuse(
        "dtype", modality, index, f"dtype {str(got)[:SHOWN]}",
        "float64, float32, float16 or bfloat16", "convert with .astype() or .to()",
    )  # fmt: skip


# -- numpy and lists ---------------------------------------------------------------------------


def native_array(array: np.ndarray, modality: str | None, index: int | None) -> np.ndarray:
    """A floating numpy array in this host's byte order, or a refusal. Never copies native ones."""
    dtype = array.dtype
    if isinstance(array, np.ma.MaskedArray):
        refuse(
            "dtype", modality, index, "a masked array", "a dense array", "fill it with .filled(0)"
        )
    if type(array) is not np.ndarray:  # a matrix keeps two dimensions however it is reshaped
        array = array.view(np.ndarray)
    if dtype.kind == "f" and dtype.itemsize in (2, 4, 8):
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
    if dtype.name == "bfloat16" and dtype.itemsize == 2:  # ml_dtypes
        return array
    if dtype.kind == "O":
        refuse(
            "dtype", modality, index, "an array of Python objects", "floating-point numbers",
            "rows of one item must have the same width; pass items of their own as a list",
        )  # fmt: skip
    bad_dtype(modality, index, dtype)


def _check_numbers(row: Sequence[Any], modality: str | None, index: int | None) -> None:
    """Refuse a row of a nested list that holds anything but Python or numpy real numbers."""
    for kind in set(map(type, row)):
        if kind is float or kind is int or issubclass(kind, np.floating):
            continue
        nested = issubclass(kind, (list, tuple))
        refuse(
            "dims" if nested else "type", modality, index,
            "lists nested more than two deep" if nested else f"a {kind.__name__} in a list",
            "numbers", "write an item as [x, ...] or [[x, ...], ...]",
        )  # fmt: skip


def list_to_array(
    value: Sequence[Any], modality: str | None, index: int | None, spec: ModalitySpec | None = None
) -> np.ndarray:
    """Nested lists of numbers as float32; shape and types are checked before anything is copied.

    Whole numbers count as floats here, because JSON writers drop the `.0`.
    """
    flat = not value or not isinstance(value[0], (list, tuple))
    if flat:
        if spec:
            count_rows((len(value),), spec, index)
        _check_numbers(value, modality, index)
    else:
        width = len(value[0])
        if spec:
            count_rows((len(value), width), spec, index)
        for at, row in enumerate(value):
            if not isinstance(row, (list, tuple)) or len(row) != width:
                got = f"{len(row)} numbers" if isinstance(row, (list, tuple)) else show(row)
                refuse(
                    "ragged", modality, index, f"{got} in row {at}",
                    f"{width} numbers, as in row 0", "make all rows of an item equally wide",
                )  # fmt: skip
            _check_numbers(row, modality, index)
    try:
        with np.errstate(over="ignore"):
            return np.array(value, dtype=np.float64).astype(np.float32)
    except (OverflowError, ValueError, TypeError):
        refuse(
            "non_finite", modality, index, "a number too large for float32", "finite numbers",
            "check what the encoder returned",
        )  # fmt: skip


def array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over a checked numpy array; shares its memory where torch can."""
    import torch

    if array.dtype.name == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.int16)
        return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(torch.bfloat16)
    # torch takes neither negative strides (which a single row may have and be contiguous) nor,
    # without a warning, read-only memory.
    flags, size = array.flags, array.itemsize
    odd = any(stride < 0 or stride % size for stride in array.strides)
    if odd or not (flags.c_contiguous and flags.writeable):
        array = array.copy()
    return torch.from_numpy(array)


# -- torch -------------------------------------------------------------------------------------


@cache
def torch_dtypes() -> frozenset[torch.dtype]:
    """torch's own of `ROW_DTYPES`."""
    import torch

    return frozenset(getattr(torch, name) for name in ROW_DTYPES)


def dense_tensor(value: torch.Tensor, modality: str | None, index: int | None) -> torch.Tensor:
    """The tensor, detached and on the CPU, if it is dense and floating; else a refusal."""
    import torch

    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        refuse(
            "sparse", modality, index, f"a {kind} tensor", "a dense (strided) tensor",
            "send dense rows; sparse ones are never densified here",
        )  # fmt: skip
    if value.dtype not in torch_dtypes() | {torch.float64}:
        bad_dtype(modality, index, value.dtype)
    if value.is_meta:
        refuse(
            "type", modality, index, "a meta tensor, which has no values", "a tensor with values",
            "materialise it first",
        )  # fmt: skip
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        refuse(
            "type", modality, index, f"a {type(value).__name__}", "a plain tensor",
            "convert it to an ordinary torch.Tensor",
        )  # fmt: skip
    if value.requires_grad:
        value = value.detach()
    return value if value.is_cpu else value.cpu()
