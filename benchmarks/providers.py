"""One step of the fusion from the engine's own start, by every means that it is compared with.

The start is what a vLLM plugin has: token ids on the device, a mask of rows' slots and the rows
themselves, 64 a pack, on the host. The end is the runner's buffer: a provider returns `[T, D]`, and
the copy into the buffer is charged to each alike (`run`). Steps of one workload differ in their
counts, so that what is cached by shape misses as often as in life.

    vllm          as vLLM does it: a pinned cat and a copy a modality, two linears and a relu,
                  split by item, cat, masked assignment
    compiled      the same under torch.compile (CUDA only)
    torch         torch at its best: a pinned cat a modality, one copy each, `_addmm_activation`,
                  addmm, `index_copy_`
    graph         the same under a CUDA graph of padded shapes (CUDA only)
    grouped       `torch._grouped_mm` twice, over all modalities (CUDA, bf16 only)
    plan_torch    our plan and the torch backend
    ours          our plan and the Triton kernels, as the engine calls them
    kernels       ours with the plan made beforehand: device time of the two launches
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from mmqwen.pack_slices import find_rows
from mmqwen.packs import directory, pack_rows
from mmqwen_kernels import LaunchConfig, Projector, fuse_embeddings, plan_rows, project_rows

WIDTHS = (1024, 768, 512, 1280)
"""d of modalities 0 to 3."""
ROWS_A_PACK = 64
VOCABULARY = 4096


@dataclass
class Step:
    """What one step of the engine has to work on.

    Attributes:
        items: (modality, rows `[n, d]` on the host), in the order of the slots.
        packs: directories of packs of the same rows.
        mask: bool `[T]` on the host, pinned where there is a GPU: slots of rows.
        input_ids: int64 `[T]` on the device.
    """

    items: list[tuple[int, torch.Tensor]]
    packs: list[torch.Tensor]
    mask: torch.Tensor
    input_ids: torch.Tensor

    def parts(self, modalities: int) -> list[list[torch.Tensor]]:
        """The rows of each modality."""
        found: list[list[torch.Tensor]] = [[] for _ in range(modalities)]
        for m, rows in self.items:
            found[m].append(rows)
        return found

    def slots(self, modalities: int) -> list[torch.Tensor]:
        """The slots of each modality's rows, int64 on the host."""
        positions = self.mask.nonzero().flatten().split([len(rows) for _, rows in self.items])
        found: list[list[torch.Tensor]] = [[] for _ in range(modalities)]
        for (m, _), at in zip(self.items, positions, strict=True):
            found[m].append(at)
        return [torch.cat(at) if at else torch.empty(0, dtype=torch.int64) for at in found]


Run = Callable[[Step], torch.Tensor]


@dataclass
class Workload:
    """A model's tensors and some steps, the same for all providers."""

    size: int  # D = H
    modalities: int
    rows: int
    text: int
    dtype: torch.dtype
    device: str
    table: torch.Tensor
    projectors: list[Projector]
    steps: list[Step] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """T of the longest step."""
        return self.rows + self.text

    def bytes_moved(self) -> int:
        """The least that a step must move: weights, x, text rows, out, and the runner's copy."""
        weights = sum(w.numel() for p in self.projectors for w in p.tensors())
        x = sum(rows.numel() for _, rows in self.steps[0].items)
        placed = self.text * self.size + 3 * self.tokens * self.size
        return (weights + x + placed) * self.dtype.itemsize

    def flops(self) -> int:
        """Of the two products of a step."""
        return sum(
            2 * len(x) * self.size * (x.shape[1] + self.size) for _, x in self.steps[0].items
        )


