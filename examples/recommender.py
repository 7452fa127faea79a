"""What will they like next? Films lie in a bank, a user is a list of ids, vLLM ranks candidates.

    pip install --no-deps recbole      # for the data in it: its code is not imported
    python examples/recommender.py

MovieLens 100K (Harper and Konstan 2015; GroupLens' licence: research, no redistribution, no
commercial use). A film's row in the bank: factors of who liked it (an SVD of the training likes)
and its genres. A prompt names the last films that a user liked, "Liked <|film|> next": one item, of
several ids. Answers are titles, each a token, so that `score` reads all candidates after one run of
the prompt. A Qwen3 of one layer and its projector are trained together, from scratch.

Asked is for the last film that each user liked, among 19 that the user did not rate, drawn as often
as films are liked: being popular helps nobody.
"""

import argparse
import os
import tempfile
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from mmqwen import MultimodalQwen3Pipeline, build_checkpoint
from mmqwen.banks import BankRows, build_bank
from mmqwen.data import DatasetWriter
from mmqwen.training import TrainSettings, train

PROMPT = "Liked <|film|> next"
FACTORS, HISTORY, CANDIDATES = 32, 20, 20
LIKED, FANS = 4.0, 20  # stars that count as a like, and likes that a film needs to take part
EPOCHS, SMALL_USERS, SMALL_FANS = 2.0, 100, 3
SPECIAL = ("<|end|>", "<|other|>", "Liked", "next")


class Films:
    """Titles, genres `[films, kinds]`, each user's likes in order of time, and all rated."""

    def __init__(self, folder: Path, small: bool = False) -> None:
        lines = (folder / "ml-100k.inter").read_text().splitlines()[1:]
        ratings = [line.split("\t") for line in lines]
        if small:
            ratings = [rating for rating in ratings if int(rating[0]) <= SMALL_USERS]
        fans = Counter(film for _, film, stars, _ in ratings if float(stars) >= LIKED)
        about = [line.split("\t") for line in (folder / "ml-100k.item").read_text().splitlines()]
        kept = [line for line in about[1:] if fans[line[0]] >= (SMALL_FANS if small else FANS)]
        number = {line[0]: at for at, line in enumerate(kept)}
        kinds = sorted({kind for line in kept for kind in line[3].split()})
        self.titles = [f"{'_'.join(n.split())}_({y})#{i}" for i, n, y, _ in kept]
        self.genres = np.array([[kind in line[3].split() for kind in kinds] for line in kept], "f4")
        self.likes: list[list[int]] = []
        self.rated: list[set[int]] = []
        by_user: dict[str, list[tuple[float, int, float]]] = {}
        for user, film, stars, when in ratings:
            if film in number:
                entry = (float(when), number[film], float(stars))
                by_user.setdefault(user, []).append(entry)
        for _, entries in sorted(by_user.items()):
            likes = [film for _, film, stars in sorted(entries) if stars >= LIKED]
            if len(likes) > 5:
                self.likes.append(likes)
                self.rated.append({film for _, film, _ in entries})


def make_rows(films: Films) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all films, their factors first; and how often each is liked. The last likes, which
    are asked for, have no part in them."""
    liked = np.zeros((len(films.likes), len(films.titles)), "f4")
    for user, likes in enumerate(films.likes):
        liked[user, likes[:-1]] = 1
    popularity = liked.sum(0)
    weighted = liked / np.sqrt(liked.sum(1, keepdims=True) * np.maximum(popularity, 1))
    _, strength, right = np.linalg.svd(weighted, full_matrices=False)
    factors = (right.T * strength)[:, 1 : FACTORS + 1]  # the first one is how often each is liked
    rows = np.concatenate([factors / factors.std(), films.genres], 1)
    return rows.astype("f4"), popularity


def make_base(path: Path, titles: list[str]) -> Path:
    """A random Qwen3, 64 wide, to whose tokenizer each title is a word."""
    vocabulary = {word: at for at, word in enumerate((*SPECIAL, *titles))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|other|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<|other|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    size = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    words = -(-(len(vocabulary) + 8) // 64) * 64
    config = Qwen3Config(vocab_size=words, max_position_embeddings=64, **size, **heads, **ids)
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def write(path: Path, films: Films, width: int) -> Path:
    """A sample for each like but a user's last: the likes before it, by their ids, no row."""
    with DatasetWriter(path, {"film": width}) as writer:
        for likes in films.likes:
            for at in range(2, len(likes) - 1):
                before = BankRows("films", likes[max(0, at - HISTORY) : at])
                writer.add(PROMPT, f" {films.titles[likes[at]]}", {"film": [before]})
    return path


