"""Items of a prompt to rows: checked, joined and converted."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mmqwen.banks.rows import is_named
from mmqwen.modalities import ModalitySpec
from mmqwen.transport.arrays import (
    array_to_tensor,
    count_rows,
    dense_tensor,
    list_to_array,
    native_array,
    torch_dtypes,
)
from mmqwen.transport.errors import SHOWN, EmbeddingError, refuse, show

if TYPE_CHECKING:
    import torch


def concat_items(
    items: Sequence[Any], spec: ModalitySpec, dtype: torch.dtype
) -> tuple[torch.Tensor, list[int]]:
    """Validate the items of one modality and join their rows, converting and checking only once.

    Args:
        items: `[d]` vectors or `[n, d]` matrices: torch tensors (any device, any strides), numpy
            arrays (fp16, fp32, fp64, ml_dtypes' bfloat16) or nested lists of numbers.
        spec: the modality.
        dtype: floating dtype of the result.

    Returns:
        Contiguous rows `[R, d]` in host memory and the rows of each item. The rows may share the
        memory of a single item that was already as it should be.

    Raises:
        EmbeddingError: an item is not dense, floating, finite (also after the conversion), of the
            right width and of 1 to `max_rows` rows.
    """
    joined, counts = join_items(items, spec)
    rows = joined.to(dtype).contiguous()
    if not all_finite(rows):
        refuse_non_finite(joined, counts, spec, dtype)
    return rows, counts


def join_items(items: Sequence[Any], spec: ModalitySpec) -> tuple[torch.Tensor, list[int]]:
    """The first half of `concat_items`: all but the conversion and the test for finiteness.

    Items that are alike (plain dense tensors of one dtype) are checked by a few calls over all of
    them, since a line of Python for each costs more than their data: 64 one-row items of 768
    elements take 25 us so, and 140 us one by one (docs/serving-cost.md).

    Returns:
        Rows `[R, d]` in host memory in the items' own dtype, perhaps not contiguous or not finite,
        and the rows of each item.

    Raises:
        EmbeddingError: as `concat_items`, but for values.
    """
    alike = _join_alike(items, spec)
    return _join_one_by_one(items, spec) if alike is None else alike


def convert_rows(rows: torch.Tensor, out: torch.Tensor) -> bool:
    """Copy rows `[n, d]` into `out`, of the dtype to serve; whether all are finite there."""
    out.copy_(rows)
    return all_finite(out)


def _join_alike(items: Sequence[Any], spec: ModalitySpec) -> tuple[torch.Tensor, list[int]] | None:
    """Items that are alike and without fault, joined; None: look at them one by one."""
    torch = sys.modules.get("torch")
    if torch is None or not items:
        return None
    tensor = torch.Tensor
    try:
        if set(map(type, items)) != {tensor}:
            return None
        dtypes = set(map(tensor.dtype.__get__, items))
        if not dtypes <= torch_dtypes() or len(dtypes) > 1:
            return None
        shapes = list(map(tensor.size, items))
        kinds = set(shapes)
        flat = all(len(shape) == 1 for shape in kinds)
        for shape in kinds:
            if len(shape) != (1 if flat else 2) or shape[-1] != spec.dim:
                return None
            rows = 1 if flat else shape[0]
            if not 0 < rows <= spec.max_rows:
                return None
        # Sparse, nested or foreign members show in the result, or make it fail.
        joined = items[0] if len(items) == 1 else torch.cat(items)
    except RuntimeError:
        return None
    if joined.layout is not torch.strided or joined.is_nested:
        return None
    if not joined.is_cpu:
        if not joined.is_cuda:
            return None
        joined = joined.cpu()
    if joined.requires_grad:
        joined = joined.detach()
    if joined.is_neg():  # imaginary parts of complex tensors have a pending minus sign
        joined = joined.resolve_neg()
    if len(kinds) == 1:
        return joined.view(-1, spec.dim) if flat else joined, [rows] * len(items)
    return joined, [shape[0] for shape in shapes]


def _join_one_by_one(items: Sequence[Any], spec: ModalitySpec) -> tuple[torch.Tensor, list[int]]:
    import torch

    name, dim = spec.name, spec.dim
    counts: list[int] = []
    parts: list[Any] = []
    numpy_only = True
    all_dims = set()  # 1 and 2 may be mixed; flattening every part costs, so know when not to
    for index, item in enumerate(items):
        if isinstance(item, torch.Tensor):
            numpy_only = False
            item = dense_tensor(item, name, index)
            counts.append(count_rows(item.shape, spec, index))
            dims = item.dim()
        else:
            if isinstance(item, np.ndarray):
                counts.append(count_rows(item.shape, spec, index))
                item = native_array(item, name, index)
            elif isinstance(item, (list, tuple)):
                item = list_to_array(item, name, index, spec)
                counts.append(count_rows(item.shape, spec, index))
            else:
                refuse(
                    "type", name, index, show(item), "a torch tensor, numpy array or nested list",
                    "pass each item as a [width] or [rows, width] array of floats",
                )  # fmt: skip
            numpy_only = numpy_only and item.dtype.kind == "f"
            dims = item.ndim
        all_dims.add(dims)
        parts.append(item)

    if not parts:
        return torch.empty(0, dim), counts
    if len(all_dims) == 2:
        parts = [part.reshape(-1) for part in parts]
    if numpy_only and len(parts) > 1:
        joined = torch.from_numpy(np.concatenate(parts))
    else:
        tensors = [array_to_tensor(p) if isinstance(p, np.ndarray) else p for p in parts]
        # Imaginary parts of complex tensors are real tensors with a pending minus sign.
        joined = tensors[0].resolve_neg() if len(tensors) == 1 else torch.cat(tensors)
    if joined.dim() == 1:
        joined = joined.view(-1, dim) if joined.is_contiguous() else joined.reshape(-1, dim)
    return joined, counts


def all_finite(rows: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is NaN or infinite if any term is, and costs a thirtieth of `isfinite().all()` (6 us
    against 247 us for 128 x 768 bf16 on one core). Only a sum that overflows needs the slow test.
    """
    import torch

    # fp16 sums of quite ordinary rows leave fp16's range.
    total = rows.sum(dtype=torch.float32) if rows.dtype is torch.float16 else rows.sum()
    return math.isfinite(total.item()) or bool(rows.isfinite().all())


def refuse_non_finite(
    source: torch.Tensor, counts: Sequence[int], spec: ModalitySpec, dtype: torch.dtype
) -> NoReturn:
    """Say which item and row holds the first NaN or Inf, and whether the conversion made it.

    Args:
        source: rows `[R, d]` before the conversion to `dtype`, not all finite after it.
        counts: the rows of each item.
        spec: the modality.
        dtype: the dtype to serve.

    Raises:
        EmbeddingError: always.
    """
    rows = source.to(dtype)
    at = int((~rows.isfinite()).any(dim=1).nonzero()[0])
    row, index = at, 0
    while row >= counts[index]:
        row -= counts[index]
        index += 1
    if bool(source[at].isfinite().all()):
        name = str(dtype).removeprefix("torch.")
        got = f"a value beyond the range of {name} in row {row}"
        remedy = f"scale the rows, or serve the model in another dtype than {name}"
    else:
        got = f"NaN or Inf in row {row}"
        remedy = "check what the encoder returned"
    refuse("non_finite", spec.name, index, got, "finite numbers", remedy)


def check_item(value: Any, spec: ModalitySpec, *, index: int, dtype: torch.dtype) -> torch.Tensor:
    """One item as contiguous rows `[n, d]` in host memory; see `concat_items` for what is taken.

    Args:
        value: the item.
        spec: its modality.
        index: its position among that modality's items, for messages.
        dtype: floating dtype of the result.

    Raises:
        EmbeddingError: the item cannot be served.
    """
    try:
        return concat_items((value,), spec, dtype)[0]
    except EmbeddingError as error:
        raise at_index(error, index) from None


def at_index(error: EmbeddingError, index: int) -> EmbeddingError:
    """The error of an item of a part of a list, told of the item at `index` of the whole list."""
    message = str(error).replace(f", item {error.index}:", f", item {index}:", 1)
    return EmbeddingError(message, modality=error.modality, index=index, reason=error.reason)


def as_items(value: Any, modality: str) -> Sequence[Any]:
    """What a caller gave for one modality, as a list of items: a bare array is one item, and so
    are bare rows of a bank.

    Raises:
        EmbeddingError: a 3-D array, a flat list of numbers, or something that is no list at all.
    """
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (int, float)):
            refuse(
                "dims", modality, None, "a flat list of numbers", "a list of items",
                "write one vector as [[x, ...]]",
            )  # fmt: skip
        return value
    if is_named(value):
        return (value,)
    if isinstance(value, np.ndarray) or hasattr(value, "layout"):
        if len(value.shape) in (1, 2):
            return (value,)
        refuse(
            "dims", modality, None, f"an array of {len(value.shape)} dimensions",
            "a list of items, or one item of 1 or 2 dimensions", "pass list(array)",
        )  # fmt: skip
    refuse(
        "type", modality, None, show(value), "a list of items, or one torch tensor or numpy array",
        "pass [item, ...]",
    )  # fmt: skip


