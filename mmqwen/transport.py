"""Validation of embedding rows, and their wire format: bytes <-> rows.

Every door hands rows to this module before anything else sees them. What leaves it is dense,
finite, contiguous, of the right width and in the model's dtype; everything else is refused with an
`EmbeddingError` that says which item, what was got, what was expected and what to do.

Nothing is unpickled, and sizes are checked from header fields before a byte is decoded or
allocated. torch is imported on first use, so that a client can encode numpy rows without it.
"""

from __future__ import annotations

import binascii
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mmqwen.modalities import ModalitySpec

try:
    import pybase64
except ImportError:  # pragma: no cover - a client's environment may lack it
    pybase64 = None  # type: ignore[assignment]

if TYPE_CHECKING:
    import torch

WIRE_DTYPES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Dtypes that may travel, with the bytes of one element."""

DEFAULT_MAX_BYTES = 64 * 1024 * 1024
"""Most decoded bytes of one item on the wire, unless told."""

_FIELDS = ("data", "dtype", "shape")
_SHOWN = 64
"""Most characters of a caller's own text that a message repeats."""


class EmbeddingError(ValueError):
    """Rows that cannot be served, with the reason.

    Attributes:
        modality: name of the modality, or None where it is not known.
        index: position of the item among its modality's items, or None.
        reason: short code for metrics, e.g. `width`, `rows`, `dims`, `ragged`, `dtype`, `sparse`,
            `type`, `non_finite`, `size`, `encoding`, `field`, `unknown_modality`.
    """

    def __init__(
        self,
        message: str,
        *,
        modality: str | None = None,
        index: int | None = None,
        reason: str = "invalid",
    ) -> None:
        super().__init__(message)
        self.modality = modality
        self.index = index
        self.reason = reason


def _refuse(
    reason: str, modality: str | None, index: int | None, got: str, expected: str, remedy: str
) -> NoReturn:
    """Raise the one kind of error of this module: where, got, expected, remedy."""
    where = "embedding rows" if modality is None else f"modality {modality!r}"
    if index is not None:
        where += f", item {index}"
    raise EmbeddingError(
        f"{where}: got {got}, expected {expected}; {remedy}",
        modality=modality,
        index=index,
        reason=reason,
    )


def _show(value: object) -> str:
    """A caller's value for a message: short, and never an int too long to print."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, int, float, bool)) or value is None:
        text = repr(value[: _SHOWN + 1] if isinstance(value, str) else value)
        return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return f"a {type(value).__name__}"


# -- shapes ------------------------------------------------------------------------------------


def _count_rows(shape: Sequence[int], spec: ModalitySpec, index: int | None) -> int:
    """Rows of an item of this shape, or a refusal."""
    dims = len(shape)
    if dims == 2:
        rows, width = shape
    elif dims == 1:
        rows, width = 1, shape[0]
    else:
        sizes = ", ".join(map(_show, shape[:8]))
        _refuse(
            "dims", spec.name, index, f"{dims} dimensions, shape [{sizes}]",
            f"[{spec.dim}] or [rows, {spec.dim}]",
            "pass a batch as a list with one array per item",
        )  # fmt: skip
    if width != spec.dim:
        _refuse(
            "width", spec.name, index, f"rows of width {_show(width)}", f"width {spec.dim}",
            "use the encoder that this modality's projector was made for",
        )  # fmt: skip
    if not 0 < rows <= spec.max_rows:
        _refuse(
            "rows", spec.name, index, f"{_show(rows)} rows", f"1 to {spec.max_rows} rows",
            "leave empty items out, and split long ones or raise the modality's max_rows",
        )  # fmt: skip
    return rows


def _bad_dtype(modality: str | None, index: int | None, got: object) -> NoReturn:
    _refuse(
        "dtype", modality, index, f"dtype {str(got)[:_SHOWN]}",
        "float64, float32, float16 or bfloat16", "convert with .astype() or .to()",
    )  # fmt: skip


# -- numpy and lists ---------------------------------------------------------------------------


def _native(array: np.ndarray, modality: str | None, index: int | None) -> np.ndarray:
    """A floating numpy array in this host's byte order, or a refusal. Never copies native ones."""
    dtype = array.dtype
    if isinstance(array, np.ma.MaskedArray):
        _refuse(
            "dtype", modality, index, "a masked array", "a dense array", "fill it with .filled(0)"
        )
    if type(array) is not np.ndarray:  # a matrix keeps two dimensions however it is reshaped
        array = array.view(np.ndarray)
    if dtype.kind == "f" and dtype.itemsize in (2, 4, 8):
        return array if dtype.isnative else array.astype(dtype.newbyteorder("="))
    if dtype.name == "bfloat16" and dtype.itemsize == 2:  # ml_dtypes
        return array
    if dtype.kind == "O":
        _refuse(
            "dtype", modality, index, "an array of Python objects", "floating-point numbers",
            "rows of one item must have the same width; pass items of their own as a list",
        )  # fmt: skip
    _bad_dtype(modality, index, dtype)


