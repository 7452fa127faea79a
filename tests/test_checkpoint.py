"""`mmqwen build`: linking, joining, resizing, projector files, refusals."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmqwen.checkpoint import (
    CheckpointError,
    UntrainedProjectorsWarning,
    build_checkpoint,
    load_projectors,
    read_config,
    save_projectors,
)
from mmqwen.checkpoint import index as index_file
from mmqwen.cli import main
from mmqwen.modalities import ModalityError, parse_modalities
from tiny import make_base, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::mmqwen.checkpoint.UntrainedProjectorsWarning")
MODALITIES = {"m1": 24, "m2": 40}
ROWS = 467


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "sharded", max_shard_size="100KB")


RELU = {"activation": "relu"}
"""Metadata: whose activation is nowhere told, that projector is refused."""


def projector(dim=24, hidden=64, out=64, value=0.5):
    return {
        "linear_1.weight": torch.full((hidden, dim), value),
        "linear_1.bias": torch.zeros(hidden),
        "linear_2.weight": torch.full((out, hidden), value),
        "linear_2.bias": torch.zeros(out),
    }


def weights(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    return model.state_dict()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_base_weights_keep_their_names_and_bytes(tmp_path, family, tied):
    base = make_base(tmp_path / "base", family, "bfloat16", tie_word_embeddings=tied)
    out = build_checkpoint(base, MODALITIES, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with safe_open(base / "model.safetensors", framework="pt") as handle:
        names = set(handle.keys())
    assert {n for n in index["weight_map"] if not n.startswith("projectors.")} == names
    assert (out / "base-model.safetensors").samefile(base / "model.safetensors")
    for file in set(index["weight_map"].values()):
        assert (out / file).is_file()
    ours, theirs = weights(out), weights(base)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {ours[n].dtype for n in ours} == {torch.bfloat16}
    assert (out / "generation_config.json").is_file()


def test_ids_are_assigned_at_unused_rows(base, tmp_path):
    out = build_checkpoint(
        base, {**MODALITIES, "m3": {"dim": 2, "token": "<|im_start|>"}}, tmp_path / "out"
    )
    config = read_config(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    free = len(make_tokenizer())
    ids = {name: spec.token_id for name, spec in config.modality_specs.items()}
    assert ids == {
        "m1": free,
        "m2": free + 1,
        "m3": tokenizer.convert_tokens_to_ids("<|im_start|>"),
    }
    assert tokenizer("a<|m1|>b<|m2|>")["input_ids"][1::2] == [free, free + 1]
    assert config.vocab_size == ROWS
    plain = AutoTokenizer.from_pretrained(base)
    text = "Describe the 3 bridges, <|im_end|> naïvely — and 日本."
    assert tokenizer(text)["input_ids"] == plain(text)["input_ids"]
    assert tokenizer.chat_template == plain.chat_template
    assert str(base) not in (out / "config.json").read_text()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_full_table_is_grown_by_its_mean(tmp_path, tied, size):
    full = len(make_tokenizer())
    base = make_base(
        tmp_path / "base", vocab_size=full, tie_word_embeddings=tied, max_shard_size=size
    )
    out = build_checkpoint(base, MODALITIES, tmp_path / "out")
    config = read_config(out)
    assert config.vocab_size == 448  # 405 tokens, padded to 64
    ours, theirs = weights(out), weights(base)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name][: len(tensor)], tensor)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            mean = tensor.double().mean(0).expand(448 - full, -1)  # in any order, then rounded
            orders = full * 2**-52 * tensor.abs().max().item()
            torch.testing.assert_close(ours[name][full:].double(), mean, rtol=2**-24, atol=orders)
        else:
            assert ours[name].shape == tensor.shape
    linked = [f for f in out.glob("base-*") if (base / f.name[5:]).samefile(f)]
    assert len(linked) == len(list(base.glob("*.safetensors"))) - (
        1 if size == "5GB" else 1 + (not tied)
    )


def test_shards_are_linked_copied_or_symlinked(sharded, tmp_path, monkeypatch):
    names = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(names) > 2
    copied = build_checkpoint(sharded, MODALITIES, tmp_path / "copied", copy=True)
    linked = build_checkpoint(sharded, MODALITIES, tmp_path / "linked")

    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr(os, "link", refuse)
    soft = build_checkpoint(sharded, MODALITIES, tmp_path / "soft")
    for name in names:
        assert not (copied / f"base-{name}").samefile(sharded / name)
        assert (linked / f"base-{name}").samefile(sharded / name)
        assert not (linked / f"base-{name}").is_symlink()
        assert (soft / f"base-{name}").readlink() == (sharded / name).resolve()
    assert weights(copied).keys() == weights(linked).keys() == weights(soft).keys()


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_a_checkpoint_outlives_its_base_and_never_writes_to_it(sharded, tmp_path, size):
    mine = tmp_path / "mine"
    shutil.copytree(sharded, mine)
    out = build_checkpoint(mine, MODALITIES, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(out, max_shard_size=size)
    assert not weights(out)["lm_head.weight"].any()
    left = {file.name for file in out.glob("*.safetensors*")}  # vLLM follows the index: none stale
    if size == "5GB":
        assert left == {"model.safetensors"}
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert left == {"model.safetensors.index.json", *index["weight_map"].values()}
    assert weights(mine)["lm_head.weight"].any()
    again = build_checkpoint(mine, MODALITIES, tmp_path / "again")
    shutil.rmtree(mine)
    assert weights(again)["lm_head.weight"].any()


def test_snapshots_of_the_hub_cache_are_links_to_blobs(base, tmp_path):
    snapshot = tmp_path / "snapshot"
    shutil.copytree(base, snapshot)
    (snapshot / "model.safetensors").rename(tmp_path / "blob")
    (snapshot / "model.safetensors").symlink_to("../blob")
    out = build_checkpoint(snapshot, MODALITIES, tmp_path / "out")
    assert not (out / "base-model.safetensors").is_symlink()
    assert (out / "base-model.safetensors").samefile(tmp_path / "blob")


def test_fresh_projectors_warn_and_depend_on_the_seed_and_their_name_alone(base, tmp_path):
    with pytest.warns(UntrainedProjectorsWarning, match="m1, m2 are UNTRAINED"):
        first = build_checkpoint(base, MODALITIES, tmp_path / "a")
    alone = build_checkpoint(base, {"m2": 40}, tmp_path / "b")
    other = build_checkpoint(base, MODALITIES, tmp_path / "c", seed=1)
    one, two, three = (load_file(p / "projectors.safetensors") for p in (first, alone, other))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    key = "projectors.m1.linear_1.weight"
    assert not torch.equal(one[key], three[key])


@pytest.mark.parametrize("form", ["projectors.m1.", "m1.", ""])
def test_projector_files_in_each_spelling(base, tmp_path, form, recwarn):
    file = tmp_path / "p.safetensors"
    save_file({form + k: v for k, v in projector(hidden=7).items()}, file, RELU)
    out = build_checkpoint(base, {"m1": 24}, tmp_path / "out", projector=file)
    assert not [w for w in recwarn if w.category is UntrainedProjectorsWarning]
    assert read_config(out).modality_specs["m1"].hidden_dim == 7
    assert (weights(out)["projectors.m1.linear_1.weight"] == 0.5).all()


def test_several_files_and_one_modality_left_fresh(base, tmp_path):
    for name, dim in (("m1", 24), ("m2", 40)):
        save_file({f"{name}.{k}": v for k, v in projector(dim).items()}, tmp_path / name, RELU)
    with pytest.warns(UntrainedProjectorsWarning, match="of m3 are"):
        out = build_checkpoint(
            base,
            {**MODALITIES, "m3": 3},
            tmp_path / "out",
            projector=[tmp_path / "m1", tmp_path / "m2"],
        )
    tensors = load_projectors(out, read_config(out).modality_specs, 64)
    assert len(tensors) == 12
    assert (tensors["projectors.m2.linear_2.weight"] == 0.5).all()


def test_projectors_of_a_trained_model_drop_in(base, tmp_path):
    out = build_checkpoint(base, MODALITIES, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.projectors["m1"].linear_1.bias.fill_(3.0)
    file = save_projectors(model, tmp_path / "trained.safetensors")
    assert all(name.startswith("projectors.") for name in load_file(file))
    model.save_pretrained(tmp_path / "whole")
    for number, source in enumerate((file, tmp_path / "whole")):
        again = build_checkpoint(base, MODALITIES, tmp_path / str(number), projector=source)
        assert (weights(again)["projectors.m1.linear_1.bias"] == 3.0).all()
    save_projectors(model, out)  # in place: the base's shards stay linked
    assert (weights(out)["projectors.m1.linear_1.bias"] == 3.0).all()
    with pytest.raises(CheckpointError, match="no tensor named projectors"):
        save_projectors({"lm_head.weight": torch.zeros(1)}, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"m1.linear_1.weight": torch.zeros(64, 25)},
            r"linear_1.weight has shape \[64, 25\], expected \[64, 24\]",
        ),
        ({"m1.linear_2.weight": torch.zeros(32, 64)}, r"has shape \[32, 64\], expected \[64, 64\]"),
        ({"m1.linear_1.bias": None}, "tensor projectors.m1.linear_1.bias is missing"),
        ({"m1.linear_3.bias": torch.zeros(64)}, "'m1.linear_3.bias' belongs to none"),
        ({"projectors.m1.linear_1.bias": torch.zeros(64)}, "appears twice"),
        ({"m1.linear_1.bias": torch.full((64,), torch.nan)}, "not floating-point and finite"),
        ({"m1.linear_1.bias": torch.zeros(64, dtype=torch.long)}, "not floating-point and finite"),
    ],
)
def test_bad_projector_files_are_refused(base, tmp_path, change, words):
    tensors = {f"m1.{k}": v for k, v in projector().items()} | change
    kept = {k: v for k, v in tensors.items() if v is not None}
    save_file(kept, tmp_path / "p.safetensors", RELU)
    with pytest.raises(CheckpointError, match=words):
        build_checkpoint(base, MODALITIES, tmp_path / "out", projector=tmp_path / "p.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["p.safetensors"]


def test_a_missing_modality_or_file_is_refused(base, tmp_path):
    save_file({f"m1.{k}": v for k, v in projector().items()}, tmp_path / "p.safetensors", RELU)
    with pytest.raises(CheckpointError, match=r"projectors.m2.linear_1.weight is missing"):
        load_projectors(tmp_path / "p.safetensors", parse_modalities(MODALITIES), 64)
    with pytest.raises(CheckpointError, match="not found"):
        build_checkpoint(base, MODALITIES, tmp_path / "out", projector=tmp_path / "no.safetensors")
    (tmp_path / "junk").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        build_checkpoint(base, MODALITIES, tmp_path / "out", projector=tmp_path / "junk")


def edit_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rename(path, old, new):
    tensors = load_file(path / "model.safetensors")
    tensors[new] = tensors.pop(old)
    save_file(tensors, path / "model.safetensors")


def only_bin(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (only_bin, r"only PyTorch \.bin weights"),
        (lambda p: (p / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: edit_config(p, model_type="no_such"), "cannot be read"),
        (
            lambda p: rename(p, "model.norm.weight", "transformer.ln_f"),
            "'transformer.ln_f': expected",
        ),
        (lambda p: rename(p, "lm_head.weight", "model.x"), "lm_head.weight is missing"),
        (
            lambda p: rename(p, "model.embed_tokens.weight", "model.x"),
            "embed_tokens.weight is missing",
        ),
        (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 99), "not a safetensors file"),
    ],
)
def test_bases_that_cannot_be_used_are_refused(base, tmp_path, damage, words):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    damage(broken)
    with pytest.raises(CheckpointError, match=words):
        build_checkpoint(broken, MODALITIES, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["broken"]


def cut(file, keep):
    with open(file, "r+b") as stream:
        stream.truncate(keep if keep >= 0 else file.stat().st_size + keep)


def lengthen(file):
    with open(file, "ab") as stream:
        stream.write(b"\0")


def replace_with(make):
    def damage(file):
        file.unlink()
        make(file)

    return damage


def edit_header(file, change):
    """Rewrite the JSON header in its own length; `change` must not lengthen it."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length])
    file.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def swap_an_end(text):
    header = json.loads(text)
    entry = next(entry for name, entry in header.items() if name != "__metadata__")
    entry["data_offsets"] = entry["data_offsets"][::-1]
    return json.dumps(header, separators=(",", ":")).encode()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