def draw_candidates(films: Films, popularity: np.ndarray, seed: int = 0) -> list[list[int]]:
    """For each user the film that is asked for, and others, which the user did not rate."""
    rng = np.random.default_rng(seed)
    found = []
    for likes, rated in zip(films.likes, films.rated, strict=True):
        share = popularity.copy()
        share[list(rated)] = 0
        others = rng.choice(len(share), CANDIDATES - 1, replace=False, p=share / share.sum())
        found.append([likes[-1], *others.tolist()])
    return found


def figures(scores: list[np.ndarray]) -> tuple[float, float, float]:
    """Hit rate at 1 and at 5, mean reciprocal rank, of what stands first; a tie counts half."""
    ranks = np.array([1 + (s[1:] > s[0]).sum() + (s[1:] == s[0]).sum() / 2 for s in scores])
    return float((ranks <= 1).mean()), float((ranks <= 5).mean()), float((1 / ranks).mean())


def run(data: Path, folder: Path, engine: Any, small: bool) -> dict[str, tuple[float, ...]]:
    """Build the bank, train, serve and rank; the figures of each way to do so."""
    films = Films(data, small)
    rows, popularity = make_rows(films)
    np.save(folder / "rows.npy", rows)
    (folder / "titles").write_text("\n".join(films.titles))
    bank = build_bank(
        folder / "rows.npy", folder / "films.bank", modality="film", keys=folder / "titles"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the projector is untrained, for now
        start = build_checkpoint(
            make_base(folder / "base", films.titles),
            {"film": {"dim": rows.shape[1], "max_rows": HISTORY}},
            folder / "start",
            banks={"films": bank.file},  # so that training and serving know it
        )
    learnt = write(folder / "data", films, rows.shape[1])
    files = {"model": start, "data": learnt, "output": folder / "trained"}
    options: dict[str, Any] = {"stage": "full", "lr": 3e-3, "weight_decay": 0.1, "cpu": True}
    trained = train(TrainSettings(**files, **options, tokens_per_step=1024, epochs=EPOCHS))

    asked = draw_candidates(films, popularity)
    histories = [likes[-1 - HISTORY : -1] for likes in films.likes]
    others = histories[1:] + histories[:1]
    texts = [[f" {films.titles[film]}" for film in group] for group in asked]
    found: dict[str, tuple[float, ...]] = {}
    with MultimodalQwen3Pipeline(trained, engine=engine, dtype="float32") as pipeline:
        for name, ids in {"model": histories, "model, others' ids": others}.items():
            prompts = [
                {"prompt": PROMPT, "multi_modal_data": {"film": [BankRows("films", one)]}}
                for one in ids
            ]
            scores = pipeline.score(prompts, texts)  # each prompt runs once for its 20 titles
            found[name] = figures([np.array([s.logprob for s in group]) for group in scores])
    factors = rows[:, :FACTORS]
    unit = factors / np.linalg.norm(factors, axis=1, keepdims=True)
    pairs = list(zip(asked, histories, strict=True))
    found["factors, mean of history"] = figures([unit[a] @ unit[h].mean(0) for a, h in pairs])
    found["popularity"] = figures([popularity[a] for a, _ in pairs])
    at_random = np.arange(CANDIDATES, 0, -1)
    found["chance"] = figures([np.roll(at_random, place) for place in range(CANDIDATES)])
    return found


def main() -> None:
    """Run in a temporary folder, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, help="folder of the ml-100k files; recbole's otherwise"
    )
    parser.add_argument("--engine", default="vllm" if find_spec("vllm") else "transformers")
    parser.add_argument("--small", action="store_true", help="a hundred users: a try, no figures")
    arguments = parser.parse_args()
    recbole = find_spec("recbole")
    if arguments.data is None and recbole is None:
        parser.error("no data: pip install --no-deps recbole, or --data FOLDER")
    data = arguments.data or Path(recbole.origin).parent / "dataset_example/ml-100k"
    with tempfile.TemporaryDirectory() as folder:
        found = run(data, Path(folder), arguments.engine, arguments.small)
    print(f"{'':26}  hit@1   hit@5    MRR")
    for name, (first, fifth, rank) in found.items():
        print(f"{name:26} {first:6.1%}  {fifth:6.1%}  {rank:5.3f}")


if __name__ == "__main__":
    main()
