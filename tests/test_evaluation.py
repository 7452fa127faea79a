"""`mmqwen eval`: what is asked, what counts as right, and the controls."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch

from engines import TOLERANCE, reference
from mmqwen.cli import main
from mmqwen.data import DatasetError, DatasetWriter, RowsDataset, encode
from mmqwen.evaluation import CONTROLS, evaluate
from mmqwen.evaluation.controls import exchange
from mmqwen.evaluation.questions import read_questions
from mmqwen.pipeline import MultimodalQwen3Pipeline
from tiny import make_composite

WIDTHS = {"m1": 24, "m2": 40}
WORDS = (" river", " coast", " bridge", " engine")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("evaluation") / "model", WIDTHS)


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
    return MultimodalQwen3Pipeline(checkpoint, engine="transformers", **options)


def rows(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Prompts and conversations, with rows of one modality or two (of ragged counts), or none."""
    path = tmp_path_factory.mktemp("evaluation") / "data"
    with DatasetWriter(path, WIDTHS) as writer:
        for at in range(6):
            item = rows(at, 1 + at % 3, 24)
            writer.add("see <|m1|> it is", WORDS[at % 4], {"m1": [item]}, choices=WORDS)
        writer.add("", WORDS[0], {"m1": [rows(7, 24)]}, choices=WORDS)
        for at in range(3):
            two = {"m1": [rows(10 + at, 24)], "m2": [rows(20 + at, 2 + at, 40)]}
            writer.add("look <|m2|> and <|m1|>", WORDS[at], two, choices=WORDS)
        for at in range(3):
            turns = [
                {"role": "user", "content": "first <|m2|>"},
                {"role": "assistant", "content": "a train"},
                {"role": "user", "content": "then <|m1|>"},
                {"role": "assistant", "content": WORDS[at].strip()},
            ]
            items = {"m1": [rows(30 + at, 2, 24)], "m2": [rows(40 + at, 40)]}
            writer.add_messages(turns, items, choices=[w.strip() for w in WORDS])
        writer.add("the lazy", WORDS[1], choices=WORDS)
    return path


def questions_of(pipeline, data, choices=None):
    dataset = RowsDataset(data)
    numbers = range(len(dataset))
    return read_questions(dataset, numbers, pipeline.tokenizer, pipeline.specs, choices)


def test_every_answer_is_asked_for_after_what_training_sees_before_it(pipeline, data):
    questions = questions_of(pipeline, data)
    assert len(questions) == 14 + 3  # a conversation has two
    dataset = RowsDataset(data)
    for question in questions:
        example = dataset[question.sample]
        encoding = encode(example.sample, example.counts, pipeline.tokenizer, pipeline.specs)
        items = {}
        for name, index in question.items:
            items.setdefault(name, []).append(example.rows[name][index])
        ready = pipeline._checker.prepare(
            pipeline._read_any({"prompt_token_ids": question.prompt, "multi_modal_data": items})
        )
        ids = ready.prompt[0] + question.answer
        assert encoding.token_ids[: len(ids)] == ids  # rows expanded, and the answer
        assert encoding.labels[len(ids) - len(question.answer) : len(ids)] == question.answer
    first, second = [q for q in questions if q.sample == 10]
    assert first.items == [("m2", 0)]
    assert second.items == [("m2", 0), ("m1", 0)]
    assert (first.expected, second.expected) == ("a train", "river")


@torch.no_grad()
def test_perplexity_is_that_of_the_tokens_that_training_learns(checkpoint, pipeline, data):
    report = evaluate(pipeline, data, controls=["rows"])
    model, total, count = reference(str(checkpoint)), 0.0, 0
    for example in (RowsDataset(data)[at] for at in range(14)):
        encoding = encode(example.sample, example.counts, pipeline.tokenizer, pipeline.specs)
        ids, labels = torch.tensor([encoding.token_ids]), torch.tensor(encoding.labels)[1:]
        # As served: placeholders, which training's loss counts among the words, are none.
        logits = model(ids, embeddings=example.rows).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    figures = report.figures["all"]["rows"]
    assert figures.tokens == count
    assert math.log(figures.perplexity) == pytest.approx(total / count, abs=TOLERANCE)


def test_scopes_change_the_rows_of_their_modality_alone(pipeline, data):
    report = evaluate(pipeline, data)
    assert list(report.figures) == ["all", "m1", "m2"]
    assert {s: f["rows"].answers for s, f in report.figures.items()} == {
        "all": 17,
        "m1": 7 + 3 + 3,
        "m2": 3 + 6,
    }
    for found in report.figures.values():
        assert list(found) == list(CONTROLS)
        values = {round(found[control].logprob, 6) for control in CONTROLS}
        assert len(values) == 3  # each control is another prompt
    again = evaluate(pipeline, data)
    assert again.to_dict() == report.to_dict()
    other = evaluate(pipeline, data, seed=1, controls=["shuffled", "rows"])
    assert list(other.figures["m1"]) == ["rows", "shuffled"]
    assert other.figures["m1"]["rows"].logprob == pytest.approx(
        report.figures["m1"]["rows"].logprob, abs=1e-3
    )
    assert other.figures["all"]["shuffled"].logprob != report.figures["all"]["shuffled"].logprob


