"""One step of the fusion, by every means that it is compared with.

The step, from ragged items that lie on the device (256 text tokens by default): gather text rows,
project each item's rows with its modality's projector, put them at their slots in the runner's
buffer. What a provider must do at every step (concatenate, move indices to the device) is inside
`step()`; what is done once per model (stack weights, compile) is in `prepare`.

    A  item by item: two linears and an index_copy_ each
    B  as vLLM does it: embedding, cat, linear, relu, linear, split, cat, masked assignment, copy
    C  B under torch.compile (CUDA only)
    D  torch at its best: one cat a modality, _addmm_activation, addmm, index_copy_
    E  torch._grouped_mm twice, over all modalities (CUDA, bf16 only)
    ours            the Triton kernels, plan and row table's copy included
    ours_planned    the same with the plan made beforehand: the kernels alone
    ours_packed     the same with rows in packs on the host, as an engine has them
    ours_torch      the torch backend with our plan
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from mmqwen_kernels import Projector, directory, fuse_embeddings, pack_rows, plan_rows
from mmqwen_kernels.launch import LaunchConfig

Step = Callable[[], torch.Tensor]
WIDTHS = (1024, 768, 512, 1280)
"""d of modalities 0 to 3: 1024 alone, as in the measurements of docs/kernels.md."""


@dataclass
class Workload:
    """One grid point: tensors of a step, the same for all providers."""

    size: int  # D = H
    modalities: int
    rows: int
    text: int
    dtype: torch.dtype
    device: str
    items: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    input_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    table: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    projectors: list[Projector] = field(default_factory=list)
    buffer: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def counts(self) -> list[int]:
        of = [0] * self.modalities
        for m, x in self.items:
            of[m] += x.shape[0]
        return of

    def bytes_moved(self) -> int:
        """The least that a step must move: weights of modalities with rows, x, out, text rows."""
        size, total = self.size, 0
        for count, width in zip(self.counts, WIDTHS, strict=False):
            if count:
                total += size * width + size + size * size + size + count * width
        total += self.rows * size + 2 * self.text * size
        return total * self.dtype.itemsize

    def flops(self) -> int:
        return sum(
            2 * count * (width * self.size + self.size * self.size)
            for count, width in zip(self.counts, WIDTHS, strict=False)
        )


def make_workload(
    size: int,
    modalities: int,
    rows: int,
    *,
    text: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> Workload:
    """Items of 1 to 64 rows, modalities by turns, between stretches of text."""
    g = torch.Generator().manual_seed(seed)
    work = Workload(size, modalities, rows, text, dtype, device)
    left = [rows // modalities + (m < rows % modalities) for m in range(modalities)]
    while any(left):
        for m in range(modalities):
            n = min(left[m], int(torch.randint(1, 65, (1,), generator=g)))
            if n:
                left[m] -= n
                x = torch.randn(n, WIDTHS[m], generator=g).to(device, dtype)
                work.items.append((m, x))
    tokens = rows + text
    work.mask = torch.zeros(tokens, dtype=torch.bool)
    work.mask[torch.randperm(tokens, generator=g)[:rows]] = True
    if device != "cpu":
        work.mask = work.mask.pin_memory()  # as vLLM's is
    vocab = 4096
    work.input_ids = torch.randint(0, vocab, (tokens,), generator=g).to(device)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.empty(*shape, device=device, dtype=dtype).normal_(std=scale)

    torch.manual_seed(seed)
    work.table = normal(vocab, size, scale=1.0)
    for width in WIDTHS[:modalities]:
        work.projectors.append(
            Projector(
                normal(size, width, scale=width**-0.5),
                normal(size, scale=1.0),
                normal(size, size, scale=size**-0.5),
                normal(size, scale=1.0),
            )
        )
    work.buffer = torch.empty(tokens, size, device=device, dtype=dtype)
    return work


def prepare_a(work: Workload) -> Step:
    positions = work.mask.nonzero().flatten()

    def step() -> torch.Tensor:
        out = work.buffer
        out.copy_(F.embedding(work.input_ids, work.table))
        at = positions.to(work.device, non_blocking=True)
        begin = 0
        for m, x in work.items:
            w1, b1, w2, b2 = work.projectors[m]
            n = x.shape[0]
            rows = F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
            out.index_copy_(0, at[begin : begin + n], rows)
            begin += n
        return out

    return step


def _as_vllm(
    input_ids: torch.Tensor,
    table: torch.Tensor,
    items: list[tuple[int, torch.Tensor]],
    projectors: list[Projector],
    mask: torch.Tensor,
) -> torch.Tensor:
    out = F.embedding(input_ids, table)
    pieces: list[torch.Tensor | None] = [None] * len(items)
    for m, (w1, b1, w2, b2) in enumerate(projectors):
        mine = [i for i, item in enumerate(items) if item[0] == m]
        if not mine:
            continue
        x = torch.cat([items[i][1] for i in mine])
        rows = F.linear(F.relu(F.linear(x, w1, b1)), w2, b2)
        for i, piece in zip(mine, rows.split([items[i][1].shape[0] for i in mine]), strict=True):
            pieces[i] = piece
    flat = torch.cat([piece for piece in pieces if piece is not None])
    return out.masked_scatter_(mask.unsqueeze(-1), flat)


def prepare_b(work: Workload) -> Step:
    def step() -> torch.Tensor:
        mask = work.mask.to(work.device, non_blocking=True)
        work.buffer.copy_(_as_vllm(work.input_ids, work.table, work.items, work.projectors, mask))
        return work.buffer

    return step


def prepare_c(work: Workload) -> Step:
    torch._dynamo.reset()
    compiled = torch.compile(_as_vllm, dynamic=False)

    def step() -> torch.Tensor:
        mask = work.mask.to(work.device, non_blocking=True)
        work.buffer.copy_(compiled(work.input_ids, work.table, work.items, work.projectors, mask))
        return work.buffer

    return step


def _orders(work: Workload) -> tuple[list[list[torch.Tensor]], torch.Tensor, list[int]]:
    """Per modality its tensors; positions grouped by modality, on the host; rows of each."""
    positions = work.mask.nonzero().flatten()
    parts: list[list[torch.Tensor]] = [[] for _ in range(work.modalities)]
    at: list[list[torch.Tensor]] = [[] for _ in range(work.modalities)]
    begin = 0
    for m, x in work.items:
        n = x.shape[0]
        parts[m].append(x)
        at[m].append(positions[begin : begin + n])
        begin += n
    grouped = torch.cat([p for of in at for p in of])
    return parts, grouped, work.counts


def prepare_d(work: Workload) -> Step:
    cuda = work.device != "cpu"

    def step() -> torch.Tensor:
        parts, grouped, counts = _orders(work)
        if cuda:
            grouped = grouped.pin_memory().to(work.device, non_blocking=True)
        out = torch.index_select(work.table, 0, work.input_ids, out=work.buffer)
        begin = 0
        for m, (w1, b1, w2, b2) in enumerate(work.projectors):
            if not counts[m]:
                continue
            x = torch.cat(parts[m]) if len(parts[m]) > 1 else parts[m][0]
            fused = torch._addmm_activation  # ReLU in the product's epilogue, on CUDA
            hidden = fused(b1, x, w1.t()) if cuda else F.relu(F.linear(x, w1, b1))
            assert b2 is not None
            rows = torch.addmm(b2, hidden, w2.t())
            out.index_copy_(0, grouped[begin : begin + counts[m]], rows)
            begin += counts[m]
        return out

    return step


def prepare_e(work: Workload) -> Step:
    widest = max(WIDTHS[: work.modalities])
    w1 = torch.stack([F.pad(p.w1, (0, widest - p.w1.shape[1])).t() for p in work.projectors])
    w2 = torch.stack([p.w2.t() for p in work.projectors])
    b1 = torch.stack([p.b1 for p in work.projectors])
    b2 = torch.stack([p.b2 for p in work.projectors if p.b2 is not None])

    def step() -> torch.Tensor:
        parts, grouped, counts = _orders(work)
        ends = torch.tensor(counts).cumsum(0).int()
        of_row = torch.repeat_interleave(torch.arange(work.modalities), torch.tensor(counts))
        host = torch.cat([grouped, of_row, ends.long()]).pin_memory()
        moved = host.to(work.device, non_blocking=True)
        at, of, offs = moved.split([work.rows, work.rows, work.modalities])
        x = torch.cat([F.pad(t, (0, widest - t.shape[1])) for of_m in parts for t in of_m])
        offs = offs.int()
        hidden = F.relu(torch._grouped_mm(x, w1, offs=offs) + b1[of])
        rows = torch._grouped_mm(hidden, w2, offs=offs) + b2[of]
        out = torch.index_select(work.table, 0, work.input_ids, out=work.buffer)
        return out.index_copy_(0, at, rows)

    return step


def prepare_planned(work: Workload, launch: str | LaunchConfig = "fastest") -> Step:
    widths = [p.w1.shape[1] for p in work.projectors]
    plan = plan_rows(
        work.items, work.mask, len(work.input_ids), widths, dtype=work.dtype, device=work.device
    )
    return _fused(work, plan, "triton", launch)


def prepare_packed(work: Workload) -> Step:
    """One pack for all items; rows cross over to the device in the step."""
    packs = [directory(pack_rows([(m, x.cpu()) for m, x in work.items]))]
    return _fused(work, packs, "triton")


def _fused(
    work: Workload, rows: object, backend: str, launch: str | LaunchConfig = "fastest"
) -> Step:
    def step() -> torch.Tensor:
        return fuse_embeddings(
            work.input_ids,
            work.table,
            rows,  # type: ignore[arg-type]
            work.projectors,
            slots=work.mask,
            out=work.buffer,
            backend=backend,
            launch=launch,  # type: ignore[arg-type]
        )

    return step


PROVIDERS: dict[str, Callable[[Workload], Step]] = {
    "A": prepare_a,
    "B": prepare_b,
    "C": prepare_c,
    "D": prepare_d,
    "E": prepare_e,
    "ours": lambda work: _fused(work, work.items, "triton"),
    "ours_planned": prepare_planned,
    "ours_packed": prepare_packed,
    "ours_torch": lambda work: _fused(work, work.items, "torch"),
}
PEERS = ("B", "C", "D", "E")


def why_not(name: str, device: str, dtype: torch.dtype, rows: int) -> str | None:
    """Why a provider cannot run such a workload; None where it can."""
    if device == "cpu":
        if name in ("C", "E"):
            return "needs CUDA"
        if name in ("ours", "ours_planned", "ours_packed"):
            return "the Triton kernels need CUDA"
    if name == "E" and dtype != torch.bfloat16:
        return "torch._grouped_mm takes bfloat16 only"
    if rows == 0 and name in ("B", "C", "E"):
        return "has no meaning without rows"
    return None


def exact(work: Workload) -> torch.Tensor:
    """The step's result in float64, row order as in the buffer."""
    out = F.embedding(work.input_ids, work.table).double()
    positions = work.mask.nonzero().flatten().to(work.device)
    begin = 0
    doubles = [[w.double() for w in p if w is not None] for p in work.projectors]
    of_modality: list[list[torch.Tensor]] = [[] for _ in range(work.modalities)]
    at: list[list[torch.Tensor]] = [[] for _ in range(work.modalities)]
    for m, x in work.items:
        of_modality[m].append(x)
        at[m].append(positions[begin : begin + x.shape[0]])
        begin += x.shape[0]
    for m, (w1, b1, w2, b2) in enumerate(doubles):
        if of_modality[m]:
            x = torch.cat(of_modality[m]).double()
            out[torch.cat(at[m])] = F.relu(x @ w1.t() + b1) @ w2.t() + b2
    return out


def gate(work: Workload, names: list[str], factor: float = 1.1) -> dict[str, float]:
    """Relative error of every provider; no timing on red.

    Raises:
        AssertionError: ours errs more than `factor` times D, or any provider is plainly wrong.
    """
    want = exact(work)
    scale = want.norm()
    errors: dict[str, float] = {}
    # Another order of float32 sums: an error at each of the additions behind an element, of random
    # sign; and a quarter of the dtype's rounding, where few rows make the ratio chance.
    additions = max(sum(p.w1.shape) for p in work.projectors)
    slack = torch.finfo(work.dtype).eps / 8 + 2**-24 * additions**0.5
    steps = {name: PROVIDERS[name](work) for name in dict.fromkeys(["D", *names])}
    for name, step in steps.items():
        work.buffer.fill_(float("nan"))
        got = step()
        assert not got.isnan().any(), f"{name}: something was not written"
        errors[name] = ((got.double() - want).norm() / scale).item()
    for name, error in errors.items():
        limit = factor if name.startswith("ours") else 3.0
        assert error <= limit * errors["D"] + slack, (
            f"{name}: error {error:.2e}, D {errors['D']:.2e}"
        )
    return errors