def _check_numbers(row: Sequence[Any], modality: str | None, index: int | None) -> None:
    """Refuse a row of a nested list that holds anything but Python or numpy real numbers."""
    for kind in set(map(type, row)):
        if kind is float or kind is int or issubclass(kind, np.floating):
            continue
        nested = issubclass(kind, (list, tuple))
        _refuse(
            "dims" if nested else "type", modality, index,
            "lists nested more than two deep" if nested else f"a {kind.__name__} in a list",
            "numbers", "write an item as [x, ...] or [[x, ...], ...]",
        )  # fmt: skip


def _list_to_array(
    value: Sequence[Any], modality: str | None, index: int | None, spec: ModalitySpec | None = None
) -> np.ndarray:
    """Nested lists of numbers as float32; shape and types are checked before anything is copied.

    Whole numbers count as floats here, because JSON writers drop the `.0`.
    """
    flat = not value or not isinstance(value[0], (list, tuple))
    if flat:
        if spec:
            _count_rows((len(value),), spec, index)
        _check_numbers(value, modality, index)
    else:
        width = len(value[0])
        if spec:
            _count_rows((len(value), width), spec, index)
        for at, row in enumerate(value):
            if not isinstance(row, (list, tuple)) or len(row) != width:
                got = f"{len(row)} numbers" if isinstance(row, (list, tuple)) else _show(row)
                _refuse(
                    "ragged", modality, index, f"{got} in row {at}",
                    f"{width} numbers, as in row 0", "make all rows of an item equally wide",
                )  # fmt: skip
            _check_numbers(row, modality, index)
    try:
        with np.errstate(over="ignore"):
            return np.array(value, dtype=np.float64).astype(np.float32)
    except (OverflowError, ValueError, TypeError):
        _refuse(
            "non_finite", modality, index, "a number too large for float32", "finite numbers",
            "check what the encoder returned",
        )  # fmt: skip


