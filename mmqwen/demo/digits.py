"""The demo's data: handwritten digits as ragged items of two modalities, and a small tokenizer.

The images are scikit-learn's digits (8 x 8 pixels of 17 grey levels, 1797 of them; UCI "Optical
Recognition of Handwritten Digits", Alpaydin and Kaynak 1998). An encoder would stand here in
practice; the demo's is so simple that one can read it:

- `strokes`: one row per pixel *column* that holds ink, from left to right: `[2 to 8, 16]`, the 8
  pixels and the column's position as one-hot. Digits are of different width, so items are ragged.
- `profile`: the ink of each image row and of each image column: `[2, 10]`, 8 sums and a one-hot
  of which of the two it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIDE = 8
STROKES_DIM = 2 * SIDE
PROFILE_DIM = SIDE + 2
MODALITIES: dict[str, dict[str, Any]] = {
    "strokes": {"dim": STROKES_DIM, "max_rows": SIDE},
    "profile": {"dim": PROFILE_DIM, "max_rows": 2},
}
PROMPT = "Strokes: <|strokes|> Profile: <|profile|> Digit:"
QUESTION = "Which digit is this?"
QUESTIONS = (QUESTION, "What digit is this?", "Read the digit.")

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|strokes|>", "<|profile|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MAX_POSITIONS = 1024


@dataclass(frozen=True, eq=False)
class Sample:
    """One digit.

    Attributes:
        image: float32 `[8, 8]`, 0 (paper) to 1 (ink).
        label: 0 to 9.
        items: `strokes` float32 `[n, 16]` and `profile` float32 `[2, 10]`.
    """

    image: np.ndarray
    label: int
    items: dict[str, torch.Tensor]

    @property
    def prompt(self) -> dict[str, Any]:
        """The prompt as vLLM, the pipeline and the processor take it."""
        return {"prompt": PROMPT, "multi_modal_data": {k: [v] for k, v in self.items.items()}}


def encode_image(image: np.ndarray) -> dict[str, torch.Tensor]:
    """The rows of both modalities of one image.

    Args:
        image: float32 `[8, 8]`, 0 to 1; at least one pixel is not 0.

    Returns:
        `strokes` `[n, 16]` and `profile` `[2, 10]`, float32, of roughly unit spread.
    """
    columns = image.T
    inked = columns.any(axis=1)
    strokes = np.concatenate([2 * columns - 0.5, 2 * np.eye(SIDE)], axis=1)[inked]
    sums = np.stack([image.sum(axis=1), image.sum(axis=0)]) / 2 - 1
    profile = np.concatenate([sums, 2 * np.eye(2)], axis=1)
    return {
        "strokes": torch.tensor(strokes, dtype=torch.float32),
        "profile": torch.tensor(profile, dtype=torch.float32),
    }


def load(seed: int = 0, train: int = 1437) -> tuple[list[Sample], list[Sample]]:
    """All 1797 digits, shuffled by `seed`: the first `train` to train on, the others held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    samples = [
        Sample(images[at], int(digits.target[at]), encode_image(images[at]))
        for at in np.random.default_rng(seed).permutation(len(images))
    ]
    return samples[:train], samples[train:]


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [PROMPT, *QUESTIONS, "user assistant system", *(f" {n}" for n in range(10))]
    for special in SPECIAL_TOKENS:
        text = [line.replace(special, "") for line in text]
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text * 4, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    return tokenizer.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 360 tokens, with Qwen's special tokens and ChatML.

    Any text can be written with it; `" 7"` and `"7"` are one token each. The placeholders of both
    modalities are among its special tokens.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
    )
