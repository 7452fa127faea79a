"""Samples with ragged items -> one padded batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmqwen.data.dataset import Example
from mmqwen.data.encoding import IGNORED, encode
from mmqwen.data.format import DatasetError
from mmqwen.modalities import ModalitySpec
from mmqwen.transport import EmbeddingError, concat_items


class Collator:
    """Tokenizes, expands markers, packs the rows of the batch, and pads.

    Batches are padded on the left, so that answers end together: logits are then computed for the
    tail alone, from the first learnt token on (`logits_to_keep`); with a vocabulary of 150 000 that
    is most of the memory. Positions are counted along the mask, so padding changes nothing else.

    Args:
        tokenizer: with the placeholder tokens.
        specs: the modalities, with their token ids.
        max_length: most tokens of a sample, rows counted.
    """

    def __init__(
        self, tokenizer: Any, specs: Mapping[str, ModalitySpec], max_length: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.specs = dict(specs)
        self.max_length = max_length
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else tokenizer.eos_token_id or 0

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """The keyword arguments of the model's `forward`.

        Returns:
            `input_ids`, `attention_mask` and `labels`, `[B, T]` int64; `embeddings`, for each
            modality its rows `[R, d]` float32 in the order of sample, then position (R may be 0);
            `logits_to_keep`.

        Raises:
            DatasetError: with file and line, if a sample cannot be used.
        """
        sequences, labels = [], []
        items: dict[str, list[torch.Tensor]] = {name: [] for name in self.specs}
        for example in examples:
            try:
                encoding = encode(example.sample, example.counts, self.tokenizer, self.specs)
                if self.max_length is not None and len(encoding.token_ids) > self.max_length:
                    raise ValueError(
                        f"{len(encoding.token_ids)} tokens with rows, expected at most "
                        f"{self.max_length}"
                    )
            except ValueError as error:
                raise DatasetError(f"{example.where}: {error}") from None
            sequences.append(encoding.token_ids)
            labels.append(encoding.labels)
            for name, index in encoding.items:
                items[name].append(example.rows[name][index])
        width = max(map(len, sequences))
        first = min(
            width - len(own) + next(at for at, label in enumerate(own) if label != IGNORED)
            for own in labels
        )
        return {
            "input_ids": _pad_left(sequences, width, self.pad_id),
            "attention_mask": _pad_left([[1] * len(s) for s in sequences], width, 0),
            "labels": _pad_left(labels, width, IGNORED),
            "embeddings": {name: self._join(name, rows, examples) for name, rows in items.items()},
            # The logits that predict the first learnt token stand one place before it.
            "logits_to_keep": width - max(first - 1, 0),
        }

    def _join(
        self, name: str, rows: list[torch.Tensor], examples: Sequence[Example]
    ) -> torch.Tensor:
        try:
            return concat_items(rows, self.specs[name], torch.float32)[0]
        except EmbeddingError as error:
            lines = ", ".join(e.where for e in examples if e.rows.get(name))
            raise DatasetError(f"one of {lines}: {error}") from None


def _pad_left(rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
