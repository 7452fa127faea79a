"""Each stage trains what it should and writes a checkpoint; batches, settings, full disks."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, TrainerCallback
from transformers.utils import logging as transformers_logging

from engines import TOLERANCE
from mmqwen.checkpoint import CheckpointError, load_projectors, read_config
from mmqwen.cli import main
from mmqwen.data import DatasetError
from mmqwen.hf import MultimodalQwen3ForConditionalGeneration, MultimodalQwen3Processor
from mmqwen.training import TrainingError, TrainSettings, export, train
from mmqwen.training.arguments import trainer_arguments
from mmqwen.training.checkpoints import last_checkpoint
from mmqwen.training.run_folder import alone_in, claim_run_folder
from tiny import make_composite
from training_runs import SAME_CURVE, losses, settings_for, write_data

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    return make_composite(folder / "model"), write_data(folder / "data"), folder


# -- stages ------------------------------------------------------------------------------------


def test_projector_stage_leaves_the_language_model_bit_for_bit(places):
    before = tensors_of(places[0])
    output = train(
        settings_for(places, "projector", max_steps=20, eval_share=0.25, schedule="linear")
    )
    after = tensors_of(output)
    assert after.keys() == before.keys()
    for name in after:
        changed = not torch.equal(after[name], before[name])
        assert changed == name.startswith("projectors."), name
    assert os.path.samefile(output / "base-model.safetensors", places[0] / "base-model.safetensors")
    curve = losses(output)
    assert sum(curve[-3:]) < 0.7 * sum(curve[:3])
    report = json.loads((output / "training.json").read_text())
    assert report["settings"]["stage"] == "projector"
    assert report["tokens_per_step"] == 96
    assert 0 < report["padding"] < 1
    entry = [e for e in report["log"] if "loss" in e][-1]
    assert entry["tokens_per_second"] > entry["learnt_per_second"] > 0
    assert 0 <= entry["padding"] < 1
    assert entry["rows/m1/norm"] > 0
    assert entry["rows/m1/norm_change"] != 0
    assert report["log"][-1]["train_tokens_per_second"] > 0
    assert not any(name.endswith("samples_per_second") for e in report["log"] for name in e)
    run = output.with_name("projector.run")
    assert list(run.glob("runs/**/events.out.tfevents.*"))
    checkpoints = sorted(p.name for p in run.glob("checkpoint-*"))
    assert f"checkpoint-{report['best_step']}" in checkpoints
    assert not (run / ".saving").exists()


def test_the_best_checkpoint_is_what_is_written(places):
    output = train(settings_for(places, "best", max_steps=9, eval_share=0.25, lr=0.3, keep=9))
    report = json.loads((output / "training.json").read_text())
    evals = {e["step"]: e["eval_loss"] for e in report["log"] if "eval_loss" in e}
    assert report["best_step"] == min(evals, key=evals.get)
    best = places[2] / "best.run" / f"checkpoint-{report['best_step']}" / "trainable.safetensors"
    written = load_file(output / "projectors.safetensors")
    for name, tensor in load_file(best).items():
        assert torch.equal(written[name], tensor)


def test_lora_stage_is_merged(places):
    pytest.importorskip("peft")
    before = tensors_of(places[0])
    output = train(settings_for(places, "lora", stage="lora", max_steps=10))
    after = tensors_of(output)
    assert after.keys() == before.keys()
    adapted = {n for n in after if not torch.equal(after[n], before[n])}
    layers = {name.split(".")[-2] for name in adapted if name.startswith("model.")}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {n for n in adapted if not n.startswith("model.")} == {
        n for n in after if n.startswith("projectors.")
    }
    assert losses(output)[-1] < losses(output)[0]


def test_an_adapter_beside_the_base_equals_the_merged_model(places):
    peft = pytest.importorskip("peft")
    merged = train(settings_for(places, "merged", stage="lora", max_steps=3))
    apart = train(settings_for(places, "apart", stage="lora", max_steps=3, merge=False))
    assert os.path.samefile(apart / "base-model.safetensors", places[0] / "base-model.safetensors")
    load = MultimodalQwen3ForConditionalGeneration.from_pretrained
    want, base = load(merged).eval(), load(apart).eval()
    got = peft.PeftModel.from_pretrained(base, apart / "adapter").eval()
    batch = MultimodalQwen3Processor.from_pretrained(merged)(
        {
            "text": "Describe <|m1|>",
            "multimodal_data": {"multimodal_embeddings": {"m1": [[1.0] * 24]}},
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(
            got(**batch).logits, want(**batch).logits, rtol=0, atol=TOLERANCE
        )


def test_full_stage_changes_everything(places):
    output = train(settings_for(places, "full", stage="full", lr=1e-3, gradient_checkpointing=True))
    before, after = tensors_of(places[0]), tensors_of(output)
    assert after.keys() == before.keys()
    # Some rows of m2 saw no gradient, but every tensor moved somewhere.
    assert all(not torch.equal(after[n], before[n]) for n in after)
    assert losses(output)[-1] < losses(output)[0]


def test_a_run_shows_one_bar_and_leaves_transformers_own_as_they_were(places, capfd, monkeypatch):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)
    run = settings_for(places, "bar", stage="full", max_steps=2, progress=True)
    train(run)
    export(run.run_folder / "checkpoint-2", places[2] / "bar-early")
    shown = capfd.readouterr()
    assert "training: 100%" in shown.err
    assert "Writing" not in shown.err + shown.out
    assert "Loading" not in shown.err + shown.out
    assert transformers_logging.is_progress_bar_enabled()


def test_checkpointing_changes_nothing(places):
    plain = losses(train(settings_for(places, "plain", stage="lora")))
    less = train(settings_for(places, "less", stage="lora", gradient_checkpointing=True))
    assert losses(less) == pytest.approx(plain, rel=SAME_CURVE)


def test_a_step_of_two_passes_learns_what_one_of_both_does(places):
    """The mean is over the learnt tokens of the step, not over the passes, which differ in them."""
    whole = settings_for(places, "one-pass", tokens_per_step=2048, max_steps=2)
    parts = settings_for(places, "two-passes", tokens_per_step=512, accumulation=8, max_steps=2)
    assert losses(train(parts)) == pytest.approx(losses(train(whole)), rel=SAME_CURVE)


@pytest.mark.parametrize("stage", ["projector", "lora", "full"])
def test_bf16_keeps_the_checkpoint_s_dtype(places, stage, tmp_path):
    model = make_composite(tmp_path / "model", dtype="bfloat16")
    options = {"stage": stage, "bf16": True, "max_steps": 12}
    output = train(settings_for((model, *places[1:]), f"bf16-{stage}", **options))
    assert {t.dtype for t in tensors_of(output).values()} == {torch.bfloat16}
    assert str(read_config(output).dtype).endswith("bfloat16")
    saved = load_file(
        output.with_name(output.name + ".run") / "checkpoint-12/trainable.safetensors"
    )
    assert {t.dtype for t in saved.values()} == {torch.float32}
    curve = losses(output)
    assert sum(curve[-3:]) < sum(curve[:3])


def test_a_saved_model_with_one_file_gets_new_projectors(places, tmp_path):
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(places[0])
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (whole / name).write_bytes((places[0] / name).read_bytes())
    output = train(settings_for((whole, *places[1:]), "from-whole"))
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    assert {f for n, f in index.items() if n.startswith("projectors.")} == {
        "projectors.safetensors"
    }
    base = load_file(output / "base-model.safetensors")
    assert not [n for n in base if n.startswith("projectors.")]
    specs = read_config(output).modality_specs
    for name, tensor in load_projectors(output, specs, 64).items():
        assert not torch.equal(tensor, model.state_dict()[name])


# -- batches -----------------------------------------------------------------------------------


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("break_it", ["width", "marker", "empty", "nan", "missing"])
def test_bad_data_stops_before_training(places, break_it, tmp_path, capsys):
    model, _, _ = places
    data = write_data(tmp_path / "data")
    lines = (data / "data.jsonl").read_text().splitlines()
    fields = json.loads(lines[1])
    rows = load_file(data / "rows-m1.safetensors")["rows"].clone()
    if break_it == "width":
        rows = rows[:, :20].clone()
    elif break_it == "nan":
        rows[1] = float("nan")  # item 1, line 2
    elif break_it == "marker":
        fields["prompt"] = "<|m1|><|m1|>"
    elif break_it == "empty":
        fields["answer"] = ""
    else:
        fields["items"] = {"m1": [999]}
    lines[1] = json.dumps(fields)
    (data / "data.jsonl").write_text("\n".join(lines) + "\n")
    save_file({"rows": rows}, data / "rows-m1.safetensors")
    output = tmp_path / "out"
    arguments = ["train", "--model", str(model), "--data", str(data), "-o", str(output), "--cpu"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.replace("\n", "")
    assert "data.jsonl:2:" in error
    assert "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]  # no run folder either


def test_a_long_sample_is_named_before_training(places):
    with pytest.raises(
        DatasetError, match=r"data.jsonl:1: \d+ tokens with rows, expected at most 6"
    ):
        train(settings_for(places, "long", max_length=6))


def test_settings_that_do_not_fit(places):
    with pytest.raises(TrainingError, match="stage 'all'"):
        settings_for(places, "x", stage="all")
    with pytest.raises(TrainingError, match="accumulation is 0"):
        settings_for(places, "x", accumulation=0)
    with pytest.raises(TrainingError, match="not both"):
        settings_for(places, "x", eval_data="a", eval_share=0.1)
    with pytest.raises(TrainingError, match="one side empty"):
        train(settings_for(places, "x", eval_share=0.001))
    with pytest.raises(TrainingError, match="lora_layers"):
        train(settings_for(places, "y", stage="lora", lora_layers=("nothing",)))
    with pytest.raises(CheckpointError, match="not empty"):
        train(settings_for(places, "data"))
    base = places[0].with_name("model-base")
    with pytest.raises(CheckpointError, match="composite checkpoint"):
        train(settings_for((base, *places[1:]), "z"))


NAN, INF = float("nan"), float("inf")
NONSENSE = {
    ("model", "data"): [None, "", 3],
    ("output",): ["", ".", "/", "..", None],
    ("eval_data",): ["", 3],
    ("stage",): ["all", None, 1],
    ("schedule",): [None, 1],
    ("fsdp",): [True, 1],
    ("banks",): ["a=b", ["a"], ["=b"], [3], None, 1],
    ("lora_layers",): ["q_proj", (), ("",), (1,), None],
    ("accumulation", "keep", "log_steps"): [0, -1, 1.5, "2", True, None],
    ("tokens_per_step", "save_steps", "max_length"): [0, -1, 1.5, "2", True],
    ("overlong", "attention"): ["some", None, 1],
    ("compile", "lean", "liger"): ["no", 1],
    ("lora_rank", "lora_alpha"): [0, -1, 1.5, None],
    ("max_steps",): [0, -2, 1.5, None],
    ("workers",): [-1, 0.5],
    ("seed",): [-1, 2**32, 0.5, None],
    ("epochs", "lr"): [0, -1, NAN, INF, "1", True],
    ("eval_share", "warmup", "lora_dropout"): [-0.1, 1, 5, NAN, None],
    ("weight_decay", "max_grad_norm"): [-1, NAN, INF, None],
    ("bf16", "gradient_checkpointing", "merge", "validate", "cpu", "progress"): ["no", 1, None],
}
NONSENSE_OF_ONE = [
    (name, value) for names, vs in NONSENSE.items() for name in names for value in vs
]


@pytest.mark.parametrize(("name", "value"), NONSENSE_OF_ONE)
def test_every_setting_refuses_nonsense_by_name(name, value):
    with pytest.raises(TrainingError, match=rf"^{name}.*expected") as error:
        TrainSettings(**{"model": "m", "data": "d", "output": "o", name: value})
    assert len(str(error.value)) < 200


def test_every_setting_is_tried_and_numpy_s_numbers_are_numbers():
    from dataclasses import fields

    names = {field.name for field in fields(TrainSettings)}
    assert names - {name for name, _ in NONSENSE_OF_ONE} == set()
    settings = TrainSettings("m", "d", "o", accumulation=np.int64(4), lr=np.float32(0.5), epochs=2)
    assert settings.to_dict()["accumulation"] == 4
    assert settings.to_dict()["lr"] == 0.5


@pytest.mark.parametrize("schedule", ["cosin", "warmup_stable_decay", "cosine_with_min_lr"])
def test_schedules_that_cannot_be_had_are_refused(places, schedule):
    """The last two exist, and need arguments that there is no setting for."""
    settings = settings_for(places, "schedule", schedule=schedule)
    with pytest.raises(TrainingError, match=rf"schedule '{schedule}', expected one of .*'cosine'"):
        train(settings)
    assert not settings.run_folder.exists()


def test_names_of_lora_layers_are_names(places):
    pytest.importorskip("peft")
    for layers in (("q_proj", "nothing"), ("q_proj|k_proj",), ("(",)):
        with pytest.raises(TrainingError, match=r"no layer '(nothing|q_proj\|k_proj|\()'"):
            train(settings_for(places, "names", stage="lora", lora_layers=layers))


# -- refused and failed runs ---------------------------------------------------------------------


def test_a_refused_run_does_not_block_the_corrected_command(places):
    """Whatever refuses it, and wherever: before the model is read, with it, in the first step."""
    refused = [
        {"eval_share": 0.001},
        {"stage": "lora", "lora_layers": ("nothing",)},
        {"schedule": "reduce_lr_on_plateau", "save_steps": None},
        {"lr": 1e30, "max_grad_norm": 0, "warmup": 0.0},
    ]
    for options in refused:
        with pytest.raises(TrainingError):
            train(settings_for(places, "corrected", **options))
        run = settings_for(places, "corrected").run_folder
        assert not (run / "settings.json").exists()
        assert not list(run.glob("checkpoint-*"))
    assert (train(settings_for(places, "corrected")) / "projectors.safetensors").is_file()


def test_a_refusal_leaves_nothing(places):
    settings = settings_for(places, "nothing-left", eval_share=0.001)
    with pytest.raises(TrainingError, match="one side empty"):
        train(settings)
    assert not settings.run_folder.exists()
    nowhere = (places[0], places[2] / "nowhere", places[2])
    settings = settings_for(nowhere, "no-data", validate=False)
    with pytest.raises(DatasetError, match="no dataset"):
        train(settings)
    assert not settings.run_folder.exists()


def test_what_the_output_could_not_be_written_with_is_refused_first(places, tmp_path):
    model = make_composite(tmp_path / "model")
    (model / "generation_config.json").write_text("{")
    with pytest.raises(TrainingError, match=r"generation_config.json: cannot be read"):
        train(settings_for((model, places[1], tmp_path), "malformed"))
    assert not (tmp_path / "malformed.run").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_named_wherever_it_is_read(places, tmp_path, workers):
    """Rows that nobody checked before: file and line, without the traceback of another process."""
    data = write_data(tmp_path / "data")
    rows = load_file(data / "rows-m1.safetensors")
    rows["rows"][0, 0] = float("nan")
    save_file(rows, data / "rows-m1.safetensors")
    with pytest.raises(DatasetError, match=r"data.jsonl:1.*NaN") as error:
        train(settings_for((places[0], data, tmp_path), "bad", validate=False, workers=workers))
    assert "Traceback" not in str(error.value)


def test_a_killed_worker_ends_the_run_and_says_what_to_do(places, monkeypatch):
    from mmqwen.training.collator import Collator

    real = Collator.__call__

    def collate(self, examples):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, examples)

    monkeypatch.setattr(Collator, "__call__", collate)
    with pytest.raises(TrainingError, match=r"process that reads data ended.*fewer --workers"):
        train(settings_for(places, "killed-worker", workers=1))


def test_a_run_that_was_killed_before_a_checkpoint_does_not_block_another(places):
    """It left a folder, as SIGKILL does, and nothing in it to go on from."""
    old = settings_for(places, "killed-early")
    assert claim_run_folder(old, has_checkpoint=False)
    new = settings_for(places, "killed-early", tokens_per_step=128, max_steps=2)
    assert losses(train(new))


def test_two_runs_do_not_share_a_folder(places):
    settings = settings_for(places, "shared")
    with (
        alone_in(settings.run_folder),
        pytest.raises(TrainingError, match="another process trains into"),
    ):
        train(settings)
    assert not settings.run_folder.exists()
    assert train(settings).is_dir()


def test_a_run_goes_on_with_the_passes_that_it_began_with(places, monkeypatch):
    """Its default of tokens would be another where there is another GPU."""
    from mmqwen.training import run as module

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **_):
            raise KeyboardInterrupt

    settings = settings_for(places, "moved", tokens_per_step=None)
    whole = train(settings_for(places, "stayed", tokens_per_step=None))
    with pytest.raises(KeyboardInterrupt):
        train(settings, callbacks=[Stop()])
    assert last_checkpoint(settings.run_folder) is not None
    monkeypatch.setattr(module, "default_tokens", lambda *_: 4096)
    moved = train(settings)
    assert losses(moved) == pytest.approx(losses(whole), rel=SAME_CURVE)
    reports = [json.loads((f / "training.json").read_text()) for f in (whole, moved)]
    assert reports[0]["tokens_per_step"] == reports[1]["tokens_per_step"] < 4096


def test_a_dataset_that_grew_does_not_go_on(places, tmp_path):
    """Also where the record of its files was removed, as one may where only times differ."""
    data = write_data(tmp_path / "data")
    settings = settings_for((places[0], data, tmp_path), "grown")
    shutil.rmtree(train(settings))
    line = (data / "data.jsonl").read_bytes().splitlines(keepends=True)[0]
    with (data / "data.jsonl").open("ab") as file:
        file.write(line)
    (settings.run_folder / "datasets.json").unlink()
    with pytest.raises(TrainingError, match="began with 24 samples"):
        train(settings)


def test_a_run_of_padded_batches_does_not_go_on_with_passes(places):
    settings = settings_for(places, "padded-run")
    shutil.rmtree(train(settings))
    (settings.run_folder / "plan.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"no plan.safetensors.*name another output"):
        train(settings)
    assert last_checkpoint(settings.run_folder) is not None


def test_a_run_that_fails_after_a_checkpoint_keeps_its_folder(places):
    from transformers import TrainerCallback

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyboardInterrupt

    settings = settings_for(places, "interrupted")
    with pytest.raises(KeyboardInterrupt):
        train(settings, callbacks=[Fail()])
    assert (settings.run_folder / "settings.json").is_file()
    with pytest.raises(TrainingError, match="other settings"):
        train(settings_for(places, "interrupted", lr=0.5))
    assert len(losses(train(settings))) == 6


def test_bf16_alone_on_a_cpu_says_what_to_do(places, monkeypatch, capsys):
    from transformers import utils

    monkeypatch.setattr(utils, "is_torch_bf16_gpu_available", lambda: False)
    model, data, folder = places
    output = folder / "bf16-alone"
    arguments = ["train", "--model", str(model), "--data", str(data), "-o", str(output), "--bf16"]
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "bf16 needs a GPU" in line
    assert "--cpu" in line
    assert not output.with_name("bf16-alone.run").exists()


def test_export_of_a_folder_names_its_checkpoints(places, capsys):
    settings = settings_for(places, "whole-run")
    train(settings)
    capsys.readouterr()
    run, target = settings.run_folder, places[2] / "exported"
    for name in (run, run / "checkpoint-5"):
        assert main(["train", "--export", str(name), "-o", str(target)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"{name} is no checkpoint" in line
        assert f"{run / 'checkpoint-3'}, {run / 'checkpoint-6'}" in line
    assert main(["train", "--export", f"{run}/checkpoint-3/", "-o", str(target)]) == 0


def test_each_problem_of_a_dataset_is_a_line(places, tmp_path, capsys):
    data = write_data(tmp_path / "data")
    lines = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for number in (1, 2, 5):
        lines[number] = {"prompt": "\ud83d", "answer": "b"}
    (data / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model, output = places[0], tmp_path / "out"
    arguments = ["train", "--model", str(model), "--data", str(data), "-o", str(output), "--cpu"]
    assert main(arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert [f"data.jsonl:{n}: " in line for n, line in zip((2, 3, 6), printed, strict=True)] == [
        True
    ] * 3


# -- several GPUs, one process -------------------------------------------------------------------


def test_one_of_two_gpus_is_used_and_it_is_said(places, monkeypatch, caplog):
    """Trainer would split the ids of a batch between them, but not the rows."""
    want = losses(train(settings_for(places, "one-device")))
    if not torch.cuda.is_available():  # accelerate may ask device_count
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = settings_for(places, "two-devices", cpu=False)
    with caplog.at_level(logging.WARNING, logger="mmqwen"):
        arguments = trainer_arguments(settings)
    assert arguments.n_gpu == 1
    # transformers has its own to say where another test has started a process group.
    (record,) = [record for record in caplog.records if record.name.startswith("mmqwen")]
    assert "one of 2 GPUs" in record.getMessage()
    assert "torchrun" in record.getMessage()
    if not torch.cuda.is_available():  # the two are made up, and the CPU computes
        assert losses(train(settings)) == pytest.approx(want, rel=SAME_CURVE)


# -- where generation stops ----------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["projector", "full"])
def test_the_output_stops_at_what_was_taught(tmp_path, places, stage):
    """A base model's stop is its documents' end; the template ends turns by another token."""
    model = make_composite(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends[0]}))
    output = train(settings_for((model, places[1], tmp_path), "out", stage=stage, max_steps=1))
    written = json.loads((output / "generation_config.json").read_text())
    assert written["eos_token_id"] == ends
    assert written["pad_token_id"] == json.loads(file.read_text())["pad_token_id"]
    file.unlink()
    output = train(settings_for((model, places[1], tmp_path), "no", stage=stage, max_steps=1))
    config = GenerationConfig.from_pretrained(output)
    assert set(config.eos_token_id) == set(ends)
    same = train(settings_for(places, f"same-stops-{stage}", stage=stage, max_steps=1))
    own = (places[0] / "generation_config.json").read_bytes()
    assert (same / "generation_config.json").read_bytes() == own


def test_a_loss_that_is_no_number_stops_the_run(places):
    with pytest.raises(TrainingError, match="the loss is nan at step"):
        train(settings_for(places, "diverged", lr=1e30, max_grad_norm=0, warmup=0.0))
    with pytest.raises(TrainingError, match="is not finite at step 3, which is not saved"):
        train(settings_for(places, "diverged-2", lr=1e30, max_grad_norm=0, log_steps=100))
    assert not list(places[2].glob("diverged*/checkpoint-*"))


# -- full disks and unfinished runs --------------------------------------------------------------


def test_a_full_disk_keeps_the_last_good_checkpoint(places, monkeypatch):
    from mmqwen.training import trainer as module

    settings = settings_for(places, "full-disk", max_steps=9)
    real, calls = module.save_file, []

    def fill(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "save_file", fill)
    with pytest.raises(
        TrainingError, match=r"No space left on device; the last good.*checkpoint-3"
    ):
        train(settings)
    run = settings.run_folder
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["checkpoint-3"]
    assert not (run / ".saving").exists()
    assert not Path(settings.output).exists()
    output = train(settings)  # with room again
    whole = train(settings_for(places, "no-full-disk", max_steps=9))
    assert losses(output) == pytest.approx(losses(whole), rel=SAME_CURVE)


@pytest.mark.parametrize("stage", ["projector", "full"])
def test_a_write_that_the_system_refuses(places, stage):
    """No mock: the limit of a file's size stands for the disk, whichever library is writing."""
    resource = pytest.importorskip("resource")
    from transformers import TrainerCallback

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 4:
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))

    settings = settings_for(places, f"refused-{stage}", stage=stage, lr=1e-3)
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*checkpoint-6: .*checkpoint-3"):
            train(settings, callbacks=[Fill()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in settings.run_folder.glob("*checkpoint*")) == ["checkpoint-3"]
    assert len(losses(train(settings))) == 6


def test_an_output_that_cannot_be_written_is_written_later(places, monkeypatch):
    from mmqwen.training import output as module

    settings = settings_for(places, "late")

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "copy_small_files", full)
        with pytest.raises(CheckpointError, match=r"No space left.*kept in .*late.run"):
            train(settings)
    assert not Path(settings.output).exists()
    output = train(settings)  # nothing is left to train
    saved = load_file(settings.run_folder / "checkpoint-6/trainable.safetensors")
    assert all(
        torch.equal(v, saved[k]) for k, v in load_file(output / "projectors.safetensors").items()
    )