DAMAGES = {
    "last byte cut": (lambda f: cut(f, -1), "is truncated: got .* expected .* by its header"),
    "half": (lambda f: cut(f, f.stat().st_size // 2), "is truncated: got"),
    "cut in the header": (lambda f: cut(f, 100), "is truncated: got 100 bytes, expected"),
    "only the length": (lambda f: cut(f, 8), "is truncated: got 8 bytes, expected"),
    "cut in the length": (lambda f: cut(f, 5), "is not a safetensors file"),
    "too long": (lengthen, "is longer than it should be: got .* expected"),
    "empty": (lambda f: cut(f, 0), "is empty"),
    "pointer": (lambda f: f.write_bytes(POINTER), "Git LFS pointer.*git lfs pull"),
    "page": (lambda f: f.write_bytes(b"<!DOCTYPE html>" * 99), "is not a safetensors file"),
    "no JSON": (lambda f: edit_header(f, lambda text: b"{" * 50), "its header is no JSON"),
    "deep": (lambda f: f.write_bytes(b"\0\0\1\0\0\0\0\0" + b"[" * 65536), "its header is no JSON"),
    "no object": (lambda f: edit_header(f, lambda text: b"[1]"), "its header is no JSON object"),
    "no entries": (lambda f: edit_header(f, lambda text: b'{"model.x":3}'), "its header is wrong"),
    "offsets": (lambda f: edit_header(f, swap_an_end), "its header is wrong"),
    "shape": (
        lambda f: edit_header(f, lambda text: text.replace(b"[64]", b"[65]", 1)),
        "has 256 bytes, expected 260",
    ),
    "directory": (replace_with(lambda f: f.mkdir()), "is a directory"),
    "pipe": (replace_with(os.mkfifo), "is no regular file"),
    "link to nothing": (replace_with(lambda f: f.symlink_to("gone")), "link to gone.* not found"),
}
damages = pytest.mark.parametrize("damage", DAMAGES)


def refused(folder, file, words, base, **options):
    """Build into `folder`, which is left as it was; the message names the file in one line."""
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError, match=words) as caught:
        build_checkpoint(base, MODALITIES, folder / "out", **options)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(folder)) == before


