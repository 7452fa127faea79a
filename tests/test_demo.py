"""The demo's parts: data, tokenizer, training, comparison. `make demo` runs the whole of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from mmqwen.checkpoint import load_projectors, read_config
from mmqwen.data import RowsDataset, encode
from mmqwen.data.encoding import IGNORED
from mmqwen.demo import digits
from mmqwen.demo.run import Agreement, Served, compare, draw, judge, run
from mmqwen.demo.train import Answers, answer, train, write_dataset
from mmqwen.modalities import assign_token_ids, parse_modalities
from mmqwen.transport import check_items


@pytest.fixture(scope="module")
def data():
    return digits.load(seed=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a few steps' training."""
    return train(tmp_path_factory.mktemp("demo"), steps=30, seed=0)


# -- data --------------------------------------------------------------------------------------


def test_digits_are_ragged_items_of_two_widths(data):
    train_samples, test_samples = data
    assert (len(train_samples), len(test_samples)) == (1437, 360)
    specs = parse_modalities(digits.MODALITIES)
    rows = {name: set() for name in specs}
    for sample in train_samples + test_samples:
        items = check_items(sample.prompt["multi_modal_data"], specs, dtype=torch.float32)
        for name, (item,) in items.items():
            rows[name].add(len(item))
    assert rows == {"strokes": {2, 3, 4, 5, 6, 7, 8}, "profile": {2}}
    assert specs["strokes"].dim != specs["profile"].dim
    spread = torch.cat([s.items["strokes"] for s in train_samples]).std().item()
    assert 0.5 < spread < 2


def test_split_is_disjoint_balanced_and_repeatable(data):
    seen = {sample.image.tobytes() for sample in data[0]}
    assert not any(sample.image.tobytes() in seen for sample in data[1])
    assert min(np.bincount([s.label for s in data[1]], minlength=10)) >= 20
    again = digits.load(seed=0)[1]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(again, data[1], strict=True))
    other = digits.load(seed=1)[1]
    assert not all(np.array_equal(a.image, b.image) for a, b in zip(other, data[1], strict=True))


def test_the_image_can_be_read_back_from_its_strokes(data):
    sample = data[0][0]
    image = np.zeros((8, 8), np.float32)
    for row in sample.items["strokes"].numpy():
        image[:, row[8:].argmax()] = (row[:8] + 0.5) / 2
    assert np.allclose(image, sample.image)


def test_tokenizer_round_trips_any_text_and_spells_answers_as_one_token():
    tokenizer = digits.make_tokenizer()
    for text in ("Crème brûlée, 数字 7!\n", digits.PROMPT):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for n in range(10):
        assert len(tokenizer(f" {n}")["input_ids"]) == len(tokenizer(f"{n}")["input_ids"]) == 1
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": digits.QUESTION}], tokenize=False, add_generation_prompt=True
    )
    assert chat == f"<|im_start|>user\n{digits.QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def test_samples_learn_answers_only_and_are_of_three_kinds(data, tmp_path):
    write_dataset(tmp_path / "data", data[0][:45], 90, seed=0)
    tokenizer = digits.make_tokenizer()
    specs = parse_modalities(digits.MODALITIES)
    specs = assign_token_ids(specs, tokenizer.get_added_vocab(), len(tokenizer))
    dataset = RowsDataset(tmp_path / "data")
    kinds, answers, strokes = set(), "", []
    for example in map(dataset.__getitem__, range(len(dataset))):
        encoding = encode(example.sample, example.counts, tokenizer, specs)
        learnt = [token for token in encoding.labels if token != IGNORED]
        words = tokenizer.batch_decode([learnt[at : at + 2] for at in range(0, len(learnt), 2)])
        assert all(w.strip()[0].isdigit() and w.endswith(digits.END_OF_TURN) for w in words)
        assert len(words) == len(example.rows["strokes"]) == len(example.rows["profile"])
        kinds.add((bool(example.sample.messages), len(words)))
        answers += "".join(word.strip()[0] for word in words)
        strokes += example.rows["strokes"]
    assert kinds == {(False, 1), (True, 1), (True, 2)}
    labels = "".join(str(sample.label) for sample in data[0][:45])
    assert sorted(answers) == sorted(2 * labels)  # each digit once a round
    assert len({rows.numpy().tobytes() for rows in strokes}) == 90  # with noise of its own


# -- training ----------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss(trained):
    assert np.mean(trained.losses[-5:]) < 0.7 * np.mean(trained.losses[:5])
    assert trained.steps == len(trained.losses) == 30
    assert trained.parameters > 500_000


def test_checkpoint_has_the_composite_layout_and_loads(trained, data):
    from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    config = read_config(trained.output)
    assert {n: s.dim for n, s in config.modality_specs.items()} == {"strokes": 16, "profile": 10}
    projectors = load_projectors(trained.output, config.modality_specs, config.hidden_size)
    assert len(projectors) == 8
    index = json.loads((trained.output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        "base-model.safetensors",
        "projectors.safetensors",
    }
    model = AutoModelForCausalLM.from_pretrained(trained.output).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    again = answer(model, tokenizer, data[1]).accuracy
    assert abs(again - trained.accuracy) < 1.5 / len(data[1])  # a tie may fall the other way
    assert trained.accuracy > 0.2  # well above chance already

    processor = AutoProcessor.from_pretrained(trained.output)
    batch = processor(data[1][0].prompt)
    out = model.generate(**batch, max_new_tokens=2)
    assert out.shape[1] <= batch["input_ids"].shape[1] + 2


def test_training_is_repeatable_and_restores_the_number_of_threads(tmp_path):
    threads = torch.get_num_threads()
    first, second = (train(tmp_path / name, steps=3, seed=5) for name in "ab")
    assert np.allclose(first.losses, second.losses, atol=1e-4)
    assert torch.get_num_threads() == threads


# -- the comparison ----------------------------------------------------------------------------


def served(token_ids, logprobs):
    return Served([""] * len(token_ids), torch.tensor(token_ids), torch.tensor(logprobs), 0.0, 0.0)


def reference(rows):
    logprobs = torch.tensor(rows)
    return Answers(logprobs.argmax(-1), logprobs, torch.ones(len(rows), dtype=torch.bool))


def test_compare_counts_different_answers_but_not_ties():
    rows = [[-0.1, -2.0], [-0.7, -0.7002]]
    same = compare(reference(rows), served([0, 0], [-0.1, -0.7]), 1e-3)
    assert same.different == 0
    assert same.logprob_diff < 1e-6
    assert compare(reference(rows), served([0, 1], [-0.1, -0.7002]), 1e-3).different == 0
    assert compare(reference(rows), served([1, 0], [-2.0, -0.7]), 1e-3).different == 1
    off = compare(reference(rows), served([0, 0], [-0.2, -0.7]), 1e-3)
    assert off.logprob_diff == pytest.approx(0.1)
    assert compare(reference(rows), served([0, 0], [float("nan"), -0.7]), 1e-3).logprob_diff > 1


@pytest.mark.parametrize(
    ("accuracy", "agreement", "problems"),
    [
        (0.95, Agreement(1e-3, 0), 0),
        (0.949, Agreement(0.0, 0), 1),
        (float("nan"), Agreement(0.0, 0), 1),
        (0.99, Agreement(1.1e-3, 0), 1),
        (0.99, Agreement(float("inf"), 3), 2),
    ],
)
def test_judge(accuracy, agreement, problems):
    assert len(judge(accuracy, agreement, 1e-3)) == problems


def test_draw_writes_a_picture(data, tmp_path):
    pytest.importorskip("matplotlib")
    texts = [f" {sample.label}" for sample in data[1]]
    texts[40] = ""
    draw(data[1], texts, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_an_output_that_cannot_be_written_is_said_at_once(tmp_path, capsys):
    pytest.importorskip("vllm")
    file = tmp_path / "file"
    file.write_text("")
    assert run(Path(file) / "demo") == 1
    assert "cannot write to" in capsys.readouterr().out
