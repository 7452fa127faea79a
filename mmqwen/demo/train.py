"""Trains the demo's model from scratch: a small Qwen3 and the projectors of both modalities."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config

from mmqwen.checkpoint import save_projectors
from mmqwen.checkpoint.names import BASE_PREFIX, INDEX_FILE, PROJECTOR_FILE, SINGLE_FILE
from mmqwen.demo import digits
from mmqwen.demo.digits import Sample
from mmqwen.hf import MultimodalQwen3Config, MultimodalQwen3ForConditionalGeneration
from mmqwen.modalities import ModalitySpec, assign_token_ids, expand_markers, parse_modalities

TEXT_FILE = BASE_PREFIX + SINGLE_FILE

BATCH_SIZE = 32
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 20
MAX_THREADS = 4
"""The matrices are small: more threads wait for one another longer than they compute."""
INITIALIZER_RANGE = 0.15
"""Qwen3's own 0.02 suits wide models; at width 128 it spends 100 of 300 steps on a plateau."""
NOISE = 0.1
"""Spread of the noise added to training rows: 1437 images are few enough to learn by heart."""


@dataclass(frozen=True)
class TrainResult:
    """What training came to.

    Attributes:
        output: folder of the checkpoint.
        accuracy: share of the held-out digits that the model reads right, by transformers.
        seconds: time that the training steps took.
        steps: how many they were.
        losses: the loss of each.
        parameters: number of trained parameters.
    """

    output: Path
    accuracy: float
    seconds: float
    steps: int
    losses: list[float]
    parameters: int


@dataclass(frozen=True)
class Answers:
    """A model's reading of some digits, as `[n]` tensors in their order.

    Attributes:
        token_ids: the most probable next token of each prompt.
        logprobs: `[n, V]`, log-probabilities of all tokens.
        correct: whether the token spells the label.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    correct: torch.Tensor

    @property
    def accuracy(self) -> float:
        return self.correct.float().mean().item()


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0
) -> MultimodalQwen3ForConditionalGeneration:
    """A fresh model for `tokenizer`: 3 layers of width 128, and two projectors."""
    vocab_size = math.ceil(len(tokenizer) / 64) * 64
    text = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=digits.MAX_POSITIONS,
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    specs = assign_token_ids(
        parse_modalities(digits.MODALITIES), tokenizer.get_added_vocab(), len(tokenizer)
    )
    config = MultimodalQwen3Config(text, {name: spec.to_dict() for name, spec in specs.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultimodalQwen3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


class Batcher:
    """Writes digits as training batches of three kinds: prompts, questions, conversations."""

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerFast,
        specs: dict[str, ModalitySpec],
        seed: int,
    ) -> None:
        self.samples = samples
        self.tokenizer = tokenizer
        self.specs = specs
        self.rng = np.random.default_rng(seed)
        self.order: list[int] = []

    def draw(self, step: int) -> dict[str, Any]:
        """The batch of one step, as keyword arguments of the model's `forward`."""
        kind = ("prompt", "question", "prompt", "conversation")[step % 4]
        turns = 2 if kind == "conversation" else 1
        texts: list[str] = []
        groups: list[list[Sample]] = []
        for _ in range(BATCH_SIZE // turns):
            group = [self._next() for _ in range(turns)]
            groups.append(group)
            if kind == "prompt":
                texts.append(f"{digits.PROMPT} {group[0].label}{digits.END_OF_TURN}")
            else:
                texts.append(self._conversation(group))
        return self._collate(texts, groups)

    def _next(self) -> Sample:
        if not self.order:
            self.order = self.rng.permutation(len(self.samples)).tolist()
        return self.samples[self.order.pop()]

    def _conversation(self, group: Sequence[Sample]) -> str:
        messages = []
        for sample in group:
            # Servers and clients join the parts of a message in different ways.
            parts = [self.specs[name].token for name in self.rng.permutation(list(self.specs))]
            parts.insert(2 * self.rng.integers(2), str(self.rng.choice(digits.QUESTIONS)))
            content = str(self.rng.choice(["", " ", "\n"])).join(parts)
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": str(sample.label)})
        return self.tokenizer.apply_chat_template(messages, tokenize=False)

    def _collate(self, texts: list[str], groups: list[list[Sample]]) -> dict[str, Any]:
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in self.specs}
        sequences: list[torch.Tensor] = []
        for text, group in zip(texts, groups, strict=True):
            ids = self.tokenizer(text)["input_ids"]
            counts = {name: [len(s.items[name]) for s in group] for name in self.specs}
            sequences.append(torch.tensor(expand_markers(ids, self.specs, counts).token_ids))
            for name in self.specs:
                rows[name] += [s.items[name] for s in group]
        pad = self.tokenizer.pad_token_id
        input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad)
        embeddings = {name: torch.cat(parts) for name, parts in rows.items()}
        for name, packed in embeddings.items():
            noise = self.rng.standard_normal(packed.shape, dtype=np.float32)
            embeddings[name] = packed + NOISE * torch.from_numpy(noise)
        return {
            "input_ids": input_ids,
            "attention_mask": (input_ids != pad).long(),
            "labels": self._labels(input_ids),
            "embeddings": embeddings,
        }

    def _labels(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Only answers are learnt: each end of turn that follows a digit, and the digit."""
        end = self.tokenizer.convert_tokens_to_ids(digits.END_OF_TURN)
        is_answer = torch.zeros_like(input_ids, dtype=torch.bool)
        is_answer[:, :-1] = torch.isin(input_ids[:, :-1], self.answer_ids) & (
            input_ids[:, 1:] == end
        )
        learnt = is_answer | torch.roll(is_answer, 1, dims=1)
        return torch.where(learnt, input_ids, -100)

    @property
    def answer_ids(self) -> torch.Tensor:
        words = [f"{space}{n}" for space in ("", " ") for n in range(10)]
        return torch.tensor([self.tokenizer(word)["input_ids"][0] for word in words])


def train(
    output: str | os.PathLike[str],
    *,
    steps: int = 300,
    seed: int = 0,
    console: Console | None = None,
) -> TrainResult:
    """Train on 1437 digits, read the 360 others, and save a composite checkpoint.

    Takes 22 s on one idle core, 36 to 64 s where other processes keep two cores busy.

    Args:
        output: folder to write; made if it is not there.
        steps: batches of 32 digits.
        seed: of the weights, the split and the order.
        console: where the progress bar goes; none is shown without one.

    Raises:
        OSError: the folder cannot be written.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    train_samples, test_samples = digits.load(seed)
    tokenizer = digits.make_tokenizer()
    model = make_model(tokenizer, seed)
    batcher = Batcher(train_samples, tokenizer, model.specs, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _learning_rate(at, steps))

    losses: list[float] = []
    model.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, MAX_THREADS))
    begin = time.perf_counter()
    try:
        with _progress(console) as progress:
            task = progress.add_task("training", total=steps, loss=float("nan"), accuracy=0.0)
            for step in range(steps):
                batch = batcher.draw(step)
                outputs = model(**batch, use_cache=False)
                outputs.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                losses.append(outputs.loss.item())
                accuracy = _token_accuracy(outputs.logits.detach(), batch["labels"])
                progress.update(task, advance=1, loss=losses[-1], accuracy=accuracy)
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - begin
    model.eval()
    accuracy = answer(model, tokenizer, test_samples).accuracy
    save(model, tokenizer, output)
    parameters = sum(p.numel() for p in model.parameters())
    return TrainResult(output, accuracy, seconds, steps, losses, parameters)


