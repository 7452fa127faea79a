"""The projectors of a launch as the kernels see them: a device table of addresses and sizes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmqwen_kernels import triton_kernels as kernels
from mmqwen_kernels.launcher import capturing, current_stream
from mmqwen_kernels.reference import Projector, check_shapes
from mmqwen_kernels.row_tables import ALIGN_BYTES, ENTRY_FIELDS, num_entries

MAX_MODALITIES = 64
TABLES_KEPT = 64


class WeightTable:
    """The table of one set of projectors.

    Attributes:
        table: int64 `[2 A, 8]` on the device, weights and traits, see `triton_kernels.py`.
        address: of the table.
        up_alone: of the first projector, what K1 takes as arguments where it is the only one.
        down_alone: what K2 takes.
        widths: d of each projector.
        hidden: H of each; d of one layer.
        activation: place of that of all, or MIXED.
        norms: whether one has a norm.
        direct: whether one has a single layer.
        columns: D of all.
        align_bytes: 1 to 16; every address, stride and width is a multiple of it.
        recipes: what steps with these projectors launch, by their shape.
        captured: a CUDA graph may read the table, so it is kept for good.
    """

    def __init__(
        self,
        projectors: Sequence[Projector],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if device.type == "cuda" and capturing(device):
            raise RuntimeError(
                "these projectors are new to the kernels: run the op once before capturing it"
            )
        itemsize = dtype.itemsize
        room = num_entries(len(projectors))
        table = np.zeros((2 * room, ENTRY_FIELDS), dtype=np.int64)
        align = ALIGN_BYTES
        for m, projector in enumerate(projectors):
            _check_projector(m, projector, dtype, device)
        # In place of the biases and norms that some projector lacks and the kernels read.
        needed = any(p.norm is not None or p.b1 is None for p in projectors)
        longest = max(max(p.w2.shape[1], p.width) for p in projectors) if needed else 0
        self._fill = torch.empty(2, longest, dtype=dtype, device=device)
        zeros, ones = self._fill[0].zero_(), self._fill[1].fill_(1)
        activations = set()
        for m, projector in enumerate(projectors):
            w1, b1, w2, b2, activation, norm = projector
            if w2.shape[0] != projectors[0].w2.shape[0]:
                raise ValueError(
                    f"projector {m} gives {w2.shape[0]} columns, expected those of the first, "
                    f"{projectors[0].w2.shape[0]}"
                )
            table[m] = (
                0 if w1 is None else w1.data_ptr(),
                (zeros if b1 is None else b1).data_ptr(),
                w2.data_ptr(),
                0 if b2 is None else b2.data_ptr(),
                projector.width,
                w2.shape[1],
                0 if w1 is None else w1.stride(0),
                w2.stride(0),
            )
            place = kernels.ACTIVATION_PLACES[activation]
            if w1 is not None:
                activations.add(place)
            gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
            table[room + m, :6] = (
                place,
                kernels.NORM_PLACES["none" if norm is None else norm.kind],
                w1 is None,
                (ones if gamma is None else gamma).data_ptr(),
                (zeros if beta is None else beta).data_ptr(),
                np.float32(0.0 if norm is None else norm.eps).view(np.int32),
            )
            for column in (0, 2):
                align = math.gcd(align, int(table[m, column]))
            for column in (4, 5, 6, 7):
                align = math.gcd(align, int(table[m, column]) * itemsize)
        # Only here does the host wait, once per set of projectors: other streams may be next.
        self.table = torch.from_numpy(table).to(device)
        self.align_bytes = align
        self.widths = tuple(p.width for p in projectors)
        self.hidden = tuple(p.w2.shape[1] for p in projectors)
        self.activation = kernels.MIXED
        if len(activations) < 2:
            self.activation = min(activations, default=kernels.ACTIVATION_PLACES["relu"])
        self.norms = any(p.norm is not None for p in projectors)
        self.direct = any(p.w1 is None for p in projectors)
        self.columns = projectors[0].w2.shape[0]
        w1, b1, w2, b2, width, units, w1_stride, w2_stride = table[0].tolist()
        self.up_alone = (w1, b1, width, units, w1_stride)
        self.down_alone = (w2, b2, units, w2_stride)
        self.address = self.table.data_ptr()
        self.recipes: dict[tuple[Any, ...], Any] = {}
        self.captured = False
        self._streams = {current_stream(device)}

    def read_on(self, stream: int) -> None:
        """Note that launches on this stream, the current one, read the table.

        Its memory is then not used again before they have run, should it be freed meanwhile.
        """
        if stream not in self._streams and not self.captured:
            self._streams.add(stream)
            current = torch.cuda.current_stream(self.table.device)
            self.table.record_stream(current)
            if self._fill.numel():
                self._fill.record_stream(current)


def _check_projector(
    m: int, projector: Projector, dtype: torch.dtype, device: torch.device
) -> None:
    w1, b1, w2, b2, _, norm = projector
    given = {"w1": (w1, 2), "b1": (b1, 1), "w2": (w2, 2), "b2": (b2, 1)}
    if norm is not None:
        given |= {"its norm's weight": (norm.weight, 1), "its norm's bias": (norm.bias, 1)}
    for name, (tensor, ndim) in given.items():
        if tensor is None and name not in ("w2", "its norm's weight"):
            continue
        if tensor is None or (tensor.ndim, tensor.dtype, tensor.device) != (ndim, dtype, device):
            found = None if tensor is None else f"{tensor.ndim}-D {tensor.dtype} on {tensor.device}"
            raise ValueError(
                f"projector {m}: {name} is {found}, expected {ndim}-D {dtype} on {device}"
            )
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            raise ValueError(f"projector {m}: {name} is transposed; call .contiguous() on it once")
        if ndim == 2 and tensor.stride(0) * 256 >= 1 << 31:
            raise ValueError(f"projector {m}: rows of {name} lie {tensor.stride(0)} apart, too far")
    if not all(tensor.numel() for tensor in (w1, w2) if tensor is not None):
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (w1, w2)]
        raise ValueError(f"projector {m}: w1 {shapes[0]} and w2 {shapes[1]} are empty")
    check_shapes(m, projector)


class WeightTables:
    """Tables by projectors; the least recently used go, but for those that a graph reads.

    128 bytes a projector on the device, and two vectors as long as the widest where some have norms
    or lack biases. The weights themselves are not kept alive.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: OrderedDict[tuple[Any, ...], WeightTable] = OrderedDict()

    def of(self, projectors: Sequence[Projector], dtype: torch.dtype) -> WeightTable:
        """The table of these projectors, which have `dtype` and lie on the device.

        Raises:
            ValueError: too many projectors, or some that do not fit together.
            RuntimeError: they are new, and the current stream is being captured.
        """
        # The key holds all that is looked at where a table is made, so that no set of weights can
        # pass for another, whoever owned the addresses before.
        key = (dtype, *[_identity(projector) for projector in projectors])
        found = self._tables.get(key)
        if found is not None:
            self._tables.move_to_end(key)
        else:
            if len(projectors) > MAX_MODALITIES:
                raise ValueError(f"{len(projectors)} modalities, expected {MAX_MODALITIES} at most")
            found = WeightTable(projectors, dtype, self._device)
            free = [old for old, table in self._tables.items() if not table.captured]
            for old in free[: max(0, len(free) + 1 - TABLES_KEPT)]:
                del self._tables[old]
            self._tables[key] = found
        if not found.captured and capturing(self._device):
            found.captured = True
        return found


def _identity(projector: Projector) -> tuple[Any, ...]:
    """All of a projector that `WeightTable` reads or checks; an address tells the device, too."""
    found: list[Any] = [projector.activation]
    weights: tuple[torch.Tensor | None, ...] = projector[:4]
    norm = projector.norm
    if norm is not None:
        found += norm.kind, norm.eps
        weights += norm.weight, norm.bias
    for w in weights:
        if w is None:
            found.append(None)
        else:
            found += w.data_ptr(), w.shape, w.stride(), w.dtype
    return tuple(found)