def check_items(
    data: Mapping[str, Any], specs: Mapping[str, ModalitySpec], *, dtype: torch.dtype
) -> dict[str, list[torch.Tensor]]:
    """Validate everything that one prompt brings: `{"m1": [item, ...], "m2": array}`.

    A list or tuple holds items; a bare 1-D or 2-D tensor or array is one item. An empty list
    stands for no items.

    Args:
        data: items by modality.
        specs: the modalities that the model knows.
        dtype: floating dtype of the result.

    Returns:
        For each modality, in the caller's order, its items as rows `[n, d]` (views of one tensor).

    Raises:
        EmbeddingError: an unknown modality, or an item that cannot be served.
    """
    if not isinstance(data, Mapping):
        refuse(
            "type", None, None, show(data), "a dict from modality to items",
            'write {"name": [item, ...]}',
        )  # fmt: skip
    checked: dict[str, list[torch.Tensor]] = {}
    for name, value in data.items():
        spec = specs.get(name) if isinstance(name, str) else None
        if spec is None:
            refuse_unknown(name, specs)
        rows, counts = concat_items(as_items(value, name), spec, dtype)
        checked[name] = [rows] if len(counts) == 1 else list(rows.split(counts)) if counts else []
    return checked


def refuse_unknown(name: object, specs: Mapping[str, ModalitySpec]) -> NoReturn:
    """Raise the error for a modality that the model does not know."""
    raise EmbeddingError(
        f"unknown modality {show(name)}; expected one of {sorted(specs)}; use one of these names, "
        "or a checkpoint that has it",
        modality=name if isinstance(name, str) and len(name) <= SHOWN else None,
        reason="unknown_modality",
    )
