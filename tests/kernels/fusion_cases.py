"""Inputs for the fusion op, its naive meaning in float64, and how errors are graded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rounding import UNIT, Interval, assert_within, projected_bounds, random_walk

from mmqwen_kernels import ACTIVATIONS, NORM_EPS, NORMS, HostRows, Norm, Projector, fuse_embeddings
from mmqwen_kernels.plan import RowSource
from mmqwen_kernels.reference import fuse_embeddings_torch


@dataclass
class Case:
    """One step: T tokens, rows of several modalities in items, in the order of `slots`."""

    input_ids: torch.Tensor
    table: torch.Tensor
    items: list[RowSource]
    slots: list[int]
    projectors: list[Projector]
    vocab_start: int = 0

    @property
    def columns(self) -> int:
        return self.table.shape[1]

    def run(self, backend: str, **more: object) -> torch.Tensor:
        return fuse_embeddings(
            self.input_ids,
            self.table,
            self.items,
            self.projectors,
            slots=self.slots,
            vocab_start=self.vocab_start,
            backend=backend,
            **more,  # type: ignore[arg-type]
        )

    def by_modality(self) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
        """Rows and slots of each modality, or None."""
        found: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        for m in range(len(self.projectors)):
            mine = [x for index, x in self.items if index == m]  # type: ignore[misc]
            at, here = 0, []
            for index, x in self.items:  # type: ignore[misc]
                if index == m:
                    here += self.slots[at : at + x.shape[0]]
                at += x.shape[0]
            slots = torch.tensor(here, device=self.table.device)
            found.append((torch.cat(mine), slots) if mine else None)
        return found

    def exact(self) -> torch.Tensor:
        """The float64 twin."""
        groups = self.by_modality()
        return fuse_embeddings_torch(
            self.input_ids,
            self.table.double(),
            [group and group[0].double() for group in groups],
            [group and group[1] for group in groups],
            [p.map(torch.Tensor.double) for p in self.projectors],
            vocab_start=self.vocab_start,
        )

    def bounds(self) -> Interval:
        """What the op may give: text rows bit for bit, projected rows in any order of summation."""
        low = self.exact()
        high = low.clone()
        for group, projector in zip(self.by_modality(), self.projectors, strict=True):
            if group is not None:
                rows, slots = group
                low[slots], high[slots] = projected_bounds(rows, projector)
        return low, high

    def check(self, got: torch.Tensor) -> None:
        """`got` is this step's result, on whatever machine and in whatever tiles."""
        assert_within(got, self.bounds())


def rows_that_stay(items: Sequence[RowSource], stays: Sequence[bool]) -> HostRows:
    """The rows of items by address: in turns, as `stays` says, in a table of the device, on the
    host."""
    rows = [(m, row) for m, item in items for row in item]
    resident = [stays[at % len(stays)] for at in range(len(rows))]
    tables: dict[int, torch.Tensor] = {}
    for m in {m for m, _ in rows}:
        mine = [row for (of, row), here in zip(rows, resident, strict=True) if of == m and here]
        if mine:
            tables[m] = torch.stack([torch.zeros_like(mine[0]), *reversed(mine)])
    left = {m: len(table) for m, table in tables.items()}
    on_host = [row[None].cpu().clone() for _, row in rows]
    address = []
    for (m, _), here, copy in zip(rows, resident, on_host, strict=True):
        if here:
            left[m] -= 1
            address.append(tables[m][left[m]].data_ptr())
        else:
            address.append(copy.data_ptr())
    modality = np.array([m for m, _ in rows], np.int64)
    held = (*tables.values(), *on_host)
    return HostRows(modality, np.array(address, np.int64), np.array(resident, np.bool_), held)


