"""No random start passes for a trained projector: what records it, what carries it, who warns."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mmqwen import MultimodalQwen3Pipeline
from mmqwen.checkpoint import UntrainedProjectorsWarning, build_checkpoint, save_projectors
from mmqwen.checkpoint.trained import read_trained
from mmqwen.cli import main
from mmqwen.data import DatasetWriter
from mmqwen.training import TrainSettings, export, train
from tiny import make_composite

MODALITIES = {"m1": 24, "site": 8}
FILE = "projectors.safetensors"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("trained") / "start", MODALITIES)


@pytest.fixture(scope="module")
def base(start):
    return start.with_name("start-base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Samples with rows of m1; none has any of site, though it has a file of rows."""
    path = tmp_path_factory.mktemp("data") / "data"
    with DatasetWriter(path, MODALITIES) as writer:
        for _ in range(4):
            writer.add("Describe <|m1|> the", " train", {"m1": [torch.ones(2, 24)]})
        writer.add_item("site", torch.ones(8))
    return path


def settings(start: Path, data: Path, output: Path, **options) -> TrainSettings:
    fields = {"max_steps": 2, "tokens_per_step": 64, "cpu": True, "progress": False, "log_steps": 1}
    return TrainSettings(model=start, data=data, output=output, **fields | options)


def without_record(file: Path) -> None:
    save_file(load_file(file), file)


# -- what is recorded --------------------------------------------------------------------------


def test_a_random_start_is_recorded_with_the_weights(start, tmp_path):
    assert read_trained(start) == {"m1": False, "site": False}
    alone = shutil.copy(start / FILE, tmp_path / "published.safetensors")
    assert read_trained(alone) == {"m1": False, "site": False}


def test_a_given_projector_is_trained_unless_it_says_otherwise(start, base, tmp_path):
    given = tmp_path / "given.safetensors"
    tensors = load_file(start / FILE)
    own = {k: v for k, v in tensors.items() if ".m1." in k}
    save_file(own, given, metadata={"activation": "relu"})
    with pytest.warns(UntrainedProjectorsWarning, match="of site are UNTRAINED"):
        one = build_checkpoint(base, MODALITIES, tmp_path / "one", projector=given)
    assert read_trained(one) == {"m1": True, "site": False}
    # What was random stays so, whichever form it is handed on in.
    for number, source in enumerate((one, one / FILE)):
        with pytest.warns(UntrainedProjectorsWarning, match="of site are UNTRAINED"):
            again = build_checkpoint(base, MODALITIES, tmp_path / str(number), projector=source)
        assert read_trained(again) == {"m1": True, "site": False}


def test_checkpoints_without_a_record_are_unknown(start, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(start, old)
    without_record(old / FILE)
    assert read_trained(old) == {}
    assert AutoModelForCausalLM.from_pretrained(old).projectors_trained == {}
    assert read_trained(tmp_path / "nothing") == {}
    assert read_trained("some/model") == {}


@pytest.mark.parametrize("record", ["[1]", "{", '{"m1": "no"}', "3"])
def test_a_strange_record_is_unknown(start, tmp_path, record):
    file = tmp_path / FILE
    save_file(load_file(start / FILE), file, metadata={"mmqwen.trained": record})
    assert read_trained(file) == {}


def test_the_record_goes_with_a_model_that_transformers_saves(start, base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(start)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    assert not (whole / FILE).exists()
    assert read_trained(whole) == {"m1": False, "site": False}
    again = AutoModelForCausalLM.from_pretrained(whole)
    assert again.projectors_trained == {"m1": False, "site": False}
    assert read_trained(save_projectors(again, tmp_path / "p")) == {"m1": False, "site": False}
    with pytest.warns(UntrainedProjectorsWarning, match="of m1, site are UNTRAINED"):
        build_checkpoint(base, MODALITIES, tmp_path / "built", projector=whole)


def test_a_training_loop_of_ones_own_is_noticed(start, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(start)
    ids = torch.tensor([[5, model.specs["m1"].token_id, 7]])
    rows = {"m1": torch.ones(1, 24)}
    model.eval()(ids, embeddings=rows)  # asking is not learning
    with torch.no_grad():
        model.train()(ids, embeddings=rows)
    model.projectors.requires_grad_(False)
    model(ids, embeddings=rows, labels=ids)
    assert model.projectors_trained == {"m1": False, "site": False}
    model.projectors.requires_grad_(True)
    model(ids, embeddings=rows, labels=ids).loss.backward()
    model.save_pretrained(tmp_path / "whole")
    assert read_trained(tmp_path / "whole") == {"m1": True, "site": False}


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"stage": "projector", "eval_share": 0.25},
        {"stage": "full"},
        {"stage": "lora"},
        {"stage": "lora", "merge": False},
    ],
)
def test_training_records_only_what_had_rows(start, data, tmp_path, options):
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    with pytest.warns(UntrainedProjectorsWarning, match="has no rows of site, whose .* UNTRAINED"):
        output = train(settings(start, data, tmp_path / "out", **options))
    assert read_trained(output) == {"m1": True, "site": False}
    assert AutoModelForCausalLM.from_pretrained(output).projectors_trained == {
        "m1": True,
        "site": False,
    }


