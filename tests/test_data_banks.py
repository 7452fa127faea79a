"""Samples that name rows of a bank: read, checked, written; trained and evaluated as by value."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mmqwen.banks import BankRows, build_bank
from mmqwen.checkpoint import build_checkpoint
from mmqwen.cli import main
from mmqwen.data import DatasetError, DatasetWriter, RowsDataset, from_npy_folder, validate
from mmqwen.evaluation import evaluate
from mmqwen.modalities import parse_modalities
from mmqwen.pipeline import MultimodalQwen3Pipeline
from mmqwen.training import TrainingError, TrainSettings, train
from mmqwen.training.cli import command as train_command
from mmqwen.training.collator import Collator
from tiny import make_base, make_composite
from training_runs import WIDTHS, losses, settings_for, write_data

SPECS = parse_modalities({"m1": {"dim": 4, "max_rows": 3}, "m2": 6})


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_bank(path: Path, rows: torch.Tensor, modality: str = "m1", keys: bool = False) -> Path:
    """A bank of rows; row n has the key Kn."""
    array, names = path.with_suffix(".npy"), path.with_suffix(".txt")
    np.save(array, rows.numpy())
    names.write_text("".join(f"K{row}\n" for row in range(len(rows))))
    build_bank(array, path, modality=modality, keys=names if keys else None)
    return path


def write_lines(folder: Path, *lines: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def line_of(*items: object, modality: str = "m1") -> dict:
    prompt = f"see {'<|' + modality + '|>' if len(items) == 1 else ''}"
    return {"prompt": prompt, "answer": " one", "items": {modality: list(items)}}


@pytest.fixture
def bank(tmp_path):
    return make_bank(tmp_path / "items.bank", draw(20, 4), keys=True)


# -- read ----------------------------------------------------------------------------------------


def test_rows_are_read_by_ids_by_keys_and_beside_items_of_the_dataset(bank, tmp_path):
    data = tmp_path / "data"
    with DatasetWriter(data, SPECS) as writer:
        own = writer.add_item("m1", draw(2, 4, seed=1))
        items = [BankRows("items", [5, 17, 5]), own, {"bank": "items", "keys": ["K3", "K0"]}]
        writer.add("<|m1|><|m1|><|m1|>", " one", {"m1": items})
        writer.add("<|m1|>", " two", {"m1": [BankRows("items", np.array([7]))]})
        writer.add("", " three", {"m1": BankRows("items", keys=("K19",))})
    lines = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    assert lines[0]["items"]["m1"] == [
        {"bank": "items", "ids": [5, 17, 5]}, 0, {"bank": "items", "keys": ["K3", "K0"]},
    ]  # fmt: skip
    summary = validate(data, SPECS, banks={"items": bank})
    assert summary.rows == {"m1": 2, "m2": 0}  # those of the dataset itself
    assert list(summary.banks) == ["items"]
    assert len(summary.banks["items"]) == 64
    dataset = RowsDataset(data, SPECS, {"items": bank})
    assert dataset.counts(dataset.sample(0)) == {"m1": [3, 2, 2]}
    rows = draw(20, 4)
    for opened in (dataset, pickle.loads(pickle.dumps(dataset))):  # as a worker gets it
        first, second, third = (opened[at].rows["m1"] for at in range(3))
        want = [rows[[5, 17, 5]], draw(2, 4, seed=1), rows[[3, 0]]]
        assert all(torch.equal(a, b) for a, b in zip(first, want, strict=True))
        assert torch.equal(second[0], rows[[7]])
        assert torch.equal(third[0], rows[[19]])


def test_a_bank_that_no_sample_names_is_not_opened(tmp_path):
    data = write_lines(tmp_path / "data", {"prompt": "a", "answer": "b"})
    assert validate(data, SPECS, banks={"items": tmp_path / "none"}).banks == {}
    assert len(RowsDataset(data, SPECS, {"items": tmp_path / "none"})[0].rows) == 0


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            {"bank": "users", "ids": [1]},
            r"unknown bank 'users', expected one of \['broken', 'gone'",
        ),
        ({"bank": 7, "ids": [1]}, "unknown bank 7"),
        ({"bank": "items", "ids": [1, 20]}, "item 0: got id 20 of bank 'items', expected 0 to 19"),
        ({"bank": "items", "ids": [-1]}, "got id -1 of bank 'items'"),
        ({"bank": "items", "ids": [10**30]}, "an integer of 100 bits"),
        ({"bank": "items", "ids": [True]}, "got the id True"),
        ({"bank": "items", "ids": [1.0]}, "got the id 1.0"),
        ({"bank": "items", "ids": 5}, "'ids' are 5, expected a list of integers"),
        ({"bank": "items", "ids": [[5]]}, "expected a list of integers"),
        ({"bank": "items", "ids": [1, 2, 3, 4]}, "got 4 rows of bank 'items', expected 1 to 3"),
        ({"bank": "items", "ids": []}, "got 0 rows of bank 'items'"),
        ({"bank": "items", "keys": ["K1", "K20"]}, "got the key 'K20' of bank 'items'"),
        ({"bank": "items", "keys": [3]}, "got the key 3"),
        ({"bank": "items", "keys": ["\ud800"]}, "got the key"),
        ({"bank": "items", "keys": "K1"}, "'keys' are 'K1', expected a list of strings"),
        ({"bank": "items", "ids": [1], "keys": ["K1"]}, "expected 'bank', and 'ids' or 'keys'"),
        ({"bank": "items"}, "expected 'bank', and 'ids' or 'keys'"),
        ({"bank": "wide", "ids": [1]}, "bank 'wide': .*rows are 5 wide, expected 4"),
        ({"bank": "other", "ids": [1]}, "rows are of modality 'm2'"),
        ({"bank": "gone", "ids": [1]}, "bank 'gone': .*cannot be read"),
        ({"bank": "broken", "ids": [1]}, "bank 'broken': .*NaN or Inf in row 2"),
        (None, "expected a list of item numbers, or of rows of a bank"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(bank, tmp_path, item, message):
    make_bank(tmp_path / "wide.bank", draw(3, 5))
    make_bank(tmp_path / "other.bank", draw(3, 6), "m2")
    rows = draw(4, 4)
    rows[2, 1] = float("nan")
    save_file({"rows": rows}, tmp_path / "broken.bank", metadata={"modality": "m1"})
    names = ("items", "wide", "other", "gone", "broken")
    banks = {name: tmp_path / f"{name}.bank" for name in names}
    good = line_of({"bank": "items", "ids": [3]})
    data = write_lines(tmp_path / "data", good, line_of(item), good)
    with pytest.raises(DatasetError, match=rf"data.jsonl:2: .*{message}") as error:
        validate(data, SPECS, banks=banks)
    assert len(error.value.problems) == 1
    with pytest.raises(DatasetError, match=r"data.jsonl:2: "):
        _ = RowsDataset(data, SPECS, banks)[1]


def test_a_broken_bank_is_said_once_and_without_banks_what_to_give(bank, tmp_path):
    make_bank(tmp_path / "wide.bank", draw(3, 5))
    line = line_of({"bank": "wide", "ids": [1]})
    data = write_lines(tmp_path / "data", line, line, line_of({"bank": "items", "ids": [20]}))
    with pytest.raises(DatasetError) as error:
        validate(data, SPECS, banks={"wide": tmp_path / "wide.bank", "items": bank})
    first, second = error.value.problems
    assert "data.jsonl:1: " in first
    assert "data.jsonl:3: " in second
    with pytest.raises(DatasetError, match=r"unknown bank 'wide'.*--bank NAME=FILE"):
        validate(data, SPECS)


def test_what_cannot_be_written_down_is_refused(tmp_path):
    with DatasetWriter(tmp_path / "data", SPECS) as writer:
        for wrong in (BankRows("items", 5), BankRows("items"), {"bank": "items", "rows": [1]}):
            with pytest.raises(DatasetError, match="sample 1: "):
                writer.add("<|m1|>", " one", {"m1": [wrong]})
        writer.add("<|m1|>", " one", {"m1": [BankRows("items", torch.tensor([2, 1]))]})
    (line,) = (tmp_path / "data" / "data.jsonl").read_text().splitlines()
    assert json.loads(line)["items"] == {"m1": [{"bank": "items", "ids": [2, 1]}]}


def test_parquet_and_folders_of_files_name_rows_too(bank, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    folder = tmp_path / "parquet"
    folder.mkdir()
    items = [
        {"m1": [{"bank": "items", "ids": [5, 6]}]},
        {"m1": [{"bank": "items", "keys": ["K7"]}]},
    ]
    columns = {"prompt": ["<|m1|>"] * 2, "answer": [" one"] * 2, "items": items}
    parquet.write_table(arrow.table(columns), folder / "data.parquet")
    rows = draw(20, 4)
    validate(folder, SPECS, banks={"items": bank})
    dataset = RowsDataset(folder, SPECS, {"items": bank})
    assert torch.equal(dataset[0].rows["m1"][0], rows[5:7])
    assert torch.equal(dataset[1].rows["m1"][0], rows[7:8])

    plain = tmp_path / "plain"
    plain.mkdir()
    np.save(plain / "a.npy", np.ones((1, 4), np.float32))
    line = {"prompt": "<|m1|><|m1|>", "answer": " one"}
    line["items"] = {"m1": ["a.npy", {"bank": "items", "ids": [5]}]}
    (plain / "samples.jsonl").write_text(json.dumps(line))
    from_npy_folder(plain, tmp_path / "made", SPECS)
    own, named = RowsDataset(tmp_path / "made", SPECS, {"items": bank})[0].rows["m1"]
    assert torch.equal(own, torch.ones(1, 4))
    assert torch.equal(named, rows[5:6])


def test_rows_of_two_dtypes_meet_in_float32(tmp_path):
    rows = draw(2, 24)
    build_bank(
        make_bank(tmp_path / "a.bank", rows), tmp_path / "half.bank", modality="m1", dtype="float16"
    )
    checkpoint = make_composite(tmp_path / "model", {"m1": 24})
    from mmqwen.hf import MultimodalQwen3Processor

    processor = MultimodalQwen3Processor.from_pretrained(checkpoint)
    items = ({"bank": "half", "ids": [0]}, {"bank": "full", "ids": [1]})
    data = write_lines(tmp_path / "data", line_of(items[0]), line_of(items[1]))
    banks = {"half": tmp_path / "half.bank", "full": tmp_path / "a.bank"}
    dataset = RowsDataset(data, processor.specs, banks)
    batch = Collator(processor.tokenizer, processor.specs)([dataset[0], dataset[1]])
    want = torch.stack([rows[0].half().float(), rows[1]])
    assert torch.equal(batch["embeddings"]["m1"], want)


# -- the commands ----------------------------------------------------------------------------------


def test_validate_and_show(bank, tmp_path, capsys):
    lines = ({"bank": "items", "ids": [5, 6]}, {"bank": "items", "keys": ["K20"]})
    data = write_lines(tmp_path / "data", *map(line_of, lines))
    flags = ["--modality", "m1=4", "--bank", f"items={bank}"]
    assert main(["data", "validate", str(data), *flags]) == 2
    (problem,) = capsys.readouterr().err.splitlines()
    assert "data.jsonl:2: modality 'm1', item 0: got the key 'K20' of bank 'items'" in problem
    assert main(["data", "show", str(data), "--samples", "1", *flags]) == 0
    shown = capsys.readouterr().out
    assert 'm1 item {"bank": "items", "ids": [5, 6]}: [2, 4], mean ' in shown
    assert main(["data", "show", str(data)]) == 0  # what is named can be told without the bank
    assert 'm1 item {"bank": "items", "keys": ["K20"]}' in capsys.readouterr().out
    assert main(["data", "show", str(data), *flags]) == 2
    assert "data.jsonl:2: " in capsys.readouterr().err


# -- training and evaluation -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint, a dataset of rows, and the same one with its rows of m1 in a bank."""
    folder = tmp_path_factory.mktemp("banks")
    model, by_value = make_composite(folder / "model", WIDTHS), write_data(folder / "by-value")
    by_id = folder / "by-id"
    shutil.copytree(by_value, by_id)
    store = RowsDataset(by_value).store("m1")
    lines = [json.loads(line) for line in (by_id / "data.jsonl").read_text().splitlines()]
    for line in lines:
        numbers = line["items"].get("m1", ())
        found = [{"bank": "items", "ids": list(range(*store.bounds(n)))} for n in numbers]
        if found:
            line["items"]["m1"] = found
    write_lines(by_id, *lines)
    (by_id / "items-m1.safetensors").unlink()
    (by_id / "rows-m1.safetensors").rename(folder / "items.bank")  # which any such file is
    return model, by_value, by_id, folder