@damages
def test_a_broken_weight_file_is_refused(base, tmp_path, damage):
    act, words = DAMAGES[damage]
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    act(broken / "model.safetensors")
    refused(tmp_path, broken / "model.safetensors", words, broken)


@damages
def test_a_broken_shard_is_refused(sharded, tmp_path, damage):
    act, words = DAMAGES[damage]
    broken = tmp_path / "broken"
    shutil.copytree(sharded, broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    shard = broken / index["weight_map"]["model.norm.weight"]
    act(shard)
    refused(tmp_path, shard, words, broken)


@damages
def test_a_broken_projector_file_is_refused(base, tmp_path, damage):
    act, words = DAMAGES[damage]
    file = tmp_path / "p.safetensors"
    save_file({f"m1.{k}": v for k, v in projector().items()}, file)
    act(file)
    refused(tmp_path, file, words, base, projector=file)


def test_a_broken_file_is_one_line_and_exit_code_2(base, tmp_path, capsys):
    broken, file = tmp_path / "broken", tmp_path / "p.safetensors"
    shutil.copytree(base, broken)
    cut(broken / "model.safetensors", -1)
    save_file({f"m1.{k}": v for k, v in projector().items()}, file)
    cut(file, -1)
    flags = ["--modality", "m1=24", "-o", str(tmp_path / "out")]
    for options in (["--base", str(broken)], ["--base", str(base), "--projector", str(file)]):
        assert main(["build", *options, *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "truncated" in error
    assert sorted(os.listdir(tmp_path)) == ["broken", "p.safetensors"]


def test_a_file_that_may_not_be_read_is_refused(base, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_file, "open", refuse, raising=False)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: Permission"):
        index_file.read_header(base / "model.safetensors")


def test_headers_of_every_dtype_pass_and_every_prefix_fails(tmp_path):
    file = tmp_path / "all.safetensors"
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
    dtypes += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(dtype): torch.zeros(3, 5).to(dtype) for dtype in dtypes}
    save_file(tensors | {"none": torch.zeros(0, 4), "one": torch.tensor(1.0)}, file)
    header, start = index_file.read_header(file)
    assert header.keys() == tensors.keys() | {"none", "one"}
    whole = file.read_bytes()
    assert start < len(whole)
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"truncated|empty|not a safetensors"):
            index_file.read_header(file)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_pointers_in_place_of_small_files_are_refused(base, tmp_path, name):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / name).write_bytes(POINTER)
    refused(tmp_path, broken / name, "Git LFS pointer", broken)