@dataclass
class Beside:
    """A step in which some text slots of a case went to rows that were projected before.

    Attributes:
        sources, slots: for `plan_rows`; rows of either kind in turns.
        rows: `[P, D]`, those that were projected before.
        at: their slots.
    """

    sources: HostRows
    slots: list[int]
    rows: torch.Tensor
    at: list[int]

    def check(self, case: Case, got: torch.Tensor, rank: int = 0, ranks: int = 1) -> None:
        """`got` holds these rows there, zeros for other ranks', and else what the case is due."""
        mine = torch.arange(len(self.at), device=got.device) % ranks == rank
        assert torch.equal(got[self.at], self.rows * mine[:, None])
        got = got.clone()
        got[self.at] = case.run("torch")[self.at]
        case.check(got)


def beside_projected(
    case: Case, count: int, stays: Sequence[bool] = (False,), rank: int = 0, ranks: int = 1
) -> Beside:
    """Give `count` of a case's text slots to rows of two tables that are split over `ranks`."""
    g = torch.Generator().manual_seed(count)
    here, dtype = case.table.device, case.table.dtype
    text = sorted(set(range(len(case.input_ids))) - set(case.slots))
    at = [text[place] for place in torch.randperm(len(text), generator=g)[:count].tolist()]
    tables = tuple(torch.randn(n, case.columns, generator=g).to(here, dtype) for n in (7, 5))
    places = [divmod(n, 7) for n in torch.randint(0, 12, (count,), generator=g).tolist()]
    done = [tables[which][row] for which, row in places]
    others = rows_that_stay(case.items, stays)
    addresses = [row.data_ptr() if n % ranks == rank else 0 for n, row in enumerate(done)]
    turns = torch.randperm(len(others.address) + count, generator=g).numpy()
    assert others.resident is not None

    def mixed(of_rows: np.ndarray, of_done: np.ndarray | Sequence[int]) -> np.ndarray:
        return np.concatenate([of_rows, np.array(of_done, of_rows.dtype)])[turns]

    sources = HostRows(
        mixed(others.modality, [0] * count),
        mixed(others.address, addresses),
        mixed(others.resident, [False] * count),
        others.held,
        mixed(np.zeros(len(others.address), np.bool_), [True] * count),
        tables,
    )
    slots = mixed(np.array(case.slots, np.int64), at).tolist()
    rows = torch.stack(done) if done else case.table[:0]
    return Beside(sources, slots, rows, at)


def in_whole_numbers(case: Case) -> Case:
    """The same case, in place, with small whole numbers for values, of a dtype of 24 bits or more.

    Every product and every sum of them is exact, so the same bits are due whatever the order.
    """
    case.items = [(m, x.round()) for m, x in case.items]  # type: ignore[misc]
    case.projectors = [p.map(torch.sign) for p in case.projectors]
    return case


