"""Recurrent layers among samples that stand end to end: each sample begins with an empty state.

Attention is told where samples begin; a recurrent layer (the gated delta net of Qwen3-Next and
Qwen3.5) carries its state on, and its convolution looks back, from one sample into the next. The
kernels of flash-linear-attention could be told of the bounds, transformers' own code not. So such a
layer is given each sample as a row of its own: rows of about one length as one batch, padded on the
right, where nothing that is kept looks.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

RECURRENT_MODULE = "linear_attn"
"""What transformers calls such a layer in the decoder layers of the text models that were tried."""

CHUNK = 64
"""Tokens that the delta rule takes at a time: shorter rows take as long."""

WASTE = 0.75
"""Least length of a row, as a share of the longest one in its batch."""


class SampleRows:
    """Where the tokens of a pass stand when its samples are rows.

    Args:
        bounds: `[S + 1]` int, where each sample begins and the last one ends; samples may be empty.

    Attributes:
        batches: for each batch of rows, `[rows, longest]` int64, the tokens that they hold; past
            a sample's end, its last token.
        order: `[T]` int64, where each token stands among the rows' real tokens.
        real: for each batch, the places of its real tokens when flattened.

    Raises:
        ValueError: the bounds do not begin at 0, or fall.
    """

    def __init__(self, bounds: Tensor) -> None:
        edges = bounds.tolist()
        if not edges or edges[0] != 0 or any(a > b for a, b in itertools.pairwise(edges)):
            raise ValueError(f"cu_seq_lens_q: expected rising bounds from 0 on, got {edges[:8]}")
        spans = [(a, b - a) for a, b in itertools.pairwise(edges) if b > a]
        spans.sort(key=lambda span: -span[1])
        groups: list[list[tuple[int, int]]] = []
        for begin, length in spans:
            if not groups or max(length, CHUNK) < WASTE * max(groups[-1][0][1], CHUNK):
                groups.append([])
            groups[-1].append((begin, length))
        self.tokens = edges[-1]
        self.batches: list[Tensor] = []
        self.real: list[Tensor] = []
        held: list[Tensor] = []
        for group in groups:
            begins = torch.tensor([begin for begin, _ in group])[:, None]
            lengths = torch.tensor([length for _, length in group])[:, None]
            steps = torch.arange(group[0][1])
            places = begins + torch.minimum(steps, lengths - 1)
            kept = steps < lengths
            self.batches.append(places.to(bounds.device))
            self.real.append(kept.flatten().nonzero().squeeze(1).to(bounds.device))
            held.append(places[kept])
        order = torch.empty(self.tokens, dtype=torch.int64)
        order[torch.cat(held)] = torch.arange(self.tokens)
        self.order = order.to(bounds.device)


_last: tuple[Any, SampleRows] | None = None
"""The bounds that came last, and their rows: all layers of a pass are given the same tensor."""


def _rows_of(bounds: Tensor) -> SampleRows:
    global _last
    known = _last
    if known is not None and known[0]() is bounds:
        return known[1]
    rows = SampleRows(bounds)
    _last = (ref(bounds), rows)
    return rows


@cache
def _by_samples(layer_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass that takes each sample of a pass as a row of its own."""

    class BySamples(layer_class):  # type: ignore[misc, valid-type]
        @torch.compiler.disable
        def _forward_rows(self, hidden_states: Tensor, bounds: Tensor, **kwargs: Any) -> Tensor:
            rows = _rows_of(bounds)
            if hidden_states.shape[0] != 1 or hidden_states.shape[1] != rows.tokens:
                raise ValueError(
                    f"cu_seq_lens_q ends at {rows.tokens}: expected hidden states of shape "
                    f"[1, {rows.tokens}, D], got {list(hidden_states.shape)}"
                )
            parts = []
            for places, real in zip(rows.batches, rows.real, strict=True):
                batch = hidden_states[0].index_select(0, places.flatten())
                out = super().forward(batch.view(*places.shape, -1), **kwargs)
                parts.append(out.flatten(0, 1).index_select(0, real))
            return torch.cat(parts).index_select(0, rows.order)[None]

        def forward(
            self,
            hidden_states: Tensor,
            cache_params: Any = None,
            attention_mask: Tensor | None = None,
            cu_seq_lens_q: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            if cu_seq_lens_q is None:
                return super().forward(hidden_states, cache_params, attention_mask, **kwargs)
            if cache_params is not None:
                raise ValueError(
                    "samples end to end leave no state to go on from; got cu_seq_lens_q and a "
                    "cache, expected use_cache=False"
                )
            for name in ("cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
                kwargs.pop(name, None)
            return self._forward_rows(hidden_states, cu_seq_lens_q, **kwargs)

    BySamples.__name__ = BySamples.__qualname__ = layer_class.__name__
    return BySamples


def keep_samples_apart(model: nn.Module) -> None:
    """Let the recurrent layers of a text model take `cu_seq_lens_q`, as its attention does.

    By class, not by a function of the instance, which copies of the model would share.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == RECURRENT_MODULE:
            module.__class__ = _by_samples(cast(Any, type(module)))