def test_a_run_learns_the_same_by_value_and_by_id(places, capsys):
    model, by_value, by_id, folder = places
    trained = train(settings_for((model, by_value, folder), "value", eval_share=0.25))
    bank = {"items": f"{folder / 'items.bank'}:modality=m1"}
    named = settings_for((model, by_id, folder), "id", eval_share=0.25, banks=bank)
    assert named.banks == (f"items={folder / 'items.bank'}:modality=m1",)
    assert losses(train(named)) == losses(trained)
    with pytest.raises(DatasetError, match="unknown bank 'items', expected one of"):
        train(settings_for((model, by_id, folder), "none"))
    assert not (folder / "none.run").exists()


def test_the_checkpoint_s_own_bank_is_read_and_a_changed_one_refused(places, tmp_path):
    _, by_value, by_id, folder = places
    bank = {"file": str(folder / "items.bank"), "modality": "m1"}
    with pytest.warns(UserWarning, match="UNTRAINED"):
        own = build_checkpoint(
            make_base(tmp_path / "base"), WIDTHS, tmp_path / "own", banks={"items": bank}, copy=True
        )
    options = {"max_steps": 6, "save_steps": 2}

    class Stopped(Exception):
        pass

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 4:
                raise Stopped

    settings = settings_for((own, by_id, tmp_path), "run", **options)
    with pytest.raises(Stopped):
        train(settings, callbacks=[Stop()])
    file = own / "banks" / "items.bank"
    before = file.read_bytes()
    file.write_bytes(before[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"bank 'items': .* has version .*, expected"):
        train(settings)
    file.write_bytes(before)  # the same content, later: the same version
    whole = train(settings_for((own, by_value, tmp_path), "whole", **options))
    assert losses(train(settings)) == losses(whole)
    assert (tmp_path / "run" / "banks" / "items.bank").exists()  # the output serves it


def test_settings_take_flags_or_a_dict():
    fields = {"model": "m", "data": "d", "output": "o"}
    assert TrainSettings(**fields, banks=["a=b"]) == TrainSettings(**fields, banks={"a": Path("b")})
    for wrong in ("a=b", ["a"], ["a=b", "a=c"], [3]):
        with pytest.raises(TrainingError, match="bank"):
            TrainSettings(**fields, banks=wrong)
    assert "banks" in train_command.__signature__.parameters


def test_an_evaluation_finds_the_same_by_value_and_by_id(places, tmp_path, capsys):
    model, by_value, by_id, folder = places
    options = {"engine": "transformers", "device": "cpu", "dtype": "float32"}
    banks = {"items": {"file": folder / "items.bank", "modality": "m1"}}
    by_name = evaluate(model, by_id, banks=banks, **options)
    with MultimodalQwen3Pipeline(model, **options) as pipeline:
        want = evaluate(pipeline, by_value)
        with pytest.raises(ValueError, match="give the banks to it"):
            evaluate(pipeline, by_id, banks=banks)
    for scope, found in want.figures.items():
        for control, figures in found.items():
            # "shuffled" too: the same samples exchange the same rows
            assert by_name.figures[scope][control].logprob == pytest.approx(
                figures.logprob, abs=1e-3
            )
    flags = ["--engine", "transformers", "--device", "cpu", "--bank"]
    flags += [f"items={folder / 'items.bank'}:modality=m1", "--no-progress"]
    assert main(["eval", str(model), str(by_id), *flags, "--limit", "4"]) == 0
    assert "without rows" in capsys.readouterr().out


def test_generate_takes_names_of_rows(places, tmp_path, capsys):
    model, by_value, _, folder = places
    rows = RowsDataset(by_value).store("m1")
    np.save(tmp_path / "rows.npy", torch.cat([rows.item(0), rows.item(1)]).numpy())
    count = len(np.load(tmp_path / "rows.npy"))
    named = json.dumps({"bank": "items", "ids": list(range(count))})
    flags = ["--engine", "transformers", "--device", "cpu", "--dtype", "float32", "--json"]
    flags += ["--max-tokens", "4", "--bank", f"items={folder / 'items.bank'}:modality=m1"]
    said = []
    for item in (named, str(tmp_path / "rows.npy")):
        assert main(["generate", str(model), "see <|m1|>", "--rows", f"m1={item}", *flags]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    for wrong, words in {
        '{"bank": "items"': "expected JSON",
        '{"bank": "x", "ids": [0]}': "unknown",
    }.items():
        assert main(["generate", str(model), "see <|m1|>", "--rows", f"m1={wrong}", *flags]) == 2
        assert words in capsys.readouterr().err