def shard(case: Case, rank: int, ranks: int) -> Case:
    """This rank's share of the vocabulary and of the hidden units."""
    rows = -(-case.table.shape[0] // ranks)
    projectors = []
    for p in case.projectors:
        b2 = p.b2 if rank == 0 else None
        if p.w1 is None:  # of one layer: the first rank's alone
            projectors.append(p._replace(w2=p.w2 if rank == 0 else p.w2 * 0, b2=b2))
            continue
        units = -(-p.w1.shape[0] // ranks)
        mine = slice(rank * units, (rank + 1) * units)
        b1 = None if p.b1 is None else p.b1[mine]
        projectors.append(p._replace(w1=p.w1[mine], b1=b1, w2=p.w2[:, mine], b2=b2))
    return Case(
        case.input_ids,
        case.table[rank * rows : (rank + 1) * rows],
        case.items,
        case.slots,
        projectors,
        vocab_start=rank * rows,
    )


def make_projector(
    width: int,
    hidden: int,
    columns: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    bias: bool = True,
    activation: str = "relu",
    norm: str = "none",
    layers: int = 2,
    seed: int = 0,
) -> Projector:
    """Weights for unit rows; `bias` False: no bias in either layer."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

    w1 = normal(hidden, width, scale=width**-0.5)
    b1 = normal(hidden)
    depth = width if layers == 1 else hidden
    w2, b2 = normal(columns, depth, scale=depth**-0.5), normal(columns)
    scaled = None
    if norm != "none":
        shift = normal(width) if norm == "layer" else None
        scaled = Norm(norm, 1 + normal(width, scale=0.25), shift, NORM_EPS[norm])
    if layers == 1:
        return Projector(None, None, w2, b2 if bias else None, activation, scaled)
    return Projector(w1, b1 if bias else None, w2, b2 if bias else None, activation, scaled)


EVERY_SPEC: list[dict[str, Any]] = [
    {"activation": activation, "norm": norm, "bias": bias, "layers": layers}
    for layers in (2, 1)
    for activation in (ACTIVATIONS if layers == 2 else ["none"])
    for norm in NORMS
    for bias in (True, False)
]
"""Every kind of projector that there is: 36."""


def spec_name(spec: Mapping[str, Any]) -> str:
    """A short name of one of `EVERY_SPEC`."""
    bias = "" if spec["bias"] else "-no_bias"
    return f"{spec['activation']}-{spec['norm']}-{spec['layers']}{bias}"


def make_case(
    widths: Sequence[int],
    counts: Sequence[int],
    dtype: torch.dtype,
    *,
    hidden: int | Sequence[int] = 96,
    columns: int = 80,
    text: int = 5,
    vocab: int = 50,
    device: str = "cpu",
    item_rows: int = 3,
    strided: bool = False,
    bias: bool = True,
    ids_dtype: torch.dtype = torch.int64,
    specs: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Case:
    """Items of up to `item_rows` rows, modalities interleaved, at slots drawn at random.

    `specs` are what `make_projector` takes beyond sizes, one a modality.
    """
    g = torch.Generator().manual_seed(seed)
    hiddens = [hidden] * len(widths) if isinstance(hidden, int) else list(hidden)
    left = list(counts)
    items: list[RowSource] = []
    while any(left):
        for m, width in enumerate(widths):
            n = min(left[m], item_rows)
            if n == 0:
                continue
            left[m] -= n
            rows = torch.randn(n, width, generator=g).to(device, dtype)
            if strided:  # a slice of columns and every second row of something larger
                wide = torch.full((2 * n, 2 * width + 8), float("nan"), dtype=dtype, device=device)
                wide[::2, 8 : 8 + width] = rows
                rows = wide[::2, 8 : 8 + width]
            items.append((m, rows))
    total = sum(counts)
    tokens = total + text
    return Case(
        torch.randint(0, vocab, (tokens,), generator=g).to(device, ids_dtype),
        torch.randn(vocab, columns, generator=g).to(device, dtype),
        items,
        torch.randperm(tokens, generator=g)[:total].tolist(),
        [
            make_projector(
                width, h, columns, dtype, device, **{"bias": bias, "seed": seed + m, **spec}
            )
            for m, (width, h, spec) in enumerate(
                zip(widths, hiddens, specs or [{}] * len(widths), strict=True)
            )
        ],
    )


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    scale = exact.norm().item()
    return (got.double() - exact).norm().item() / scale if scale else got.double().norm().item()


def check_against_torch(case: Case, got: torch.Tensor) -> None:
    """Error against float64 at most 1.1 times torch's own, text rows bit for bit.

    For sums too long for `Case.check`. Two slacks: a quarter of the dtype's rounding error, for
    cases of a few rows, where both errors are a handful of roundings and their ratio is chance; and
    what float32 sums in another order may err by.
    """
    exact = case.exact()
    theirs = case.run("torch")
    text = torch.ones(len(case.input_ids), dtype=torch.bool, device=got.device)
    text[case.slots] = False
    assert torch.equal(got[text], theirs[text]), "text rows differ"
    assert not got.isnan().any(), "something was not written"
    ours, peer = relative_error(got, exact), relative_error(theirs, exact)
    order = max(map(random_walk, case.projectors), default=0.0)
    assert ours <= 1.1 * peer + UNIT[case.table.dtype] / 4 + order, (
        f"relative error {ours:.3e}, torch's own {peer:.3e}"
    )
