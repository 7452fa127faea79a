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
from mmqwen_kernels.row_tables import ALIGN_BYTES

MAX_MODALITIES = 64
TABLES_KEPT = 64


class WeightTable:
    """The table of one set of projectors.

    Attributes:
        table: int64 `[M, 8]` on the device, see `triton_kernels.py`.
        rows: the same on the host.
        address: of the table.
        widths: d of each projector.
        hidden: H of each.
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
        itemsize = dtype.itemsize
        table = np.zeros((len(projectors), kernels.WEIGHT_FIELDS), dtype=np.int64)
        align = ALIGN_BYTES
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
            if capturing(device):
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
        self.recipes: dict[tuple[Any, ...], Any] = {}
        self.captured = False
        self._streams = {current_stream(device)}

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
        if tensor is None:
            raise ValueError(f"projector {m}: {name} is None, expected zeros where there is none")
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
    check_shapes(m, projector)


class WeightTables:
    """Tables by projectors; the least recently used go, but for those that a graph reads.

    64 bytes a projector on the device. The weights themselves are not kept alive.
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
    w1, b1, w2, b2 = projector
    found = (
        w1.data_ptr(), w1.shape, w1.stride(), w1.dtype,
        b1.data_ptr(), b1.shape, b1.stride(), b1.dtype,
        w2.data_ptr(), w2.shape, w2.stride(), w2.dtype,
    )  # fmt: skip
    if b2 is None:
        return found
    return (*found, b2.data_ptr(), b2.shape, b2.stride(), b2.dtype)