def test_pointers_for_files_that_nobody_reads_do_no_harm(base, tmp_path):
    """`git lfs pull --include '*.safetensors'` leaves the other weights and pictures."""
    partly = tmp_path / "partly"
    shutil.copytree(base, partly)
    for name in ("pytorch_model.bin", "figure.png", "consolidated.safetensors"):
        (partly / name).write_bytes(POINTER)
    build_checkpoint(partly, MODALITIES, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*consolidated*"))


def test_a_tokenizer_that_cannot_be_read_is_refused(base, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "tokenizer.json").write_text('{"model":')
    refused(tmp_path, broken, "its tokenizer cannot be read", broken)


def test_a_lora_adapter_is_no_base(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refused(tmp_path, adapter, "LoRA adapter, expected a whole model", adapter)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"weight_map": {"model.norm.weight"', "not an index of shards"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {}}', "not an index of shards"),
        ('{"weight_map": {"model.norm.weight": "../elsewhere"}}', "expected a file beside"),
        ('{"weight_map": {"model.norm.weight": 3}}', "expected a file beside"),
        (POINTER.decode(), "Git LFS pointer"),
    ],
)
def test_a_broken_index_is_refused(sharded, tmp_path, text, words):
    broken = tmp_path / "broken"
    shutil.copytree(sharded, broken)
    (broken / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, broken / "model.safetensors.index.json", words, broken)


