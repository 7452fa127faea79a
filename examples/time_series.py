"""Who says this vowel? A small model learns to read raw time series, and vLLM serves it.

    pip install --no-deps aeon      # for the data in it: its code is not imported
    python examples/time_series.py

JapaneseVowels (Kudo, Toyama and Shimbo 1999; UCI): utterances of nine speakers as 7 to 29 rows of
12 coefficients, 270 to train on and 370 to test. There is no encoder: an utterance is an item, its
rows as they are. A Qwen3 of two layers and its projector are trained together, from scratch.
"""

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mmqwen import build_checkpoint
from mmqwen.data import DatasetWriter
from mmqwen.evaluation import Report, evaluate
from mmqwen.training import TrainSettings, train

PROMPT = "Utterance <|vowel|> Speaker"
WORDS = ("<|end|>", "<|other|>", "Utterance", "Speaker", *"123456789")
KINDS = {"rows": "with rows", "shuffled": "rows shuffled", "none": "without rows"}
NOISE, COPIES = 0.3, 32  # the noise, in units of the rows' spread, is another for each copy


def read(file: Path) -> tuple[list[torch.Tensor], list[str]]:
    """The rows `[n, 12]` and the speaker of each line of a .ts file."""
    lines = [line.split(":") for line in file.read_text().partition("@data")[2].split()]
    rows = [[[float(v) for v in channel.split(",")] for channel in line[:-1]] for line in lines]
    return [torch.tensor(channels).T for channels in rows], [line[-1] for line in lines]


def make_base(path: Path) -> Path:
    """A random Qwen3, 128 wide, whose tokenizer knows the words that it needs."""
    vocabulary = {word: at for at, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|other|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|other|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.1}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = Qwen3Config(vocab_size=64, max_position_embeddings=64, **size, **heads, **ids)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def write(path: Path, utterances: list[torch.Tensor], names: list[str]) -> Path:
    """A dataset of utterances and who says them."""
    with DatasetWriter(path, {"vowel": 12}) as writer:
        for rows, name in zip(utterances, names, strict=True):
            writer.add(PROMPT, f" {name}", {"vowel": [rows]})
    return path


def run(data: Path, folder: Path, engine: Any) -> tuple[Report, list[int]]:
    """Train and serve; what is right, and the rows of each test utterance."""
    torch.manual_seed(0)
    known, names = read(data / "JapaneseVowels_TRAIN.ts")
    test, speakers = read(data / "JapaneseVowels_TEST.ts")
    std, mean = torch.std_mean(torch.cat(known), 0)
    noisy = [(rows - mean) / std + NOISE * torch.randn(rows.shape) for rows in known * COPIES]
    learnt = write(folder / "data", noisy, names * COPIES)
    start = build_checkpoint(make_base(folder / "base"), {"vowel": 12}, folder / "start")
    files = {"model": start, "data": learnt, "output": folder / "trained"}
    options: dict[str, Any] = {"stage": "full", "lr": 2e-3, "weight_decay": 0.1, "cpu": True}
    trained = train(TrainSettings(**files, **options, tokens_per_step=256))
    asked = write(folder / "test", [(rows - mean) / std for rows in test], speakers)
    return evaluate(trained, asked, engine=engine, dtype="float32"), [len(rows) for rows in test]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the .ts files; aeon's otherwise")
    parser.add_argument("--engine", default="vllm" if find_spec("vllm") else "transformers")
    arguments = parser.parse_args()
    aeon = find_spec("aeon")
    if arguments.data is None and aeon is None:
        parser.error("no data: pip install --no-deps aeon, or --data FOLDER")
    data = arguments.data or Path(aeon.origin).parent / "datasets/data/JapaneseVowels"
    with tempfile.TemporaryDirectory() as folder:
        report, lengths = run(data, Path(folder), arguments.engine)
    for control, kind in KINDS.items():
        print(f"{kind:16}{report.accuracy(control):6.1%}")
    for rows, one in list(zip(lengths, report.answers, strict=True))[::37]:
        said = one["given"]["rows"]
        print(f"{rows:2} rows of speaker {one['expected']}: the model says {said!r}")


if __name__ == "__main__":
    main()
