"""The examples that train run small: one on data of its own making, as the package ships them."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from zlib import crc32

import pytest
import torch

from tiny import make_base

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
HEADER = "# of UCI\n@problemName JapaneseVowels\n@dimensions 12\n@classLabel true 1 2 3\n@data\n"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_utterances(file: Path, of_each: int, seed: int) -> None:
    """Utterances of nine speakers, in the form of UEA's archive; each speaker has a level."""
    g = torch.Generator().manual_seed(seed)
    levels = 3 * torch.randn(9, 12, generator=torch.Generator().manual_seed(9))
    lines = []
    for at in range(9 * of_each):
        length = 7 + int(torch.randint(23, (), generator=g))
        rows = levels[at % 9] + 0.3 * torch.randn(length, 12, generator=g)
        channels = [",".join(f"{v:.6f}" for v in channel) for channel in rows.T.tolist()]
        lines.append(":".join([*channels, str(at % 9 + 1)]))
    file.write_text(HEADER + "\n".join(lines) + "\n")


def test_utterances_are_read_row_by_row(tmp_path):
    file = tmp_path / "x.ts"
    channels = [f"{c}.25,{c}.5" if c < 11 else "-1,1e-3" for c in range(12)]
    file.write_text(HEADER + ":".join([*channels, "7"]) + "\n" + ":".join(["2"] * 12 + ["8"]))
    (two, one), names = load("time_series").read(file)
    assert names == ["7", "8"]
    assert two.shape == (2, 12)
    assert two[0].tolist() == [c + 0.25 for c in range(11)] + [-1.0]
    assert one.tolist() == [[2.0] * 12]


def test_time_series_from_files_to_answers(tmp_path, monkeypatch, capsys):
    for part, of_each, seed in (("TRAIN", 6, 0), ("TEST", 8, 1)):
        write_utterances(tmp_path / f"JapaneseVowels_{part}.ts", of_each, seed)
    module = load("time_series")
    monkeypatch.setattr(module, "COPIES", 12)  # these speakers are far apart
    monkeypatch.setattr(
        sys, "argv", ["time_series.py", "--data", str(tmp_path), "--engine", "transformers"]
    )
    module.main()
    out = capsys.readouterr().out
    shares = dict(re.findall(r"^(with\w* rows|rows shuffled) +([\d.]+)%$", out, re.MULTILINE))
    assert float(shares["with rows"]) > 90
    assert float(shares["rows shuffled"]) < 50  # 11% is chance
    assert float(shares["without rows"]) < 50
    assert re.search(r"^ ?\d+ rows of speaker (\d): the model says '\1'$", out, re.MULTILINE)


@pytest.fixture
def training_example(monkeypatch):
    """The example with an encoder that is no model: rows by a sentence's words."""
    module = load("training_example")

    def row(sentence: str) -> torch.Tensor:
        words = sentence.strip(".").split()
        seeds = (torch.Generator().manual_seed(crc32(word.encode())) for word in words)
        return sum(torch.randn(module.WIDTH, generator=g) for g in seeds) / len(words) ** 0.5

    monkeypatch.setattr(module, "encode", lambda sentences: torch.stack([*map(row, sentences)]))
    monkeypatch.setattr(module, "PACKAGES", ("torch", "transformers"))
    return module


def test_training_example_on_a_base_that_chats(training_example, monkeypatch, tmp_path):
    words = ["river", "coast", "bridge", "engine", "sensor", "picture"]  # to train on
    words += ["item", "user", "recording", "train"]
    monkeypatch.setattr(training_example, "draw_words", lambda count, _: words[:count])
    # A random model that is frozen has no words to say: its weights are trained, too.
    report = training_example.run_base(
        tmp_path,
        make_base(tmp_path / "base"),
        words=10,
        asked=4,
        engine="transformers",
        stage="full",
        lr=3e-3,
        tokens_per_step=512,
        epochs=30,
        progress=False,
    )
    shares = report["accuracy"]
    assert shares["known words, with rows"] >= 0.75
    assert shares["known words, rows of other sentences"] <= 0.25
    assert shares["known words, without rows"] <= 0.25  # one answer to all
    assert shares["new words, with rows"] == 0  # which it has never said

    lines = (tmp_path / "rows" / "data.jsonl").read_text().splitlines()
    answers = [json.loads(line)["messages"][1]["content"] for line in lines]
    assert sorted(answers) == sorted(words[:6] * 6)  # of eight sentences, two are held out


def write_films(folder: Path) -> None:
    """Sixty users of four tastes, fifteen films of each, in the form of RecBole's ml-100k."""
    g = torch.Generator().manual_seed(0)
    films = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    films += [f"{film}\tThe Film {film}\t1990\tKind{film % 4}" for film in range(1, 61)]
    ratings = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(1, 61):
        liked = torch.randperm(15, generator=g)[:11].tolist()
        for when, film in enumerate(liked):
            ratings.append(f"{user}\t{4 * film + user % 4 + 1}\t5\t{when}")
        ratings.append(f"{user}\t{(user + 1) % 4 + 1}\t1\t99")  # disliked: no part of a history
    (folder / "ml-100k.item").write_text("\n".join(films) + "\n")
    (folder / "ml-100k.inter").write_text("\n".join(ratings) + "\n")


def test_recommender_from_files_to_a_table(tmp_path, monkeypatch, capsys):
    write_films(tmp_path)
    module = load("recommender")
    films = module.Films(tmp_path, small=True)
    assert (len(films.titles), films.genres.shape, len(films.likes)) == (60, (60, 4), 60)
    assert all(len({film % 4 for film in likes}) == 1 for likes in films.likes)
    assert all(len(likes) == 11 and len(rated) == 12
               for likes, rated in zip(films.likes, films.rated, strict=True))  # fmt: skip
    monkeypatch.setattr(module, "EPOCHS", 30.0)
    flags = ["--data", str(tmp_path), "--engine", "transformers", "--small"]
    monkeypatch.setattr(sys, "argv", ["recommender.py", *flags])
    module.main()
    out = capsys.readouterr().out
    table = dict(re.findall(r"^(\S.*?) {2,}[\d.]+% +([\d.]+)%", out, re.MULTILINE))  # hit@5
    assert float(table["model"]) > 80  # 20 candidates have some two of a user's taste
    assert float(table["model, others' ids"]) < 40  # neighbours have other tastes
    assert float(table["chance"]) == 25.0
    assert float(table["popularity"]) < 60