def test_a_text_counts_as_right_where_it_is_the_expected_one(pipeline, tmp_path):
    with DatasetWriter(tmp_path / "data", WIDTHS) as writer:
        for at in range(3):
            item = rows(at, 24)
            prompt = {"prompt": "see <|m1|>", "multi_modal_data": {"m1": [item]}}
            said = pipeline.generate(prompt, max_tokens=3)
            writer.add("see <|m1|>", said if at else "quite another", {"m1": [item]})
    report = evaluate(pipeline, tmp_path / "data", controls=["rows"], max_tokens=3)
    assert report.accuracy() == pytest.approx(2 / 3)
    assert [a["given"]["rows"] == a["expected"] for a in report.answers] == [False, True, True]
    assert evaluate(pipeline, tmp_path / "data", max_tokens=1, controls=["rows"]).accuracy() == 0


def test_the_most_probable_choice_is_taken(pipeline, data):
    report = evaluate(pipeline, data, choices="dataset", controls=["rows"])
    questions = questions_of(pipeline, data, "dataset")
    assert len(questions) == 14  # the last answers
    assert report.figures["all"]["rows"].answers == 14
    dataset = RowsDataset(data)
    right = 0
    for question, answer in zip(questions, report.answers, strict=True):
        items = dataset[question.sample].rows
        prompt = {"prompt_token_ids": question.prompt, "multi_modal_data": items}
        scores = [s.logprob for s in pipeline.score(prompt, question.continuations)]
        best = question.choices[scores.index(max(scores))].strip()
        assert answer["given"]["rows"] == best
        right += best == question.expected.strip()
    assert report.figures["all"]["rows"].right == right
    named = evaluate(pipeline, data, choices=[w.strip() for w in WORDS], controls=["rows"])
    assert named.figures == report.figures
    assert evaluate(pipeline, data, choices=WORDS, per_token=True, controls=["rows"]).answers


@pytest.mark.parametrize("seed", range(20))
def test_shuffling_leaves_nobody_what_it_had(seed):
    draw = random.Random(seed)
    owned, number = [], 0
    for count in (*(draw.choice([0, 1, 1, 2, 3]) for _ in range(draw.randint(0, 40))), 3, 3):
        owned.append(list(range(number, number + count)))
        number += count
    given, kept = exchange(owned, seed)
    assert kept == 0
    assert [len(items) for items in given] == [len(items) for items in owned]
    assert sorted(chain(*given)) == list(range(number))
    assert not any(set(a) & set(b) for a, b in zip(owned, given, strict=True))
    assert exchange(owned, seed) == (given, kept)


def test_shuffling_of_items_that_samples_share():
    owned = [[at % 3] for at in range(12)]
    given, kept = exchange(owned, 0)
    assert kept == 0
    assert all(a != b for a, b in zip(owned, given, strict=True))
    assert Counter(chain(*given)) == Counter(chain(*owned))
    given, kept = exchange([[0], [0], [0], [1]], 0)  # two of three zeros must meet a zero
    assert kept == 2
    with pytest.raises(ValueError, match="one sample has 3 of all 4 items"):
        exchange([[1, 2, 3], [4]], 0)


def test_ragged_rows_bring_their_own_placeholders(pipeline, data):
    """Shuffled items of other lengths are what the engine is given: it would refuse a mismatch."""
    report = evaluate(pipeline, data, controls=["shuffled"], limit=9, seed=3)
    assert report.about["samples"] == 9
    assert report.figures["all"]["shuffled"].answers >= 9


def wrong(path, **fields):
    """A dataset of two lines, the second of which has these fields."""
    with DatasetWriter(path, WIDTHS) as writer:
        for at in range(2):
            more = fields if at else {"choices": ["a", "b"]}
            writer.add("see <|m1|>", " a", {"m1": [rows(at, 24)]}, **more)
    return path