def make_workload(
    size: int,
    modalities: int,
    rows: int,
    text: int,
    *,
    steps: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> Workload:
    """Items of 1 to 64 rows, modalities by turns, between stretches of text.

    Each of the first steps has one row less than the step before, and other items.
    """
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(std=scale)

    work = Workload(
        size, modalities, rows, text, dtype, device, normal(VOCABULARY, size, scale=1.0),
        [
            Projector(
                normal(size, width, scale=width**-0.5), normal(size, scale=1.0),
                normal(size, size, scale=size**-0.5), normal(size, scale=1.0),
            )
            for width in WIDTHS[:modalities]
        ],
    )  # fmt: skip
    fewest = max(modalities, rows - 31)
    drawn = [torch.randn(rows + 64, width, generator=g).to(dtype) for width in WIDTHS[:modalities]]
    work.steps = [_make_step(work, max(rows - at % 32, fewest), drawn, g) for at in range(steps)]
    return work


def _make_step(
    work: Workload, rows: int, drawn: Sequence[torch.Tensor], g: torch.Generator
) -> Step:
    items: list[tuple[int, torch.Tensor]] = []
    left = [rows // work.modalities + (m < rows % work.modalities) for m in range(work.modalities)]
    while any(left):
        for m in range(work.modalities):
            n = min(left[m], int(torch.randint(1, 65, (1,), generator=g)))
            if n:
                left[m] -= n
                items.append((m, drawn[m][left[m] : left[m] + n].clone()))
    packs, pending = [], 0
    members: list[tuple[int, torch.Tensor]] = []
    for item in items:
        members.append(item)
        pending += len(item[1])
        if pending >= ROWS_A_PACK:
            packs.append(directory(pack_rows(members)))
            members, pending = [], 0
    if members:
        packs.append(directory(pack_rows(members)))
    tokens = rows + work.text
    mask = torch.zeros(tokens, dtype=torch.bool)
    begin = 0
    gap = work.text // (len(items) + 1)
    for _, x in items:  # an item's rows stand together
        begin += gap
        mask[begin : begin + len(x)] = True
        begin += len(x)
    if work.device != "cpu":
        mask = mask.pin_memory()  # as vLLM's is
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=g).to(work.device)
    return Step(items, packs, mask, ids)


# -- peers ---------------------------------------------------------------------------------------


def _upload(parts: Sequence[torch.Tensor], device: str) -> torch.Tensor:
    """Host tensors end to end on the device, by one copy."""
    if device == "cpu":
        return torch.cat(list(parts))
    rows = sum(len(part) for part in parts)
    pinned = torch.empty(rows, *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(list(parts), out=pinned).to(device, non_blocking=True)


def _as_vllm(
    input_ids: torch.Tensor,
    table: torch.Tensor,
    rows: list[torch.Tensor | None],
    sizes: list[list[int]],
    order: list[tuple[int, int]],
    projectors: list[Projector],
    mask: torch.Tensor,
) -> torch.Tensor:
    out = F.embedding(input_ids, table)
    pieces: list[Sequence[torch.Tensor]] = []
    for (w1, b1, w2, b2, *_), x, of in zip(projectors, rows, sizes, strict=True):
        pieces.append(() if x is None else F.linear(F.relu(F.linear(x, w1, b1)), w2, b2).split(of))
    flat = torch.cat([pieces[m][at] for m, at in order])
    return out.masked_scatter_(mask.unsqueeze(-1), flat)


def _vllm(work: Workload, compiled: bool = False) -> Run:
    if compiled:
        torch._dynamo.reset()
    call = torch.compile(_as_vllm, dynamic=True) if compiled else _as_vllm

    def run(step: Step) -> torch.Tensor:
        parts = step.parts(work.modalities)
        rows = [_upload(of, work.device) if of else None for of in parts]
        sizes = [[len(x) for x in of] for of in parts]
        seen = [0] * work.modalities
        order = []
        for m, _ in step.items:
            order.append((m, seen[m]))
            seen[m] += 1
        mask = step.mask.to(work.device, non_blocking=True)
        return call(step.input_ids, work.table, rows, sizes, order, work.projectors, mask)

    return run


def _project(x: torch.Tensor, projector: Projector) -> torch.Tensor:
    w1, b1, w2, b2, *_ = projector
    if not x.is_cuda:
        return F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
    # ReLU in the product's epilogue
    return F.linear(torch._addmm_activation(b1, x, w1.t()), w2, b2)


def _torch(work: Workload) -> Run:
    def run(step: Step) -> torch.Tensor:
        out = torch.index_select(work.table, 0, step.input_ids)
        slots = _upload(step.slots(work.modalities), work.device)
        begin = 0
        for parts, projector in zip(step.parts(work.modalities), work.projectors, strict=True):
            if parts:
                x = _upload(parts, work.device)
                out.index_copy_(0, slots[begin : begin + len(x)], _project(x, projector))
                begin += len(x)
        return out

    return run


def _graph(work: Workload) -> Run:
    """Shapes are padded to the most that a step of this workload has; one replay a step.

    Padding rows go to a slot past the end.
    """
    longest = [0] * work.modalities
    for step in work.steps:
        for m, parts in enumerate(step.parts(work.modalities)):
            longest[m] = max(longest[m], sum(map(len, parts)))
    ids = torch.zeros(work.tokens, dtype=torch.int64, device=work.device)
    slots = torch.full((sum(longest),), work.tokens, dtype=torch.int64, device=work.device)
    xs = [
        torch.zeros(rows, width, dtype=work.dtype, device=work.device)
        for rows, width in zip(longest, WIDTHS, strict=False)
    ]
    out = torch.empty(work.tokens + 1, work.size, dtype=work.dtype, device=work.device)

    def body() -> None:
        torch.index_select(work.table, 0, ids, out=out[: work.tokens])
        for x, at, projector in zip(xs, slots.split(longest), work.projectors, strict=True):
            if len(x):
                out.index_copy_(0, at, _project(x, projector))

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()

    def run(step: Step) -> torch.Tensor:
        tokens = len(step.input_ids)
        ids[:tokens].copy_(step.input_ids)
        of = step.slots(work.modalities)
        padded = torch.full((sum(longest),), work.tokens, pin_memory=True)
        for target, at in zip(padded.split(longest), of, strict=True):
            target[: len(at)] = at
        slots.copy_(padded, non_blocking=True)
        for x, parts in zip(xs, step.parts(work.modalities), strict=True):
            if parts:
                moved = _upload(parts, work.device)
                x[: len(moved)].copy_(moved)
        graph.replay()
        return out[:tokens]

    return run


def _grouped(work: Workload) -> Run:
    widest = max(WIDTHS[: work.modalities])
    w1 = torch.stack([F.pad(p.w1, (0, widest - p.w1.shape[1])).t() for p in work.projectors])
    w2 = torch.stack([p.w2.t() for p in work.projectors])
    b1 = torch.stack([p.b1 for p in work.projectors])
    b2 = torch.stack([p.b2 for p in work.projectors if p.b2 is not None])

    def run(step: Step) -> torch.Tensor:
        parts, slots = step.parts(work.modalities), step.slots(work.modalities)
        counts = torch.tensor([len(at) for at in slots])
        of_row = torch.repeat_interleave(torch.arange(work.modalities), counts)
        moved = _upload([*slots, of_row, counts.cumsum(0)], work.device)
        at, of, ends = moved.split([len(of_row), len(of_row), work.modalities])
        x = moved.new_zeros(len(of_row), widest, dtype=work.dtype)
        begin = 0
        for members, width in zip(parts, WIDTHS, strict=False):
            if members:
                rows = _upload(members, work.device)
                x[begin : begin + len(rows), :width] = rows
                begin += len(rows)
        offsets = ends.int()
        hidden = F.relu(torch._grouped_mm(x, w1, offs=offsets) + b1[of])
        out = torch.index_select(work.table, 0, step.input_ids)
        return out.index_copy_(0, at, torch._grouped_mm(hidden, w2, offs=offsets) + b2[of])

    return run


# -- ours ----------------------------------------------------------------------------------------


def _ours(work: Workload, backend: str = "triton") -> Run:
    widths = WIDTHS[: work.modalities]

    def run(step: Step) -> torch.Tensor:
        return fuse_embeddings(
            step.input_ids,
            work.table,
            find_rows(step.packs, widths, work.dtype),
            work.projectors,
            slots=step.mask,
            backend=backend,
        )

    return run


def prepare_kernels(work: Workload, launch: LaunchConfig | None = None) -> Run:
    """The kernels alone, by a plan made beforehand; `launch` for sweeps."""
    widths = WIDTHS[: work.modalities]
    plans = {
        id(step): plan_rows(
            find_rows(step.packs, widths, work.dtype),
            step.mask,
            len(step.mask),
            widths,
            dtype=work.dtype,
            device=work.device,
        )
        for step in work.steps
    }

    def run(step: Step) -> torch.Tensor:
        return fuse_embeddings(
            step.input_ids,
            work.table,
            plans[id(step)],
            work.projectors,
            backend="triton",
            launch=launch,
        )

    return run


PROVIDERS: dict[str, Callable[[Workload], Run]] = {
    "vllm": _vllm,
    "compiled": lambda work: _vllm(work, compiled=True),
    "torch": _torch,
    "graph": _graph,
    "grouped": _grouped,
    "plan_torch": lambda work: _ours(work, "torch"),
    "ours": _ours,
    "kernels": prepare_kernels,
}
PEERS = ("vllm", "compiled", "torch", "graph", "grouped", "plan_torch")
ONLY_CUDA = ("compiled", "graph", "grouped", "ours", "kernels")


def why_not(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a provider cannot run such a workload; None where it can."""
    if device == "cpu" and name in ONLY_CUDA:
        return "needs CUDA"
    if name == "grouped" and dtype != torch.bfloat16:
        return "torch._grouped_mm takes bfloat16 only"
    return None


def into_buffer(work: Workload, run: Run) -> Run:
    """A provider with the copy into the runner's buffer behind it, which vLLM's runner makes."""
    buffer = torch.full(
        (work.tokens, work.size), float("nan"), dtype=work.dtype, device=work.device
    )

    def whole(step: Step) -> torch.Tensor:
        out = run(step)
        return buffer[: len(out)].copy_(out)

    return whole


# -- no timing on red ----------------------------------------------------------------------------


def exact(work: Workload, step: Step) -> torch.Tensor:
    """The step's result in float64."""
    out = F.embedding(step.input_ids, work.table).double()
    everything = zip(
        step.parts(work.modalities), step.slots(work.modalities), work.projectors, strict=True
    )
    for parts, at, projector in everything:
        if parts:
            x = torch.cat(parts).to(work.device).double()
            out[at.to(work.device)] = project_rows(x, projector.map(torch.Tensor.double))
    return out


def gate(work: Workload, names: Sequence[str], factor: float = 1.1) -> dict[str, float]:
    """Relative error of every provider against float64, on the workload's last step.

    Raises:
        AssertionError: ours errs more than `factor` times torch, or any provider is plainly wrong.
    """
    step = work.steps[-1]
    want = exact(work, step)
    errors: dict[str, float] = {}
    for name in dict.fromkeys(["torch", *names]):
        got = into_buffer(work, PROVIDERS[name](work))(step)
        assert not got.isnan().any(), f"{name}: something was not written"
        errors[name] = ((got.double() - want).norm() / want.norm()).item()
    # Another order of float32 sums: an error at each of the additions behind an element, of random
    # sign; and a quarter of the dtype's rounding, where few rows make the ratio chance.
    additions = max(sum(p.w1.shape) for p in work.projectors)
    slack = torch.finfo(work.dtype).eps / 8 + 2**-24 * additions**0.5
    for name, error in errors.items():
        limit = factor if name in ("ours", "kernels", "plan_torch") else 3.0
        assert error <= limit * errors["torch"] + slack, (
            f"{name}: error {error:.2e}, torch {errors['torch']:.2e}"
        )
    return errors
