"""Checkpoints changed: modalities added, dropped, renamed; text models and projectors extracted."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import TOLERANCE, start
from mmqwen import MultimodalQwen3Pipeline
from mmqwen.checkpoint import (
    CheckpointError,
    build_checkpoint,
    extract_projector,
    extract_text,
    read_config,
    save_projectors,
)
from mmqwen.checkpoint.surgery import respelled
from mmqwen.checkpoint.trained import read_trained
from mmqwen.cli import main
from mmqwen.data import DatasetWriter
from mmqwen.hf import MultimodalQwen3ForConditionalGeneration
from mmqwen.modalities import ModalityError
from mmqwen.training import TrainSettings, train
from tiny import make_base, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::mmqwen.checkpoint.UntrainedProjectorsWarning")
FILE = "projectors.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("surgery") / "base", max_shard_size="100KB")


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    modalities = {"m1": {"dim": 24, "max_rows": 9}, "m2": 40}
    return build_checkpoint(base, modalities, tmp_path_factory.mktemp("surgery") / "two")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("surgery") / "data"
    with DatasetWriter(path, {"m1": 24}) as writer:
        for at in range(4):
            writer.add("see <|m1|> the", " train", {"m1": [torch.full((2, 24), float(at))]})
    return path


def trained(model, data, output, **options):
    fields = {"max_steps": 2, "tokens_per_step": 64, "cpu": True, "progress": False, "lr": 1e-2}
    return train(TrainSettings(model=model, data=data, output=output, **fields | options))


def text_weights(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    names = model.state_dict().keys() - {n for n in model.state_dict() if "projectors." in n}
    return {name: model.state_dict()[name] for name in names}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_modality_is_added_to_what_is_there(two, base, tmp_path):
    out = build_checkpoint(two, {"m3": 8}, tmp_path / "out")
    old, new = read_config(two).modality_specs, read_config(out).modality_specs
    assert list(new) == ["m1", "m2", "m3"]
    assert {name: new[name] for name in old} == old
    assert new["m3"].token_id == old["m2"].token_id + 1
    before, after = load_file(two / FILE), load_file(out / FILE)
    same(before, {name: after[name] for name in before})
    assert after["projectors.m3.linear_1.weight"].shape == (64, 8)
    same(text_weights(out), text_weights(base))
    for shard in base.glob("*.safetensors"):  # linked once more, under the same name
        assert (out / f"base-{shard.name}").stat().st_ino == shard.stat().st_ino
    assert AutoTokenizer.from_pretrained(out).encode("<|m2|><|m3|>") == [404, 405]


def test_modalities_are_dropped_and_renamed(two, tmp_path):
    out = build_checkpoint(two, {}, tmp_path / "out", drop=["m1"], rename={"m2": "vitals"})
    (spec,) = read_config(out).modality_specs.values()
    assert (spec.name, spec.token, spec.token_id, spec.dim) == ("vitals", "<|vitals|>", 404, 40)
    before, after = load_file(two / FILE), load_file(out / FILE)
    same({n.replace("m2", "vitals"): t for n, t in before.items() if ".m2." in n}, after)
    assert read_trained(out) == {"vitals": False}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode("a<|vitals|>")[-1] == 404
    assert 404 not in tokenizer.encode("<|m2|>")
    assert tokenizer.decode([404], skip_special_tokens=True) == ""
    # The first placeholder is followed by another, and stays; added again, it is the old one.
    again = build_checkpoint(out, {"m1": 8}, tmp_path / "again")
    assert read_config(again).modality_specs["m1"].token_id == 403


def test_names_are_exchanged(two, tmp_path):
    out = build_checkpoint(two, {}, tmp_path / "out", rename={"m1": "m2", "m2": "m1"})
    specs = read_config(out).modality_specs
    assert {name: (s.token_id, s.dim, s.max_rows) for name, s in specs.items()} == {
        "m2": (403, 24, 9),
        "m1": (404, 40, 1024),
    }
    assert AutoTokenizer.from_pretrained(out).encode("<|m2|><|m1|>") == [403, 404]


def test_a_modality_is_replaced_by_another_of_its_name(two, tmp_path):
    out = build_checkpoint(two, {"m2": 7}, tmp_path / "out", drop=["m2"])
    spec = read_config(out).modality_specs["m2"]
    assert (spec.dim, spec.token_id) == (7, 404)
    assert (
        "m2"
        not in AutoTokenizer.from_pretrained(
            build_checkpoint(two, {}, tmp_path / "less", drop=["m2"])
        ).get_added_vocab()
    )


def test_projectors_of_a_file_replace_what_is_there(two, tmp_path):
    other = build_checkpoint(two, {}, tmp_path / "other", drop=["m2"])
    tensors = load_file(other / FILE)
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    specs = read_config(other).modality_specs
    save_projectors(changed, tmp_path / "new.safetensors", trained={"m1": True}, specs=specs)
    out = build_checkpoint(two, {}, tmp_path / "out", projector=tmp_path / "new.safetensors")
    assert torch.equal(
        load_file(out / FILE)["projectors.m1.linear_1.bias"],
        tensors["projectors.m1.linear_1.bias"] + 1,
    )
    assert read_trained(out) == {"m1": True, "m2": False}


def test_a_table_that_is_full_grows_once_more(tmp_path):
    rows = len(make_tokenizer()) + 1
    base = make_base(tmp_path / "base", vocab_size=rows)
    one = build_checkpoint(base, {"m1": 8}, tmp_path / "one")
    out = build_checkpoint(one, {"m2": 8, "m3": 8}, tmp_path / "out")
    config = read_config(out)
    assert config.vocab_size % 64 == 0
    assert config.vocab_size > max(s.token_id for s in config.modality_specs.values())
    weights = text_weights(out)
    assert len(weights["model.embed_tokens.weight"]) == config.vocab_size
    assert torch.equal(
        weights["model.embed_tokens.weight"][:rows],
        text_weights(base)["model.embed_tokens.weight"],
    )
    assert not [name for name in files(out) if name.startswith(".")]


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
def test_a_text_model_comes_out_as_it_went_in(tmp_path, max_shard_size):
    base = make_base(tmp_path / "base", max_shard_size=max_shard_size)
    out = extract_text(build_checkpoint(base, {"m1": 8}, tmp_path / "one"), tmp_path / "out")
    shutil.rmtree(base.with_name("one"))
    same(text_weights(out), text_weights(base))
    model, own = (AutoModelForCausalLM.from_pretrained(path) for path in (out, base))
    assert type(model) is type(own)
    assert model.config.to_dict() == own.config.to_dict() | {"name_or_path": str(out)} or (
        model.config.to_diff_dict() == own.config.to_diff_dict()
    )
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(
        p.name for p in base.glob("*.safetensors")
    )
    for shard in base.glob("*.safetensors"):
        assert (out / shard.name).stat().st_ino == shard.stat().st_ino
    mine, theirs = (AutoTokenizer.from_pretrained(path) for path in (out, base))
    assert mine.get_vocab() == theirs.get_vocab()
    assert mine.chat_template == theirs.chat_template
    assert (out / "generation_config.json").read_bytes() == (
        base / "generation_config.json"
    ).read_bytes()


@pytest.mark.parametrize("stage", ["full", "lora"])
def test_after_training_of_the_language_model(two, data, tmp_path, stage):
    out = trained(two, data, tmp_path / "trained", stage=stage)
    text = extract_text(out, tmp_path / "text")
    whole = MultimodalQwen3ForConditionalGeneration.from_pretrained(out)
    weights = text_weights(text)
    for name, value in whole.state_dict().items():
        if not name.startswith("projectors."):
            assert torch.equal(weights[name], value)
    assert not torch.equal(
        weights["model.layers.0.mlp.up_proj.weight"],
        text_weights(two)["model.layers.0.mlp.up_proj.weight"],
    )
    file = extract_projector(out, "m1", tmp_path)
    again = build_checkpoint(text, {"m1": 24}, tmp_path / "again", projector=file)
    other = MultimodalQwen3ForConditionalGeneration.from_pretrained(again)
    ids, rows = torch.tensor([[5, 403, 403, 6]]), {"m1": torch.ones(2, 24)}
    with torch.no_grad():
        logits = [model(ids, embeddings=rows).logits for model in (whole, other)]
    assert torch.equal(logits[0][..., :403], logits[1][..., :403])


def test_a_model_that_transformers_saved_whole(two, tmp_path):
    saved = tmp_path / "saved"
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(two)
    model.projectors_trained = {"m1": True, "m2": False}
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(two).save_pretrained(saved)
    assert any(n.startswith("projectors.") for n in load_file(saved / "model.safetensors"))
    text = extract_text(saved, tmp_path / "text")
    assert not [n for n in load_file(text / "model.safetensors") if "projectors" in n]
    same(text_weights(text), text_weights(two))
    out = build_checkpoint(saved, {"m3": 8}, tmp_path / "out", drop=["m2"])
    assert read_trained(out) == {"m1": True, "m3": False}
    held = {n for p in out.glob("base-*.safetensors") for n in load_file(p)}
    assert not [name for name in held if name.startswith("projectors.")]
    same(
        {n: t for n, t in load_file(out / FILE).items() if ".m1." in n},
        {n: t for n, t in load_file(two / FILE).items() if ".m1." in n},
    )


def test_a_projector_by_itself_says_what_it_is(two, data, tmp_path):
    out = trained(two, data, tmp_path / "trained")
    file = extract_projector(out, "m1", tmp_path / "m1.safetensors")
    tensors = load_file(file)
    same(tensors, {n: t for n, t in load_file(out / FILE).items() if ".m1." in n})
    with safe_open(file, framework="pt") as handle:
        entry = json.loads(handle.metadata()["mmqwen.projectors"])["m1"]
    assert (entry["dim"], entry["hidden_dim"]) == (24, 64)
    assert read_trained(file) == {"m1": True}
    other = extract_projector(out, "m2", tmp_path)
    assert other == tmp_path / "m2.safetensors"
    assert read_trained(other) == {"m2": False}


def test_an_adapter_that_is_not_merged_is_left_out_with_a_word(two, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(two, source)
    (source / "adapter").mkdir()
    with pytest.warns(UserWarning, match="adapter, a LoRA adapter that is not merged"):
        build_checkpoint(source, {"m3": 8}, tmp_path / "out")


def test_quantization_goes_back_to_the_text_model(base, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(base, mine)
    config = json.loads((mine / "config.json").read_text())
    given = {"quant_method": "awq", "modules_to_not_convert": ["lm_head"]}
    (mine / "config.json").write_text(json.dumps(config | {"quantization_config": given}))
    one = build_checkpoint(mine, {"m1": 8}, tmp_path / "one")
    two = build_checkpoint(one, {"m2": 8}, tmp_path / "two")
    found = json.loads((two / "config.json").read_text())["quantization_config"]
    assert found["modules_to_not_convert"] == ["lm_head", "projectors"]
    text = extract_text(two, tmp_path / "text")
    assert json.loads((text / "config.json").read_text())["quantization_config"] == given


MISTAKES = [
    (["build", "--drop", "m3"], "has no modality 'm3', only ['m1', 'm2']"),
    (["build", "--rename", "m3=a"], "has no modality 'm3'"),
    (["build", "--rename", "m1=m2"], "two modalities would be called 'm2'"),
    (["build", "--rename", "m1=a", "--rename", "m2=a"], "two modalities would be called 'a'"),
    (["build", "--rename", "m1=a", "--rename", "m1=b"], "--rename names 'm1' twice"),
    (["build", "--rename", "m1"], "expected OLD=NEW"),
    (["build", "--rename", "m1=image"], "'image' is reserved"),
    (["build", "--rename", "m1=a b"], "is not an identifier"),
    (["build", "--rename", "m1=im_end"], "is a token of the tokenizer already"),
    (["build", "--rename", "m1=a", "--drop", "m1"], "do one of the two"),
    (["build", "--drop", "m1", "--drop", "m2"], "at least one"),
    (["build", "--modality", "m1=24"], "two modalities would be called 'm1'"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_changes_that_cannot_be_made(two, tmp_path, capsys, arguments, words):
    command, *flags = arguments
    out = tmp_path / "out"
    assert main([command, "--base", str(two), *flags, "-o", str(out)]) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert files(tmp_path) == []


def test_a_text_model_has_nothing_to_drop_or_extract(base, two, tmp_path, capsys):
    for flags in (["--drop", "m1"], ["--rename", "m1=m2"]):
        out = ["--modality", "m2=8", *flags, "-o", str(tmp_path / "out")]
        assert main(["build", "--base", str(base), *out]) == 2
        assert "is a text model, which has no modality 'm1'" in capsys.readouterr().err
    for arguments, words in [
        (["text", str(base), "-o", str(tmp_path / "out")], "expected 'multimodal_qwen3'"),
        (["text", str(tmp_path / "none"), "-o", str(tmp_path / "out")], "no such directory"),
        (["projector", str(base), "m1", "-o", str(tmp_path / "f")], "expected 'multimodal_qwen3'"),
        (["projector", str(two), "m3", "-o", str(tmp_path / "f")], "has no modality 'm3'"),
    ]:
        assert main(["extract", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert files(tmp_path) == []


def test_what_exists_is_not_written_over(two, tmp_path, capsys):
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (folder / "m1.safetensors").write_text("mine")
    for arguments in (
        ["text", str(two), "-o", str(file)],
        ["text", str(two), "-o", str(folder)],
        ["projector", str(two), "m1", "-o", str(file)],
        ["projector", str(two), "m1", "-o", str(folder)],
    ):
        assert main(["extract", *arguments]) == 2
        error = capsys.readouterr().err
        assert "exists" in error or "not empty" in error
    assert file.read_text() == (folder / "m1.safetensors").read_text() == "mine"
    assert files(tmp_path) == ["file", "folder", "m1.safetensors"]


def test_nothing_is_left_behind_by_a_failure(two, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("mmqwen.checkpoint.surgery.place_file", fail)
    for change in (
        lambda out: extract_text(two, out),
        lambda out: build_checkpoint(two, {"m3": 8}, out),
    ):
        with pytest.raises(CheckpointError, match="no space left"):
            change(tmp_path / "out")
        assert files(tmp_path) == []


def test_respelling_keeps_ids_and_takes_out_the_last_alone(two):
    tokenizer = AutoTokenizer.from_pretrained(two)
    less = respelled(tokenizer, {}, ["<|m1|>"])  # another follows it
    assert less.get_vocab() == tokenizer.get_vocab()
    less = respelled(tokenizer, {}, ["<|m1|>", "<|m2|>"])
    assert set(tokenizer.get_vocab()) - set(less.get_vocab()) == {"<|m1|>", "<|m2|>"}
    with pytest.raises(ModalityError, match="is a token of the tokenizer already"):
        respelled(tokenizer, {"<|m1|>": "<|m2|>"})


def test_the_tour_ends_at_a_server(base, data, tmp_path, capsys):
    """Train A; add B later; rename; extract; rebuild elsewhere; serve."""
    pytest.importorskip("vllm")
    first = build_checkpoint(base, {"m1": 24}, tmp_path / "first")
    taught = trained(first, data, tmp_path / "taught")
    run = [
        ["build", "--base", taught, "--modality", "m2=40", "-o", tmp_path / "added"],
        ["build", "--base", tmp_path / "added", "--rename", "m1=vitals", "-o", tmp_path / "named"],
        ["extract", "text", tmp_path / "named", "-o", tmp_path / "text"],
        ["extract", "projector", tmp_path / "named", "vitals", "-o", tmp_path / "v.safetensors"],
        ["extract", "projector", tmp_path / "named", "m2", "-o", tmp_path / "m2.safetensors"],
    ]
    for command in run:
        assert main([str(word) for word in command]) == 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rebuilt = build_checkpoint(
            tmp_path / "text",
            {"m2": 40, "vitals": 24},
            tmp_path / "elsewhere" / "rebuilt",
            projector=[tmp_path / "v.safetensors", tmp_path / "m2.safetensors"],
        )
    untrained = [str(w.message) for w in said if "UNTRAINED" in str(w.message)]
    assert [text.startswith("the projectors of m2 are") for text in untrained] == [True]
    for name in ("first", "taught", "added", "named", "text"):
        shutil.rmtree(tmp_path / name)

    rows = {"vitals": [torch.full((2, 24), 2.0)], "m2": [torch.linspace(-1, 1, 40)]}
    prompt = {"prompt": "see <|vitals|> or <|m2|> the", "multi_modal_data": rows}
    options = {"dtype": "float32", "max_model_len": 128}
    fast = {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 64}
    with MultimodalQwen3Pipeline(rebuilt, **options, **fast) as pipeline:
        (served,) = pipeline.generate(prompt, max_tokens=6, return_full=True)
    with MultimodalQwen3Pipeline(rebuilt, engine="transformers", **options) as pipeline:
        (twin,) = pipeline.generate(prompt, max_tokens=6, return_full=True)
    assert served.logprobs == pytest.approx(twin.logprobs, abs=TOLERANCE)

    again = build_checkpoint(base, {"m1": 24}, tmp_path / "again")  # the same start
    expected = trained(again, data, tmp_path / "expected")
    same(
        {n.replace("m1", "vitals"): t for n, t in load_file(expected / FILE).items()},
        {n: t for n, t in load_file(rebuilt / FILE).items() if "vitals" in n},
    )


def test_an_extracted_text_model_is_served_as_the_base_is(base, two, tmp_path):
    pytest.importorskip("vllm")
    from vllm import SamplingParams

    text = extract_text(two, tmp_path / "text")
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0)
    (output,) = start(text, max_model_len=128).generate("the lazy dog", params, use_tqdm=False)
    prompt, said = output.prompt_token_ids, list(output.outputs[0].token_ids)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(torch.tensor([prompt + said])).logits[0]
    rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == said
    wanted = float(rows.max(-1).values.sum())
    assert output.outputs[0].cumulative_logprob == pytest.approx(wanted, abs=6 * TOLERANCE)