@torch.inference_mode()
def answer(
    model: MultimodalQwen3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Sample],
) -> Answers:
    """Read digits with the transformers model, in one padded batch."""
    from mmqwen.hf import MultimodalQwen3Processor

    processor = MultimodalQwen3Processor(tokenizer, model.config.modalities)
    batch = processor([sample.prompt for sample in samples]).to(model.device)
    logits = model(**batch, logits_to_keep=1, use_cache=False).logits[:, -1]
    logprobs = logits.float().log_softmax(-1).cpu()
    token_ids = logprobs.argmax(-1)
    expected = torch.tensor([tokenizer(f" {s.label}")["input_ids"][0] for s in samples])
    return Answers(token_ids, logprobs, token_ids == expected)


def save(
    model: MultimodalQwen3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
) -> None:
    """Write everything that `LLM(model=output)` and `from_pretrained(output)` read.

    The layout is that of `mmqwen build`: the text model's weights, the projectors in a file of
    their own, and an index that joins the two.
    """
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    text = {
        name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if not name.startswith("projectors.")
    }
    save_file(text, output / TEXT_FILE, metadata={"format": "pt"})
    save_projectors(model, output / PROJECTOR_FILE)
    weight_map = {
        name: PROJECTOR_FILE if name.startswith("projectors.") else TEXT_FILE
        for name, _ in model.named_parameters()
    }
    size = sum((output / file).stat().st_size for file in (TEXT_FILE, PROJECTOR_FILE))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (output / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _learning_rate(step: int, steps: int) -> float:
    """Share of the peak: linear up over the first steps, then half a cosine down to 1%."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    done = min(1.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def _token_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the learnt tokens that are the most probable ones."""
    learnt = labels[:, 1:] != -100
    guessed = logits[:, :-1][learnt].argmax(-1)
    return (guessed == labels[:, 1:][learnt]).float().mean().item()


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  accuracy {task.fields[accuracy]:.0%}"),
        TimeElapsedColumn(),
        console=console,
        disable=console is None,
    )