def _array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor over a checked numpy array; shares its memory where torch can."""
    import torch

    if array.dtype.name == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.int16)
        return torch.from_numpy(bits if bits.flags.writeable else bits.copy()).view(torch.bfloat16)
    # torch takes neither negative strides nor, without a warning, read-only memory.
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy()
    return torch.from_numpy(array)


# -- torch -------------------------------------------------------------------------------------


def _check_tensor(value: torch.Tensor, modality: str | None, index: int | None) -> torch.Tensor:
    """The tensor, detached and on the CPU, if it is dense and floating; else a refusal."""
    import torch

    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        _refuse(
            "sparse", modality, index, f"a {kind} tensor", "a dense (strided) tensor",
            "send dense rows; sparse ones are never densified here",
        )  # fmt: skip
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        _bad_dtype(modality, index, value.dtype)
    if value.is_meta:
        _refuse(
            "type", modality, index, "a meta tensor, which has no values", "a tensor with values",
            "materialise it first",
        )  # fmt: skip
    if type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        _refuse(
            "type", modality, index, f"a {type(value).__name__}", "a plain tensor",
            "convert it to an ordinary torch.Tensor",
        )  # fmt: skip
    if value.requires_grad:
        value = value.detach()
    return value if value.is_cpu else value.cpu()


# -- items -------------------------------------------------------------------------------------


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
    if not _all_finite(rows):
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
    return _all_finite(out)


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
        if not dtypes <= {torch.float32, torch.bfloat16, torch.float16} or len(dtypes) > 1:
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
            item = _check_tensor(item, name, index)
            counts.append(_count_rows(item.shape, spec, index))
            dims = item.dim()
        else:
            if isinstance(item, np.ndarray):
                counts.append(_count_rows(item.shape, spec, index))
                item = _native(item, name, index)
            elif isinstance(item, (list, tuple)):
                item = _list_to_array(item, name, index, spec)
                counts.append(_count_rows(item.shape, spec, index))
            else:
                _refuse(
                    "type", name, index, _show(item), "a torch tensor, numpy array or nested list",
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
        tensors = [_array_to_tensor(p) if isinstance(p, np.ndarray) else p for p in parts]
        # Imaginary parts of complex tensors are real tensors with a pending minus sign.
        joined = tensors[0].resolve_neg() if len(tensors) == 1 else torch.cat(tensors)
    if joined.dim() == 1:
        joined = joined.view(-1, dim) if joined.is_contiguous() else joined.reshape(-1, dim)
    return joined, counts


def _all_finite(rows: torch.Tensor) -> bool:
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
    _refuse("non_finite", spec.name, index, got, "finite numbers", remedy)


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
        raise _at(error, index) from None


def _at(error: EmbeddingError, index: int) -> EmbeddingError:
    """The error of a list's only item, told of the item at `index` of the caller's list."""
    message = str(error).replace(", item 0:", f", item {index}:", 1)
    return EmbeddingError(message, modality=error.modality, index=index, reason=error.reason)


def as_items(value: Any, modality: str) -> Sequence[Any]:
    """What a caller gave for one modality, as a list of items: a bare array is one item.

    Raises:
        EmbeddingError: a 3-D array, a flat list of numbers, or something that is no list at all.
    """
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], (int, float)):
            _refuse(
                "dims", modality, None, "a flat list of numbers", "a list of items",
                "write one vector as [[x, ...]]",
            )  # fmt: skip
        return value
    if isinstance(value, np.ndarray) or hasattr(value, "layout"):
        if len(value.shape) in (1, 2):
            return (value,)
        _refuse(
            "dims", modality, None, f"an array of {len(value.shape)} dimensions",
            "a list of items, or one item of 1 or 2 dimensions", "pass list(array)",
        )  # fmt: skip
    _refuse(
        "type", modality, None, _show(value), "a list of items, or one torch tensor or numpy array",
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
        _refuse(
            "type", None, None, _show(data), "a dict from modality to items",
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
        f"unknown modality {_show(name)}; expected one of {sorted(specs)}; use one of these names, "
        "or a checkpoint that has it",
        modality=name if isinstance(name, str) and len(name) <= _SHOWN else None,
        reason="unknown_modality",
    )


# -- the wire ----------------------------------------------------------------------------------


def encode_rows(rows: Any, dtype: Any = None, *, modality: str | None = None) -> dict[str, Any]:
    """Rows as a JSON-safe dict: base64 of their little-endian bytes, with dtype and shape.

    Args:
        rows: a `[d]` vector or `[n, d]` matrix: numpy, torch, or nested lists.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` (or torch's or numpy's own dtype objects).
            Left out: the rows' own dtype; float32 for float64 and for lists.
        modality: name for error messages.

    Returns:
        `{"data": str, "dtype": str, "shape": [n, d]}`.

    Raises:
        EmbeddingError: the rows are not dense, floating and finite, also after the conversion.
    """
    torch = sys.modules.get("torch")
    bits: np.ndarray | None = None
    if torch is not None and isinstance(rows, torch.Tensor):
        tensor = _check_tensor(rows, modality, None).resolve_neg()
        if tensor.dtype is torch.bfloat16:
            bits = tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
        else:
            array = tensor.numpy()
    elif isinstance(rows, np.ndarray):
        array = _native(rows, modality, None)
        if array.dtype.name == "bfloat16":
            bits = np.ascontiguousarray(array).view(np.uint16)
    elif isinstance(rows, (list, tuple)):
        array = _list_to_array(rows, modality, None)
    else:
        _refuse(
            "type", modality, None, _show(rows), "a torch tensor, numpy array or nested list",
            "pass a [width] or [rows, width] array of floats",
        )  # fmt: skip
    if bits is not None:  # bf16 is the upper half of fp32
        array = (bits.astype(np.uint32) << 16).view(np.float32)

    shape = (1, *array.shape) if array.ndim == 1 else array.shape
    if len(shape) != 2 or 0 in shape:
        _refuse(
            "dims", modality, None, f"shape {list(array.shape)[:8]}", "[width] or [rows, width]",
            "encode one item at a time",
        )  # fmt: skip
    own = "bfloat16" if bits is not None else array.dtype.name
    name = _wire_name(dtype) if dtype is not None else {"float64": "float32"}.get(own, own)
    if name not in WIRE_DTYPES:
        _refuse(
            "dtype", modality, None, f"dtype {_show(name)}", f"one of {list(WIRE_DTYPES)}",
            "choose one of these",
        )  # fmt: skip
    with np.errstate(over="ignore"):
        sent = array.astype(np.dtype("f2" if name == "float16" else "f4"), copy=False)
    if name == "bfloat16":
        if bits is None:
            bits = _round_to_bfloat16(sent)
        finite, body = bool(((bits & 0x7F80) != 0x7F80).all()), bits.astype("<u2", copy=False)
    else:
        finite, body = bool(np.isfinite(sent).all()), sent.astype(sent.dtype.newbyteorder("<"))
    if not finite:
        _refuse(
            "non_finite", modality, None, f"NaN, Inf or a value beyond the range of {name}",
            "finite numbers", "check what the encoder returned, or choose a wider dtype",
        )  # fmt: skip
    return {
        "data": _encode_base64(body.tobytes()),
        "dtype": name,
        "shape": [int(size) for size in shape],
    }


def _encode_base64(raw: bytes) -> str:
    if pybase64 is not None:
        return pybase64.b64encode_as_string(raw)
    return binascii.b2a_base64(raw, newline=False).decode("ascii")


def _wire_name(dtype: Any) -> str:
    """`"bfloat16"` for "bfloat16", torch.bfloat16 and ml_dtypes' alike."""
    if isinstance(dtype, str):
        return dtype
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    try:
        return np.dtype(dtype).name
    except TypeError:
        return text


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """fp32 to the bits of bf16, to nearest, ties to even, as torch rounds. NaN stays non-finite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    special = (bits & 0x7F800000) == 0x7F800000
    return np.where(special, 0x7F80, rounded).astype(np.uint16)


def _decode_base64(text: str) -> bytearray:
    """Strict base64 to writable memory of our own.

    pybase64, which vLLM depends on, is 50 times as fast as the standard library (0.19 against
    9.7 ms for 1024 x 768 fp32 on one core), but a client need not have it.
    """
    if pybase64 is not None:
        return pybase64.b64decode_as_bytearray(text, validate=True)
    return bytearray(binascii.a2b_base64(text, strict_mode=True))


def decode_rows(
    payload: Any, spec: ModalitySpec, *, max_bytes: int = DEFAULT_MAX_BYTES, index: int = 0
) -> torch.Tensor:
    """Read what `encode_rows` wrote, trusting none of it.

    The header is checked first: fields, dtype, shape, width, rows and bytes; then the length of
    the text; only then is anything decoded. Nothing larger than the declared, accepted size is
    ever allocated.

    Args:
        payload: `{"data": str, "dtype": str, "shape": [n, d] or [d]}`, and no other field.
        spec: the modality.
        max_bytes: most bytes that the rows may have.
        index: position among the modality's items, for messages.

    Returns:
        Contiguous rows `[n, d]` of the payload's dtype in host memory of their own.

    Raises:
        EmbeddingError: and nothing else, whatever the payload is.
    """
    import torch

    name = spec.name
    if not isinstance(payload, Mapping):
        _refuse(
            "type", name, index, _show(payload), f"an object with {list(_FIELDS)}",
            "build it with mmqwen.client.embeds_part",
        )  # fmt: skip
    if len(payload) != len(_FIELDS) or any(field not in payload for field in _FIELDS):
        extra = [_show(field) for field in list(payload)[:8] if field not in _FIELDS]
        missing = [field for field in _FIELDS if field not in payload]
        _refuse(
            "field", name, index, f"missing fields {missing} and unknown fields {extra}",
            f"exactly {list(_FIELDS)}", "build it with mmqwen.client.embeds_part",
        )  # fmt: skip
    data, dtype, shape = (payload[field] for field in _FIELDS)

    if not isinstance(dtype, str) or dtype not in WIRE_DTYPES:
        _refuse(
            "dtype", name, index, f"dtype {_show(dtype)}", f"one of {list(WIRE_DTYPES)}",
            "encode with one of these",
        )  # fmt: skip
    if not isinstance(shape, (list, tuple)):
        _refuse(
            "dims", name, index, f"shape {_show(shape)}", f"[rows, {spec.dim}]",
            "send the shape as a list",
        )  # fmt: skip
    if len(shape) in (1, 2) and any(type(size) is not int for size in shape):
        _refuse(
            "dims", name, index, f"shape [{', '.join(map(_show, shape))}]",
            f"integers [rows, {spec.dim}]", "send the shape as integers",
        )  # fmt: skip
    rows = _count_rows(shape, spec, index)
    nbytes = rows * spec.dim * WIRE_DTYPES[dtype]
    if nbytes > max_bytes:
        _refuse(
            "size", name, index, f"{nbytes} bytes", f"at most {max_bytes}",
            "send fewer rows, or float16 or bfloat16",
        )  # fmt: skip
    if not isinstance(data, str):
        _refuse(
            "encoding", name, index, f"data: {_show(data)}", "a base64 string",
            "encode with mmqwen.client.embeds_part",
        )  # fmt: skip
    length = 4 * ((nbytes + 2) // 3)
    if len(data) != length:
        _refuse(
            "encoding", name, index, f"{len(data)} characters of data",
            f"{length} for {nbytes} bytes of {dtype} {[rows, spec.dim]}",
            "send little-endian bytes as padded base64 without line breaks",
        )  # fmt: skip
    try:
        raw = _decode_base64(data)
    except ValueError:  # binascii.Error is one; so is the error for text beyond ASCII
        raw = bytearray()
    if len(raw) != nbytes:
        _refuse(
            "encoding", name, index, "data that is not base64", "the alphabet A-Z a-z 0-9 + / =",
            "use standard padded base64, not the URL-safe kind",
        )  # fmt: skip

    if sys.byteorder == "big":  # pragma: no cover
        raw = bytearray(np.frombuffer(raw, f"<u{WIRE_DTYPES[dtype]}").byteswap().tobytes())
    decoded = torch.frombuffer(raw, dtype=getattr(torch, dtype)).view(rows, spec.dim)
    if not _all_finite(decoded):
        try:
            refuse_non_finite(decoded, [rows], spec, decoded.dtype)
        except EmbeddingError as error:
            raise _at(error, index) from None
    return decoded