@pytest.mark.parametrize("stage", ["projector", "lora"])
def test_export_of_a_checkpoint(places, stage, capsys):
    output = train(settings_for(places, f"run-{stage}", stage=stage))
    target = places[2] / f"exported-{stage}"
    checkpoint = places[2] / f"run-{stage}.run" / "checkpoint-6"
    assert main(["train", "--export", str(checkpoint), "-o", str(target)]) == 0
    want, got = tensors_of(output), tensors_of(target)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[n], got[n]) for n in want)
    with pytest.raises(TrainingError, match="not the folder of a training run"):
        export(places[2] / "nothing", places[2] / "new")


def test_a_dataset_changed_in_place_does_not_go_on(places, tmp_path):
    data, evaluation = write_data(tmp_path / "data"), write_data(tmp_path / "eval", 8, seed=1)
    settings = settings_for((places[0], data, tmp_path), "out", eval_data=evaluation)
    train(settings)
    (tmp_path / "out").rename(tmp_path / "moved")
    rows = load_file(evaluation / "rows-m1.safetensors")
    save_file({"rows": rows["rows"] * 2}, evaluation / "rows-m1.safetensors")  # the same size
    with pytest.raises(TrainingError, match=r"eval has changed .*\(rows-m1.safetensors\)"):
        train(settings)
    lines = (data / "data.jsonl").read_bytes()
    with (data / "data.jsonl").open("a") as stream:
        stream.write('{"prompt": "more", "answer": " and more"}\n')
    with pytest.raises(TrainingError, match=r"data has changed .*\(data.jsonl\).*remove"):
        train(settings)
    (data / "data.jsonl").write_bytes(lines)  # the same again, at another time
    (tmp_path / "out.run" / "datasets.json").unlink()  # as the message says
    assert (train(settings) / "projectors.safetensors").is_file()


def test_an_empty_dataset_is_refused_even_without_the_check(places, tmp_path):
    data = write_data(tmp_path / "data")
    (data / "data.jsonl").write_text("")
    settings = settings_for((places[0], data, tmp_path), "out", validate=False)
    with pytest.raises(DatasetError, match="there is no sample"):
        train(settings)


def test_lora_on_projectors_is_refused(places):
    """The projectors are trained whole; peft layers of a connector could not be served."""
    for layer in ("linear_1", "linear_2"):
        with pytest.raises(TrainingError, match=r"lora_layers"):
            train(settings_for(places, "connector", stage="lora", lora_layers=(layer,)))


def test_other_settings_do_not_go_on(places):
    train(settings_for(places, "first"))
    (places[2] / "first").rename(places[2] / "first-moved")
    with pytest.raises(TrainingError, match=r"other settings \(lr=0.01\)"):
        train(settings_for(places, "first", lr=0.5))
