"""The command line: what users type, and what they see when they mistype."""

from __future__ import annotations

import json

import pytest

from mmqwen.cli import main, parse_modality_flag
from mmqwen.modalities import ModalityError
from tiny import make_base


def test_modality_flags():
    assert parse_modality_flag("m1=768") == ("m1", {"dim": 768})
    assert parse_modality_flag("m2=512:hidden=1024:max_rows=64:token=<|x|>") == (
        "m2",
        {"dim": 512, "hidden_dim": 1024, "max_rows": 64, "token": "<|x|>"},
    )
    assert parse_modality_flag("m1") == ("m1", {}), "a projector's file may tell the width"
    assert parse_modality_flag(
        "m=8:activation=gelu:norm=rms:norm_eps=1e-6:bias=False:layers=2"
    ) == (
        "m",
        {
            "dim": 8,
            "activation": "gelu",
            "norm": "rms",
            "norm_eps": 1e-6,
            "bias": False,
            "layers": 2,
        },
    )


@pytest.mark.parametrize(
    "flag",
    [
        *("8", "m1=\u00b2", "m1=", "m1=x", "m1=-3", "m1=8:hidden", "m1=8:depth=2"),
        *("m1=8:bias=1", "m1=8:layers=two", "m1=8:norm_eps=small", "m1=8:activation="),
    ],
)
def test_bad_modality_flags(flag):
    with pytest.raises(ModalityError, match="--modality"):
        parse_modality_flag(flag)


def test_build_writes_a_checkpoint_that_transformers_loads(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    target = tmp_path / "out"
    flags = ["--modality", "m1=24", "--modality", "m2=8:max_rows=4"]
    assert main(["build", "--base", str(base), *flags, "-o", str(target)]) == 0
    printed = capsys.readouterr()
    assert str(target) in printed.out
    assert "UNTRAINED" in printed.err
    assert ".py" not in printed.err, "a warning shows where in our code it was raised"
    config = json.loads((target / "config.json").read_text())
    assert config["modalities"]["m2"]["dim"] == 8
    assert config["modalities"]["m2"]["max_rows"] == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--base", "/no/such/model", "--modality", "m1=8", "-o", "out"], ["/no/such"]),
        (["build", "--base", "x", "--modality", "8", "-o", "out"], ["--modality", "NAME=WIDTH"]),
        (
            ["build", "--base", "x", "--modality", "a=8", "--modality", "a=9", "-o", "out"],
            ["twice"],
        ),
        (["fly"], ["fly"]),
        (["build"], ["--base"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_unwritable_output_folder(tmp_path, capsys):
    base = make_base(tmp_path / "base")
    (tmp_path / "file").write_text("not a folder")
    target = str(tmp_path / "file" / "out")
    assert main(["build", "--base", str(base), "--modality", "m1=8", "-o", target]) == 2
    assert "file" in capsys.readouterr().err


def test_brackets_in_a_message_are_not_markup(tmp_path, capsys):
    base = tmp_path / "[bold]base[/nothing]"
    assert (
        main(["build", "--base", str(base), "--modality", "m1=8", "-o", str(tmp_path / "o")]) == 2
    )
    error = capsys.readouterr().err
    assert "[bold]base[/nothing]" in error
    assert error.count("\n") == 1


def test_version(capsys):
    from mmqwen import __version__

    for asked in ("version", "--version"):
        assert main([asked]) == 0
        assert capsys.readouterr().out.strip() == __version__


def test_help_shows_the_syntax(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["--help"]) == 0
    assert "mmqwen serve CHECKPOINT [any vLLM flag]" in capsys.readouterr().out
    assert main(["build", "--help"]) == 0
    assert "NAME=WIDTH[:hidden=N][:max_rows=N][:token=TEXT]" in capsys.readouterr().out
