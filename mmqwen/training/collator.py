"""Samples with ragged items -> one row of tokens in which they stand end to end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmqwen.data.dataset import Example
from mmqwen.data.encoding import IGNORED, Encoding, encode, fit
from mmqwen.data.errors import DatasetError
from mmqwen.modalities import ModalitySpec
from mmqwen.transport import EmbeddingError, concat_items


class Collator:
    """Tokenizes, expands markers, and lays samples and their rows end to end.

    Positions begin anew with each sample, and attention sees where it begins. What is left of a
    pass is filled by a sample of padding, so that all passes have one shape. Everything that the
    model would have to look for (the slots of rows, the tokens that are learnt) is found here, so
    that a step never waits for the GPU.

    Args:
        tokenizer: with the placeholder tokens.
        specs: the modalities, with their token ids.
        tokens: of a pass; None is as many as the samples have.
        samples: most samples of a pass, so that bounds have one shape; None is those given.
        longest: most tokens of a sample; None is that of the pass's longest.
        cut: cut longer samples at the end, instead of refusing them.
    """

    def __init__(
        self,
        tokenizer: Any,
        specs: Mapping[str, ModalitySpec],
        *,
        tokens: int | None = None,
        samples: int | None = None,
        longest: int | None = None,
        cut: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.specs = dict(specs)
        self.tokens, self.samples, self.longest, self.cut = tokens, samples, longest, cut
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else tokenizer.eos_token_id or 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The keyword arguments of the model's `forward`.

        Returns:
            `input_ids` and `position_ids`, `[1, T]` int64; `cu_seq_lens_q` and `cu_seq_lens_k`,
            `[S + 1]` int32, where each sample begins and the last one ends; `max_length_q` and
            `max_length_k`; `padding`, tokens of no sample; `embeddings`, for each modality its rows
            `[R, d]` in the dataset's dtype in the order of their places (R may be 0), and `slots`,
            `[R]` int64, those places; `logits_to_keep`, `[K]` int64, the places that predict what
            is learnt, and `shift_labels`, `[K]`, that.

        Raises:
            DatasetError: with file and line, if a sample cannot be used.
        """
        ids: list[int] = []
        positions: list[torch.Tensor] = []
        bounds = [0]
        learnt: list[int] = []
        items: dict[str, list[torch.Tensor]] = {name: [] for name in self.specs}
        for example in examples:
            encoding = self._encode(example)
            begin, count = len(ids), len(encoding.token_ids)
            ids += encoding.token_ids
            positions.append(torch.arange(count))
            bounds.append(len(ids))
            learnt += [begin + at for at, i in enumerate(encoding.labels) if i != IGNORED and at]
            left = {n: encoding.token_ids.count(s.token_id or 0) for n, s in self.specs.items()}
            for name, index in encoding.items:
                rows = example.rows[name][index][: left[name]]  # all, unless the sample was cut
                left[name] -= len(rows)
                items[name] += [rows] if len(rows) else []
        real = len(ids)
        length = max((b - a for a, b in itertools.pairwise(bounds)), default=1)
        if self.tokens is not None and len(ids) < self.tokens:
            padding = self.tokens - len(ids)
            # As several samples: none longer than what attention was told.
            step = self.longest or length
            positions.append(torch.arange(padding) % step)
            bounds += [*range(len(ids) + step, self.tokens, step), self.tokens]
            ids += [self.pad_id] * padding
        if self.samples is not None:
            most_padding = -(-(self.tokens or 0) // (self.longest or 1))
            bounds += [len(ids)] * (self.samples + most_padding + 1 - len(bounds))
        cu_seq_lens = torch.tensor(bounds, dtype=torch.int32)
        input_ids = torch.tensor(ids)
        targets = torch.tensor(learnt, dtype=torch.int64)
        longest = self.longest or length
        return {
            "input_ids": input_ids[None],
            "position_ids": torch.cat(positions)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "padding": len(ids) - real,
            "embeddings": {name: self._join(name, rows, examples) for name, rows in items.items()},
            "slots": {
                name: input_ids.eq(spec.token_id or 0).nonzero().squeeze(1)
                for name, spec in self.specs.items()
            },
            "logits_to_keep": targets - 1,
            "shift_labels": input_ids[targets],
        }

    def _encode(self, example: Example) -> Encoding:
        try:
            encoding = encode(example.sample, example.counts, self.tokenizer, self.specs)
            return fit(encoding, self.longest or self.tokens, may_cut=self.cut)
        except ValueError as error:
            raise DatasetError(f"{example.where}: {error}") from None

    def _join(
        self, name: str, rows: list[torch.Tensor], examples: Sequence[Example]
    ) -> torch.Tensor:
        # They travel as they are stored; of several files, in what holds them all.
        dtype = rows[0].dtype if len({r.dtype for r in rows}) == 1 else torch.float32
        try:
            return concat_items(rows, self.specs[name], dtype)[0]
        except EmbeddingError as error:
            lines = ", ".join(e.where for e in examples if e.rows.get(name))
            raise DatasetError(f"one of {lines}: {error}") from None
