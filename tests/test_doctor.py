"""The environment report, also when parts are broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from mmqwen import doctor
from mmqwen.checkpoint import save_projectors
from mmqwen.cli import main
from tiny import make_composite


def test_report_is_json_and_names_what_matters(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(doctor, "_imports", lambda: {"torch": "ok"})
    assert main(["doctor", "--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert found["versions"]["mmqwen"]
    assert found["versions"]["torch"]
    assert found["devices"]
    assert ":" in found["backend"], "the backend comes with its reason"
    assert "in use" in found["native_helper"], "and so does the native helper"
    assert "secret" not in text


def test_broken_parts_are_reported_not_raised(capsys, monkeypatch):
    def broken():
        raise RuntimeError("operator torchvision::nms does not exist")

    for probe in ("_devices", "_backend", "_nvidia_smi", "_plugin", "_versions"):
        monkeypatch.setattr(doctor, probe, broken)
    monkeypatch.setattr(doctor, "_imports", lambda: {"vllm": "ImportError: boom"})
    assert main(["doctor"]) == 0
    assert "torchvision::nms" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(("value", "line"), [("0", "MMQWEN_NATIVE=0"), (None, "compiled")])
def test_the_native_helper_is_named_with_a_reason(monkeypatch, value, line):
    from mmqwen_kernels import native

    if value is None:
        monkeypatch.delenv("MMQWEN_NATIVE", raising=False)
    else:
        monkeypatch.setenv("MMQWEN_NATIVE", value)
    helper, reason = native._load()
    monkeypatch.setattr(native, "helper", helper)
    monkeypatch.setattr(native, "_reason", reason)
    assert line in doctor._native()
    assert doctor._native().startswith("in use" if helper else "not in use, Python does its work")


def test_an_import_that_crashes_is_a_line(monkeypatch, tmp_path):
    (tmp_path / "transformers.py").write_text("import os; os._exit(3)")
    (tmp_path / "vllm.py").write_text("raise ImportError('no libcuda')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answers = doctor._imports()
    assert answers["transformers"] == "exit code 3"
    assert "no libcuda" in answers["vllm"]


def test_advice_names_the_remedy():
    found = {
        "versions": {"torch": "2.13.0+cpu", "torchvision": "0.28.0"},
        "imports": {"torch": "ok", "vllm": "ModuleNotFoundError: No module named 'vllm'"},
        "plugin": "not registered",
    }
    advice = "\n".join(doctor._advice(found))
    assert "uninstall ['torchvision']" in advice
    assert "pip install" in advice
    assert "import vllm" in advice


def test_a_failed_probe_costs_no_other_advice():
    found = {
        "versions": "error: boom",
        "imports": "error: boom",
        "plugin": "not registered",
        "checkpoint": {"untrained": ["site"], "problems": ["it is truncated"]},
    }
    advice = "\n".join(doctor._advice(found))
    assert "pip install -e" in advice
    assert "site are UNTRAINED" in advice
    assert "it is truncated" in advice
    assert "vLLM is missing" not in advice


def test_one_package_without_metadata_costs_no_other_version(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "numpy":
            raise KeyError("Version")
        return None if name == "torch" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor._versions()
    assert found["numpy"].startswith("error: KeyError")
    assert found["torch"] == "unknown"
    assert found["safetensors"] == real("safetensors")


# -- a checkpoint ------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_imports", lambda: {"torch": "ok"})
    path = make_composite(tmp_path / "model", {"m1": 24, "m2": 40, "m3": 8})
    file = path / "projectors.safetensors"
    save_projectors(load_file(file), file, trained={"m1": True, "m2": False})
    return path


def examine(capsys, path):
    status = main(["doctor", "--json", str(path)])
    found = json.loads(capsys.readouterr().out)
    return status, found["checkpoint"], found["advice"]


def test_a_checkpoint_is_described(checkpoint, capsys):
    status, found, advice = examine(capsys, checkpoint)
    assert status == 0
    assert found["problems"] == []
    assert found["model"] == "multimodal_qwen3 over qwen3"
    assert found["projectors"] == {
        "m1": "<|m1|>, 24 wide: trained",
        "m2": "<|m2|>, 40 wide: UNTRAINED",
        "m3": "<|m3|>, 8 wide: not recorded whether trained",
    }
    lines = [line for line in advice if "UNTRAINED" in line]
    assert len(lines) == 1
    assert "projectors of m2 are UNTRAINED" in lines[0]
    assert main(["doctor", str(checkpoint)]) == 0
    assert "UNTRAINED" in capsys.readouterr().out


def test_a_text_model_is_described(checkpoint, capsys):
    status, found, _ = examine(capsys, checkpoint.with_name("model-base"))
    assert (status, found["problems"], found["projectors"]) == (0, [], {})
    assert found["model"] == "qwen3, a model without modalities"


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def add_adapter(path):
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_model.safetensors").write_bytes(b"")


def name_another(path):
    config = json.loads((path / "config.json").read_text())
    config["modalities"]["m4"] = {"dim": 4, "token_id": 410}
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: cut(p / "projectors.safetensors"), "projectors.safetensors is truncated"),
        (lambda p: (p / "base-model.safetensors").unlink(), "base-model.safetensors of the index"),
        (lambda p: (p / "config.json").write_text("[1]"), "config.json cannot be read"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (add_adapter, "adapter_model.safetensors is empty"),
        (name_another, "modality 'm4' has no projector"),
        (
            lambda p: (p / "generation_config.json").write_text("{"),
            "generation_config.json: cannot",
        ),
    ],
)
def test_what_is_broken_is_named(checkpoint, capsys, damage, words):
    damage(checkpoint)
    status, found, advice = examine(capsys, checkpoint)
    assert status == 1
    assert len(found["problems"]) == 1
    assert words in found["problems"][0]
    assert found["problems"][0] in advice
    assert main(["doctor", str(checkpoint / "nowhere")]) == 1
    assert "no such directory" in capsys.readouterr().out.replace("\n", " ")


def test_a_checkpoint_is_looked_at_where_nothing_can_be_imported(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("torch", "transformers", "vllm", "numpy", "safetensors", "huggingface_hub"):
        (broken / f"{name}.py").write_text("raise ImportError('broken')")
    paths = [str(broken), *(entry for entry in sys.path if entry)]
    done = subprocess.run(
        [sys.executable, "-m", "mmqwen.cli", "doctor", "--json", str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["imports"]["torch"] == "ImportError: broken"
    assert found["checkpoint"]["problems"] == []
    assert found["checkpoint"]["projectors"]["m2"].endswith("UNTRAINED")