def test_a_shard_without_what_the_index_promises_is_refused(sharded, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sharded, broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    shard = broken / index["weight_map"]["model.norm.weight"]
    kept = {k: v for k, v in load_file(shard).items() if k != "model.norm.weight"}
    save_file(kept | {"model.x": torch.zeros(1)}, shard)
    refused(tmp_path, shard, r"lacks tensor 'model.norm.weight', which .* promises", broken)


def test_a_shard_missing_from_the_index_is_refused(sharded, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(sharded, broken)
    next(broken.glob("model-00002-*")).unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-.* is missing"):
        build_checkpoint(broken, MODALITIES, tmp_path / "out")


@pytest.mark.parametrize("name", ["/no/such/dir", "./nowhere", "~/nowhere-at-all"])
def test_a_base_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="no such directory"):
        build_checkpoint(name, MODALITIES, tmp_path / "out")


def test_a_hub_model_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(name, **options):
        assert options["revision"] == "v2"
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"'some/model' is neither .* offline"):
        build_checkpoint("some/model", MODALITIES, tmp_path / "out", revision="v2")


def test_a_hub_model_is_fetched(base, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(base))
    assert read_config(build_checkpoint("some/model", MODALITIES, tmp_path / "out"))


def test_outputs_that_cannot_be_written_are_refused(base, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not empty"):
        build_checkpoint(base, MODALITIES, tmp_path / "full")
    with pytest.raises(CheckpointError, match="not a directory"):
        build_checkpoint(base, MODALITIES, tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot write"):
        build_checkpoint(base, MODALITIES, tmp_path / "file" / "out")
    assert build_checkpoint(base, MODALITIES, tmp_path / "empty").stat().st_mode & 0o055


def test_nothing_is_left_behind_by_a_failure(base, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(CheckpointError, match="disk full"):
        build_checkpoint(base, MODALITIES, tmp_path / "out", copy=True)
    assert os.listdir(tmp_path) == []


def test_wrong_requests_are_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="at least one"):
        build_checkpoint(base, {}, tmp_path / "out")
    with pytest.raises(ModalityError, match=r"gives new tokens the ids .403."):
        build_checkpoint(base, {"m1": {"dim": 4, "token_id": 460}}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="model_type is 'qwen3', expected"):
        read_config(base)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"quant_method": "fp8"}, "modules_to_not_convert", ["lm_head", "projectors"]),
        (
            {"quant_method": "awq", "modules_to_not_convert": ["x"]},
            "modules_to_not_convert",
            ["x", "projectors"],
        ),
        (
            {"quant_method": "compressed-tensors", "ignore": ["lm_head"]},
            "ignore",
            ["lm_head", "re:projectors\\..*"],
        ),
    ],
)
def test_quantization_is_hoisted_and_spares_the_projectors(base, tmp_path, given, field, expected):
    mine = tmp_path / "mine"
    shutil.copytree(base, mine)
    edit_config(mine, quantization_config=given)
    out = build_checkpoint(mine, MODALITIES, tmp_path / "out")
    raw = json.loads((out / "config.json").read_text())
    assert raw["quantization_config"] == given | {field: expected}
    assert "quantization_config" not in raw["text_config"]


def test_other_users_may_read_what_was_written(base, tmp_path):
    output = build_checkpoint(base, MODALITIES, tmp_path / "out", copy=True)
    mask = os.umask(0)
    os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in output.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes
