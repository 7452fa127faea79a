"""`mmqwen generate` and `mmqwen data`: what is typed, what is printed, and what is refused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmqwen.cli import main
from mmqwen.commands.options import messages_of, read_options
from mmqwen.data import RowsDataset
from mmqwen.modalities import ModalityError, parse_modalities
from mmqwen.pipeline import MultimodalQwen3Pipeline
from tiny import make_composite

FLAGS = ["--engine", "transformers", "--device", "cpu", "--dtype", "float32", "--max-tokens", "5"]
SPECS = parse_modalities({"m1": 24, "m2": 40})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("commands") / "model")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    generator = torch.Generator().manual_seed(0)
    one, two, three = (torch.randn(n, 24, generator=generator) for n in (1, 2, 3))
    np.save(folder / "one.npy", one[0].numpy())
    save_file({"rows": two}, folder / "two.safetensors")
    save_file({"a": three, "b": two.bfloat16()}, folder / "three.safetensors")
    (folder / "bad.npy").write_bytes(b"no array")
    (folder / "rows.txt").write_text("1 2 3")
    return folder, {"one": one[0], "two": two, "three": three}


def test_generate_with_rows_from_files(checkpoint, files, capsys, monkeypatch):
    folder, arrays = files
    text = "see <|m1|> and <|m1|> then <|m1|>"
    rows = ["one.npy", "two.safetensors", "three.safetensors:a"]
    flags = [flag for name in rows for flag in ("--rows", f"m1={folder / name}")]
    options = {"engine": "transformers", "device": "cpu", "dtype": "float32"}
    with MultimodalQwen3Pipeline(checkpoint, **options) as pipeline:
        prompt = {"prompt": text, "multi_modal_data": {"m1": list(arrays.values())}}
        (expected,) = pipeline.generate(prompt, max_tokens=5, return_full=True)
        chat = pipeline.chat(messages_of(text, {"m1": list(arrays.values())}, SPECS), max_tokens=5)
    assert main(["generate", str(checkpoint), text, *flags, *FLAGS]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert main(["generate", str(checkpoint), text, *flags, *FLAGS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["token_ids"] == expected.token_ids
    assert found["finish_reason"] == "length"
    assert main(["generate", str(checkpoint), text, *flags, *FLAGS, "--chat"]) == 0
    assert capsys.readouterr().out == chat + "\n"


def test_messages_of_a_text_with_markers():
    one, two, other = object(), object(), object()
    (message,) = messages_of("a <|m1|><|m1|> b", {"m1": [one, two], "m2": [other]}, SPECS)
    assert message["content"] == [
        {"type": "m2", "m2": other},
        {"type": "text", "text": "a "},
        {"type": "m1", "m1": one},
        {"type": "m1", "m1": two},
        {"type": "text", "text": " b"},
    ]
    with pytest.raises(ModalityError, match=r"holds 1 <\|m1\|> marker"):
        messages_of("a <|m1|>", {"m1": [one, two]}, SPECS)
    with pytest.raises(ModalityError, match="unknown modality 'm3'"):
        messages_of("a", {"m3": [one]}, SPECS)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("m1", "expected NAME=FILE"),
        ("m1=none.npy", "there is no file none.npy"),
        ("m1={}/bad.npy", "bad.npy cannot be read"),
        ("m1={}/rows.txt", "expected a .npy or .safetensors file"),
        ("m1={}/three.safetensors", "name one, as"),
        ("m1={}/three.safetensors:c", "not 'c'"),
        ("m2={}/one.npy", "modality 'm2'"),
    ],
)
def test_rows_that_cannot_be_read(checkpoint, files, rows, words, capsys):
    rows = rows.format(files[0])
    assert main(["generate", str(checkpoint), "see", "--rows", rows, *FLAGS]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_options_of_an_engine():
    given = ["enforce-eager=true", "max_model_len=64", "quantization=fp8", "a=[1, 2]"]
    assert read_options(given) == {
        "enforce_eager": True,
        "max_model_len": 64,
        "quantization": "fp8",
        "a": [1, 2],
    }
    with pytest.raises(ValueError, match="expected NAME=VALUE"):
        read_options(["eager"])


@pytest.fixture
def folder(tmp_path):
    """What `mmqwen data convert` reads."""
    np.save(tmp_path / "a.npy", np.ones((2, 24), np.float32))
    np.save(tmp_path / "b.npy", np.zeros(24, np.float32))
    lines = [
        {"prompt": "<|m1|> is", "answer": " one", "items": {"m1": ["a.npy"]}},
        {"prompt": "<|m1|> is", "answer": " no", "items": {"m1": ["b.npy"]}},
    ]
    lines[1]["choices"] = ["one", "no"]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_folder_is_converted_checked_and_shown(folder, checkpoint, capsys):
    data = folder / "data"
    assert main(["data", "convert", str(folder), "-o", str(data), "--modality", "m1=24"]) == 0
    assert str(data) in capsys.readouterr().out
    assert RowsDataset(data)[1].sample.choices == ("one", "no")
    assert main(["data", "validate", str(data), "--modality", "m1=24"]) == 0
    assert "2 samples, 3 rows of m1: no problem" in capsys.readouterr().out
    assert main(["data", "validate", str(data), "--model", str(checkpoint)]) == 0
    assert re.search(r"2 samples, the longest of \d+ tokens, 3 rows", capsys.readouterr().out)
    assert main(["data", "show", str(data), "--line", "2"]) == 0
    shown = capsys.readouterr().out
    assert "rows-m1.safetensors: 2 items, 3 rows of 24 float32" in shown
    assert "answer: ' no'" in shown
    assert "choices: ['one', 'no']" in shown
    assert "m1 item 1: [1, 24], mean 0, spread 0" in shown
    assert "' one'" not in shown


def test_problems_are_one_a_line(folder, checkpoint, capsys):
    data = folder / "data"
    flags = ["-o", str(data), "--model", str(checkpoint), "--dtype", "bfloat16"]
    assert main(["data", "convert", str(folder), *flags]) == 0
    lines = ["not JSON", '{"prompt": "<|m1|>", "answer": "", "items": {"m1": [0]}}']
    (data / "data.jsonl").write_text("\n".join(lines))
    capsys.readouterr()
    assert main(["data", "validate", str(data), "--model", str(checkpoint)]) == 2
    found = capsys.readouterr().err.splitlines()
    assert [f":{at}: " in line for at, line in enumerate(found, 1)] == [True, True]
    assert main(["data", "validate", str(data), "--modality", "m1=24", "--problems", "1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convert", "{}", "-o", "{}/new", "--modality", "m1=12"], "width"),
        (["convert", "{}", "-o", "{}/new"], "either --model CHECKPOINT, or --modality"),
        (["convert", "{}", "-o", "{}/new", "--modality", "m1"], "expected NAME=WIDTH"),
        (["convert", "{}", "-o", "{}", "--modality", "m1=24"], "not empty"),
        (["convert", "{}", "-o", "{}/new", "--modality", "m1=24", "--dtype", "int8"], "int8"),
        (["convert", "{}/none", "-o", "{}/new", "--modality", "m1=24"], "samples.jsonl"),
        (["validate", "{}", "--modality", "m1=24"], "no dataset"),
        (["validate", "{}", "--modality", "m1=24", "--max-length", "9"], "give --model"),
        (["validate", "{}", "--modality", "m1=24", "--modality", "m1=2"], "twice"),
        (["show", "{}"], "no dataset"),
    ],
)
def test_mistakes_with_data(folder, capsys, arguments, words):
    assert main(["data", *(argument.format(folder) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (folder / "new").exists()


def test_there_is_no_such_line(folder, capsys):
    data = folder / "data"
    assert main(["data", "convert", str(folder), "-o", str(data), "--modality", "m1=24"]) == 0
    assert main(["data", "show", str(data), "--line", "3"]) == 2
    assert "there is no line 3, only 1 to 2" in capsys.readouterr().err