def test_a_run_that_goes_on_or_is_exported_records_the_same(start, data, tmp_path):
    pytest.importorskip("accelerate")
    own = shutil.copytree(data, tmp_path / "data")
    asked = settings(start, own, tmp_path / "out")
    with pytest.warns(UntrainedProjectorsWarning, match="no rows of site"):
        output = train(asked)
    shutil.rmtree(output)
    with pytest.warns(UntrainedProjectorsWarning, match="no rows of site"):
        output = train(asked)  # nothing is left to do but to write
    assert read_trained(output) == {"m1": True, "site": False}
    checkpoint = asked.run_folder / "checkpoint-2"
    assert read_trained(export(checkpoint, tmp_path / "early")) == {"m1": True, "site": False}
    shutil.rmtree(own)  # the checkpoint itself knows
    assert read_trained(export(checkpoint, tmp_path / "late")) == {"m1": True, "site": False}


def test_only_what_was_trained_is_recorded(start, data, tmp_path):
    """Rows that the data has, and that no step came to, trained nothing."""
    pytest.importorskip("accelerate")
    with DatasetWriter(tmp_path / "late", MODALITIES) as writer:
        for index in range(40):
            writer.add("Describe <|m1|>", " train", {"m1": [torch.ones(1, MODALITIES["m1"])]})
            if index == 20:
                writer.add(
                    "Where <|site|>", " train", {"site": [torch.ones(1, MODALITIES["site"])]}
                )
    options = {"max_steps": 1, "tokens_per_step": 32}
    for seed in range(9):  # until the one sample is not in the first pass
        output = train(
            settings(start, tmp_path / "late", tmp_path / f"o{seed}", seed=seed, **options)
        )
        if read_trained(output) != {"m1": True, "site": True}:
            break
    assert read_trained(output) == {"m1": True, "site": False}


def test_training_on_what_is_trained_says_what_stays(start, data, tmp_path):
    pytest.importorskip("accelerate")
    model = tmp_path / "model"
    shutil.copytree(start, model)
    save_projectors(load_file(model / FILE), model, trained={"site": True})
    with pytest.warns(UserWarning, match="no rows of site: their projectors stay") as caught:
        output = train(settings(model, data, tmp_path / "out"))
    assert not [w for w in caught if issubclass(w.category, UntrainedProjectorsWarning)]
    assert read_trained(output) == {"m1": True, "site": True}


@pytest.mark.filterwarnings("default::mmqwen.checkpoint.UntrainedProjectorsWarning")
def test_train_warns_in_one_line_and_refuses_broken_weights(start, data, tmp_path, capsys):
    pytest.importorskip("accelerate")
    model = tmp_path / "model"
    shutil.copytree(start, model)
    flags = ["--max-steps", "1", "--cpu", "--no-progress"]
    command = ["train", "--model", str(model), "--data", str(data), *flags]
    assert main([*command, "-o", str(tmp_path / "one")]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "UNTRAINED" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: ")
    assert "site" in lines[0]
    assert "m1" not in lines[0]
    file = model / FILE
    file.write_bytes(file.read_bytes()[:-1])
    assert main([*command, "-o", str(tmp_path / "two")]) == 2
    error = capsys.readouterr().err
    assert "projectors.safetensors is truncated" in error
    assert "Traceback" not in error
    assert not (tmp_path / "two.run").exists()


# -- who warns ---------------------------------------------------------------------------------


def test_the_pipeline_warns_by_name(start, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(start, half)
    tensors = load_file(half / FILE)
    save_projectors(tensors, half, trained={"m1": True, "site": False})
    with pytest.warns(UntrainedProjectorsWarning, match="of site are UNTRAINED") as caught:
        MultimodalQwen3Pipeline(half, engine="transformers", dtype="float32").close()
    (warning,) = [w for w in caught if w.category is UntrainedProjectorsWarning]
    assert warning.filename == __file__
    for trained in ({"m1": True, "site": True}, {}):
        save_projectors(tensors, half, trained=trained)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UntrainedProjectorsWarning)
            MultimodalQwen3Pipeline(half, engine="transformers", dtype="float32").close()


def test_vllm_warns_once_by_name(start, base, tmp_path):
    pytest.importorskip("vllm")
    from engines import start as start_engine

    half = tmp_path / "half"
    shutil.copytree(start, half)
    save_projectors(load_file(half / FILE), half, trained={"m1": True, "site": False})
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mmqwen.vllm_plugin.model")
    logger.addHandler(handler)
    architecture = ["MultimodalQwen3ForConditionalGeneration"]
    config = json.loads((half / "config.json").read_text())
    overrides = {"architectures": architecture, "modalities": config["modalities"]}
    overrides["projector"] = str(half / FILE)
    try:
        start_engine(half)
        start_engine(base, hf_overrides=overrides)
    finally:
        logger.removeHandler(handler)
    lines = [line for line in heard if "UNTRAINED" in line]
    assert len(lines) == 2, heard
    assert all("projectors of site are UNTRAINED" in line for line in lines)