@pytest.mark.parametrize(
    ("fields", "arguments", "words"),
    [
        ({}, {"choices": "dataset"}, r"data.jsonl:2: there is no field 'choices'"),
        ({}, {"choices": ["b", "c"]}, r"data.jsonl:1: the answer 'a' is not among"),
        ({"choices": ["b", "c"]}, {"choices": "dataset"}, r"jsonl:2: the answer 'a' is not among"),
        ({}, {"choices": ["a"]}, "at least two"),
        ({}, {"choices": ["a", " a"]}, "that differ"),
        ({}, {"controls": ["row"]}, "expected some of"),
        ({}, {"controls": []}, "expected some of"),
        ({}, {"limit": 0}, "limit is 0"),
        ({}, {"limit": 1}, r"rows of 'm1' cannot be shuffled: one sample has 1 of all 1"),
    ],
)
def test_what_cannot_be_asked(pipeline, tmp_path, fields, arguments, words):
    data = wrong(tmp_path / "data", **fields)
    with pytest.raises(ValueError, match=words):
        evaluate(pipeline, data, **arguments)


def test_bad_data_and_models_are_refused_before_an_engine_starts(
    checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(MultimodalQwen3Pipeline, "__init__", None)  # which starts the engine
    base = checkpoint.with_name(checkpoint.name + "-base")
    data = wrong(tmp_path / "data")
    figures = tmp_path / "figures.json"
    for arguments, words in [
        ([str(checkpoint), str(tmp_path / "none")], "no dataset"),
        ([str(tmp_path / "none"), str(data)], "none"),
        ([str(base), str(data)], "expected 'multimodal_qwen3'"),
        ([str(checkpoint), str(data), "--choices", "dataset"], "data.jsonl:2"),
        ([str(checkpoint), str(data), "--option", "eager"], "expected NAME=VALUE"),
        ([str(checkpoint), str(data), "--json", str(tmp_path / "no" / "f.json")], "no folder"),
    ]:
        if "--json" not in arguments:
            arguments = [*arguments, "--json", str(figures)]
        assert main(["eval", *arguments, "--engine", "transformers"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
        assert not figures.exists()


def test_a_prompt_that_is_too_long_is_named(pipeline, tmp_path):
    with DatasetWriter(tmp_path / "data", WIDTHS) as writer:
        for at, count in enumerate((3, 254, 3)):
            writer.add("see <|m1|>", " a", {"m1": [rows(at, count, 24)]})
    with pytest.raises(DatasetError, match=r"data.jsonl:2: .*expected fewer than 256"):
        evaluate(pipeline, tmp_path / "data", controls=["rows"])
    with pytest.raises(DatasetError, match=r"data.jsonl:\d, shuffled: "):
        evaluate(pipeline, tmp_path / "data", controls=["shuffled"])


def test_the_command_prints_a_table_and_writes_json(checkpoint, data, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    flags = ["--engine", "transformers", "--device", "cpu", "--dtype", "float32", "--no-progress"]
    more = ["--choices", "dataset", "--json", str(figures), "--option", "max_model_len=256"]
    assert main(["eval", str(checkpoint), str(data), *flags, *more]) == 0
    printed = capsys.readouterr().out
    for words in ("with rows", "rows shuffled", "without rows", "with m1", "with m2", "%"):
        assert words in printed
    found = json.loads(figures.read_text())
    assert found["engine"] == "transformers"
    assert found["figures"]["all"]["rows"]["answers"] == 14
    assert len(found["answers"]) == 14
    assert set(found["answers"][0]["given"]) == set(CONTROLS)


PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL))


def test_the_pages_snippets_run_as_printed(pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with DatasetWriter(tmp_path / "data", WIDTHS) as writer:
        for at in range(4):
            answer = (" cat", " dog")[at % 2]
            writer.add("The photo <|m1|> shows a", answer, {"m1": [rows(at, 24)]})
    assert set(SNIPPETS) == {"evaluate", "score", "http"}  # the last: tests/test_server.py
    names = {"pipeline": pipeline, "rows": rows(0, 24)}
    for name in ("evaluate", "score"):
        exec(compile(SNIPPETS[name], "evaluation.md", "exec"), names)
    assert len(names["wrong"]) == round(4 * (1 - names["report"].accuracy()))
    assert names["best"] in names["scores"]
    assert [len(found) for found in names["many"]] == [2, 1]
    assert len(names["full"]) == 3
    assert capsys.readouterr().out


def test_both_engines_find_the_same(checkpoint, pipeline, data):
    pytest.importorskip("vllm")
    options = {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 128}
    with MultimodalQwen3Pipeline(
        checkpoint, dtype="float32", max_model_len=256, **options
    ) as by_vllm:
        for choices in (None, "dataset"):
            one, other = (evaluate(p, data, choices=choices) for p in (by_vllm, pipeline))
            if choices is not None:  # a random model's text holds bytes of unfinished characters
                assert [a["given"] for a in one.answers] == [a["given"] for a in other.answers]
            for scope, found in one.figures.items():
                for control, figures in found.items():
                    twin = other.figures[scope][control]
                    assert figures.right == twin.right
                    assert figures.logprob / figures.tokens == pytest.approx(
                        twin.logprob / twin.tokens, abs=TOLERANCE
                    )
