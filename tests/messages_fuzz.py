"""Random prompts with items of every kind that users make, for the fuzz of the native helper."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mmqwen.modalities import ModalitySpec

SPECS = {
    "a": ModalitySpec("a", 8, token_id=1000, max_rows=6),
    "b": ModalitySpec("b", 1, token_id=1002, max_rows=4),
    "c": ModalitySpec("c", 5, token_id=1001, max_rows=300),
}
TURN_ID = 7
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VALUES = (
    float("nan"), float("inf"), float("-inf"), 3.4e38, -3.4e38, 3.3961776e38, 65519.0, 65520.0,
    1e5, 1e-40, 1e-8, 0.0, -0.0, 1.00390625, 1.01171875,
)  # fmt: skip
"""Beyond the range of fp16 or bf16, or just within it; subnormal; halfway between two bf16."""


class Subclass(torch.Tensor):
    pass


def _dense(rng: random.Random, rows: int, width: int, strange: bool) -> torch.Tensor:
    seed = torch.Generator().manual_seed(rng.getrandbits(30))
    made = torch.randn(rows, width, generator=seed)
    if strange and rng.random() < 0.2:
        made[rng.randrange(rows), rng.randrange(width)] = rng.choice(VALUES)
    return made


def _negative(rows: torch.Tensor) -> torch.Tensor:
    """The rows, as the imaginary part of a conjugate: a pending minus sign."""
    return torch.complex(torch.zeros_like(rows), -rows).conj().imag


def _misaligned(rows: torch.Tensor) -> np.ndarray:
    raw = bytearray(rows.numel() * 4 + 2)
    view = np.frombuffer(raw, dtype=np.float32, count=rows.numel(), offset=2)
    view[:] = rows.numpy().ravel()
    return view.reshape(rows.shape)


def _spread(rows: torch.Tensor) -> torch.Tensor:
    """The rows in every other column and row of a larger tensor."""
    large = torch.zeros(2 * len(rows), 2 * rows.shape[1])
    large[::2, ::2] = rows
    return large[::2, ::2]


def _rows_apart(rows: torch.Tensor) -> torch.Tensor:
    large = torch.zeros(2 * len(rows), rows.shape[1] + 3)
    large[::2, 2:-1] = rows
    return large[::2, 2:-1]


def _as_strided_negative(rows: torch.Tensor) -> torch.Tensor:
    return _negative(rows).as_strided(rows.shape, (rows.shape[1], 1))


def _read_only(rows: torch.Tensor) -> np.ndarray:
    array = rows.numpy().copy()
    array.flags.writeable = False
    return array


def _with_ml_dtypes(rows: torch.Tensor) -> Any:
    try:
        import ml_dtypes
    except ImportError:
        return rows
    return rows.numpy().astype(ml_dtypes.bfloat16)


PLAIN: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda rows: rows,
    lambda rows: rows.to(torch.bfloat16),
    lambda rows: rows.half(),
    lambda rows: rows[0],
    _rows_apart,
    lambda rows: rows.numpy(),
    lambda rows: rows.numpy()[0],
)
"""What most users hand over, and the helper takes where the dtypes allow."""

USUAL = {
    torch.bfloat16: [PLAIN[0], PLAIN[3], _rows_apart, PLAIN[5], PLAIN[6]],
    torch.float16: [PLAIN[2]],
    torch.float32: [PLAIN[0], PLAIN[3], _rows_apart, PLAIN[5], PLAIN[6]],
}

ODD: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda rows: rows.double(),
    lambda rows: rows.long(),
    lambda rows: rows > 0,
    lambda rows: rows.to(torch.complex64),
    lambda rows: rows.to(torch.complex64).conj(),
    lambda rows: rows.t().contiguous().t(),
    _spread,
    lambda rows: rows[:1].expand(len(rows), -1),
    lambda rows: rows[:, :1].expand(-1, rows.shape[1]),
    lambda rows: rows.as_strided(rows.shape, (1, 1)),
    _negative,
    lambda rows: torch._neg_view(-rows),
    _as_strided_negative,
    lambda rows: torch._neg_view(-rows)[0],
    lambda rows: rows.requires_grad_(),
    torch.nn.Parameter,
    lambda rows: rows.as_subclass(Subclass),
    lambda rows: rows.to_sparse(),
    lambda rows: rows.to_mkldnn(),
    lambda rows: torch.nested.nested_tensor([rows]),
    lambda rows: rows.to("meta"),
    lambda rows: torch._efficientzerotensor(rows.shape),
    lambda rows: rows[:0],
    lambda rows: rows[:, :-1],
    lambda rows: rows.sum(),
    lambda rows: rows[None],
    lambda rows: rows.repeat(2, 1),
    lambda rows: rows.repeat(7, 1),
    lambda rows: rows.numpy().astype(np.float16),
    lambda rows: rows.numpy().astype(np.float64),
    lambda rows: rows.numpy().astype(">f4"),
    lambda rows: rows.numpy().astype(np.int32),
    lambda rows: rows.numpy().astype(object),
    lambda rows: rows.numpy().astype("S8"),
    lambda rows: rows.numpy()[::-1],
    lambda rows: rows.numpy()[:, ::-1],
    lambda rows: np.asfortranarray(rows.numpy()),
    lambda rows: np.broadcast_to(rows.numpy()[0], rows.shape),
    lambda rows: rows.numpy().view(np.matrix),
    lambda rows: np.ma.masked_array(rows.numpy(), mask=False),
    _misaligned,
    _read_only,
    _with_ml_dtypes,
    lambda rows: rows.numpy()[:0],
    lambda rows: rows.numpy()[0, 0],
    lambda rows: rows.tolist(),
    lambda rows: rows.tolist()[0],
    lambda rows: [[10**400] * rows.shape[1]],
    lambda rows: [[True] * rows.shape[1]],
    lambda rows: [["1.0"] * rows.shape[1]],
    lambda rows: None,
    lambda rows: "rows",
    lambda rows: b"\0" * 32,
    lambda rows: memoryview(rows.numpy()),
    lambda rows: {"data": rows},
)  # fmt: skip
"""What is served by Python alone, or refused."""


def _items(rng: random.Random, spec: ModalitySpec, odd: float, dtype: torch.dtype) -> Any:
    usual = [make for make in PLAIN if rng.random() < 0.5] if rng.random() < 0.2 else []
    usual = usual or USUAL[dtype]
    strange = rng.random() < 0.1
    items = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 9))):
        rows = _dense(rng, rng.randint(1, 3), spec.dim, strange)
        make = rng.choice(ODD) if rng.random() < odd else rng.choice(usual)
        items.append(make(rows))
    kind = rng.random()
    if kind < 0.04:
        return items[0]
    if kind < 0.05:
        return []
    return tuple(items) if kind < 0.15 else items


def make_case(seed: int) -> tuple[torch.dtype, list[Any], dict[str, Any]]:
    """The dtype to serve, token ids with or without markers, and items by modality."""
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    odd = rng.choice((0.0, 0.0, 0.0, 0.1, 0.5))
    names = rng.sample(list(SPECS), rng.choice((1, 1, 2, 3)))
    data = {name: _items(rng, SPECS[name], odd, dtype) for name in names}
    if rng.random() < 0.01:
        data["unknown"] = [torch.zeros(1, 8)]
    tokens: list[Any] = [rng.randrange(1, 900) for _ in range(rng.choice((0, 1, 20, 300)))]
    for at in range(rng.choice((0, 0, 1, 3))):
        tokens.insert(rng.randint(0, len(tokens)), TURN_ID if at % 2 == 0 else 5)
    marked = [name for name in names if rng.random() < 0.5]
    for name in marked:
        value = data[name]
        count = len(value) if isinstance(value, (list, tuple)) else 1
        count += rng.choice((0,) * 18 + (1, -1))
        for _ in range(max(0, count)):
            tokens.insert(rng.randint(0, len(tokens)), SPECS[name].token_id)
    if rng.random() < 0.02:
        strange = (-1, 2**70, True, np.int64(1000), 1000.0, np.int32(3), 10**6)
        tokens.insert(rng.randint(0, len(tokens)), rng.choice(strange))
    return dtype, tokens, data
