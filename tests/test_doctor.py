"""The environment report, also when parts are broken."""

from __future__ import annotations

import json

from mmqwen import doctor
from mmqwen.cli import main


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
    assert "secret" not in text


def test_broken_parts_are_reported_not_raised(capsys, monkeypatch):
    def broken():
        raise RuntimeError("operator torchvision::nms does not exist")

    for probe in ("_devices", "_backend", "_nvidia_smi", "_plugin", "_versions"):
        monkeypatch.setattr(doctor, probe, broken)
    monkeypatch.setattr(doctor, "_imports", lambda: {"vllm": "ImportError: boom"})
    assert main(["doctor"]) == 0
    assert "torchvision::nms" in capsys.readouterr().out.replace("\n", " ")


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
