"""Projectors of every kind: what describes one, whose files are read, the same rows everywhere."""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import projector_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import multiprocessing, nn

from mmqwen.checkpoint import (
    CheckpointError,
    LeftOutWarning,
    build_checkpoint,
    load_projectors,
    read_config,
    save_projectors,
)
from mmqwen.checkpoint.projector_files import complete_specs, find_projectors
from mmqwen.checkpoint.projector_sources import read_source
from mmqwen.cli import main
from mmqwen.hf import MultiModalProjector, MultimodalQwen3Config
from mmqwen.modalities import ACTIVATIONS, NORMS, ModalityError, ModalitySpec, parse_modalities
from mmqwen_kernels import ACTIVATIONS as TABLE
from mmqwen_kernels import NORMS as NORM_TABLE
from mmqwen_kernels import project_rows
from tiny import make_base

WIDTH, HIDDEN, OUT = 24, 40, 64

pytestmark = pytest.mark.filterwarnings("ignore::mmqwen.checkpoint.UntrainedProjectorsWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "base")


def filled(module, seed=0):
    """The module with weights of which each counts: no zero biases, no norm of ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return module


def sequential(activation=None, *, norm=False, layers=2):
    parts = [nn.LayerNorm(WIDTH)] if norm else []
    if layers == 1:
        parts.append(nn.Linear(WIDTH, OUT))
    else:
        parts += [nn.Linear(WIDTH, HIDDEN), activation or nn.GELU(), nn.Linear(HIDDEN, OUT)]
    return filled(nn.Sequential(*parts))


def as_llava(module, prefix="multi_modal_projector."):
    """The state of a Sequential of two layers under transformers' LLaVA's names."""
    names = {"0": "linear_1", "2": "linear_2"}
    state = module.state_dict().items()
    return {f"{prefix}{names[k.split('.')[0]]}.{k.split('.')[1]}": v.clone() for k, v in state}


def rows(count=5, width=WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1))


# -- what describes one --------------------------------------------------------------------------


def test_what_is_checked_is_what_the_twins_and_kernels_have():
    assert tuple(TABLE) == ACTIVATIONS
    assert NORM_TABLE == NORMS


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"activation": "swish"}, r"m1.*activation is 'swish', expected one of \['relu', 'gelu'"),
        ({"norm": "batch"}, r"m1.*norm is 'batch', expected one of \['none', 'layer', 'rms'\]"),
        ({"bias": 1}, r"m1.*bias is 1, expected one of \[True, False\]"),
        ({"layers": 3}, r"m1.*layers is 3, expected one of \[1, 2\]"),
        ({"layers": True}, "m1.*layers is True"),
        ({"norm": "rms", "norm_eps": -1}, "m1.*norm_eps is -1, expected a number"),
        ({"norm": "none", "norm_eps": 1e-5}, "m1.*norm_eps is 1e-05, but norm is none"),
        ({"layers": 1, "hidden_dim": 8}, "m1.*hidden_dim is 8, but one layer has no hidden units"),
        ({"layers": 1, "activation": "gelu"}, "m1.*activation is 'gelu', but one layer has none"),
        ({"gain": 2}, r"m1.*unknown fields \['gain'\], expected some of"),
    ],
)
def test_what_is_no_projector_is_refused_by_name(fields, words):
    with pytest.raises(ModalityError, match=words):
        parse_modalities({"m1": {"dim": 8, **fields}})


def test_old_configs_read_as_relu_and_are_written_back_unchanged():
    old = {"m1": {"dim": 8, "hidden_dim": 64, "token": "<|m1|>", "token_id": 9, "max_rows": 5}}
    config = MultimodalQwen3Config({"model_type": "qwen3", "hidden_size": 64}, old)
    kind = config.modality_specs["m1"].projector
    assert (kind.activation, kind.norm, kind.bias, kind.layers) == ("relu", "none", True, 2)
    assert config.to_dict()["modalities"] == old
    told = {"m1": {**old["m1"], "activation": "relu", "norm": "rms", "bias": False, "layers": 2}}
    assert MultimodalQwen3Config(modalities=told).to_dict()["modalities"] == told
    single = MultimodalQwen3Config(modalities={"m1": {"dim": 8, "layers": 1}})
    assert "hidden_dim" not in single.to_dict()["modalities"]["m1"]


EVERY = [
    {"activation": activation, "norm": norm, "bias": bias, "layers": layers}
    for layers, norm, bias in product((2, 1), NORMS, (True, False))
    for activation in (ACTIVATIONS if layers == 2 else ["none"])
]


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_shards_of_every_kind_sum_to_the_module(ranks):
    """As the one all-reduce adds them: no bias, norm or single layer counts twice."""
    pytest.importorskip("vllm")
    from mmqwen.vllm_plugin.projector import ShardedProjector

    for fields in EVERY:
        hidden = {} if fields["layers"] == 1 else {"hidden_dim": HIDDEN}
        spec = ModalitySpec("m1", WIDTH, **hidden, **fields)
        module = filled(MultiModalProjector.of(spec, OUT))
        total = torch.zeros(5, OUT)
        for rank in range(ranks):
            share = ShardedProjector(spec, OUT, rank=rank, ranks=ranks, dtype=torch.float32)
            for name, tensor in module.state_dict().items():
                share.load(name, tensor)
            total += project_rows(rows(), share.weights(), backend="torch")
        torch.testing.assert_close(total, module(rows()).detach(), atol=1e-4, rtol=1e-4)


def test_two_processes_place_rows_of_every_kind_with_one_all_reduce(tmp_path):
    """Tensor parallelism over gloo, below the engine: the shares' sum is what one rank places."""
    assert len(EVERY) == 36
    multiprocessing.spawn(projector_ranks.run, (2, str(tmp_path / "store"), EVERY), nprocs=2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_fresh_rows_are_spread_as_told(activation, norm):
    spec = ModalitySpec("m1", 256, 512, activation=activation, norm=norm)
    module = MultiModalProjector.of(spec, 128, output_std=0.3)
    module.reset_parameters(torch.Generator().manual_seed(0))
    assert 0.25 < module(rows(200, 256)).std() < 0.35
    single = MultiModalProjector.of(ModalitySpec("m1", 256, layers=1), 128, output_std=0.3)
    single.reset_parameters(torch.Generator().manual_seed(0))
    assert 0.25 < single(rows(200, 256)).std() < 0.35


# -- whose files are read ------------------------------------------------------------------------

GELU = {"activation": "gelu"}


def imported(base, tmp_path, tensors, asked=None, metadata=None, source="{}"):
    """Build with the tensors as a file; the module that transformers makes of it."""
    file = tmp_path / "p.safetensors"
    save_file(tensors, file, metadata)
    asked = {"m1": GELU} if asked is None else asked
    out = build_checkpoint(base, asked, tmp_path / "out", projector=[source.format(file)])
    spec = read_config(out).modality_specs["m1"]
    module = MultiModalProjector.of(spec, OUT)
    found = load_file(out / "projectors.safetensors")
    module.load_state_dict({k.removeprefix("projectors.m1."): v for k, v in found.items()})
    return module, spec, out


def prefixed(module, prefix):
    return {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(
    ("module", "tensors", "asked"),
    [
        (sequential(), as_llava, GELU),
        (sequential(), lambda m: as_llava(m, "model.multi_modal_projector."), GELU),
        (sequential(), lambda m: prefixed(m, "model.mm_projector."), GELU),
        (sequential(layers=1), lambda m: prefixed(m[0], "mm_projector."), {}),
        (sequential(layers=1), lambda m: prefixed(m, ""), {}),
        (sequential(nn.SiLU()), lambda m: prefixed(m, ""), {"activation": "silu"}),
        (
            sequential(nn.GELU("tanh"), norm=True),
            lambda m: prefixed(m, "m1."),
            {"activation": "gelu_tanh"},
        ),
        (
            sequential(nn.Identity()),
            lambda m: prefixed(m, "projectors.m1."),
            {"activation": "none"},
        ),
    ],
    ids=[
        *("llava", "llava-in-model", "llava-own", "llava-linear"),
        *("linear", "sequential", "norm-named", "named"),
    ],
)
def test_others_names_are_known(base, tmp_path, module, tensors, asked):
    got, spec, out = imported(base, tmp_path, tensors(module), {"m1": asked})
    torch.testing.assert_close(got(rows()), module(rows()), atol=1e-5, rtol=1e-5)
    assert (spec.dim, spec.hidden_dim) == (WIDTH, None if spec.layers == 1 else HIDDEN)
    # What was written says what it is, and needs nobody to say it again.
    again = build_checkpoint(base, {"m1": {}}, out / "x", projector=out / "projectors.safetensors")
    assert read_config(again).modality_specs["m1"].projector == spec.projector


def test_other_tensors_of_a_llava_model_are_left_alone_and_its_config_is_read(base, tmp_path):
    module = sequential()
    llava = tmp_path / "llava"
    llava.mkdir()
    tensors = as_llava(module) | {"vision_tower.norm.weight": torch.ones(3)}
    save_file(tensors, llava / "model.safetensors")
    for config in (
        {"model_type": "llava", "projector_hidden_act": "gelu"},
        {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu"},
    ):
        (llava / "config.json").write_text(json.dumps(config))
        found = find_projectors(llava)[None]
        assert [fields for _, fields in found.told][-1] == GELU
    out = build_checkpoint(base, {"m1": {}}, tmp_path / "out", projector=llava)
    assert read_config(out).modality_specs["m1"].activation == "gelu"
    with pytest.raises(CheckpointError, match=r"activation is 'relu' by what was.*'gelu' by .*con"):
        build_checkpoint(base, {"m1": {"activation": "relu"}}, tmp_path / "no", projector=llava)


def test_one_of_several_is_taken_the_rest_named_and_names_changed(base, tmp_path):
    tensors = {}
    for at, name in enumerate(("m1", "old", "more")):
        tensors |= prefixed(filled(sequential(), seed=at), f"{name}.")
    file = tmp_path / "several.safetensors"
    save_file(tensors, file, GELU)
    with pytest.warns(LeftOutWarning, match=r"also holds projectors of \['more', 'old'\]"):
        build_checkpoint(base, {"m1": {}}, tmp_path / "one", projector=file)
    sources = [file, f"vitals={file}:old"]
    with pytest.warns(LeftOutWarning):
        out = build_checkpoint(base, {"m1": WIDTH}, tmp_path / "two", projector=sources)
    specs = read_config(out).modality_specs
    assert list(specs) == ["m1", "vitals"]
    found = load_file(out / "projectors.safetensors")
    assert torch.equal(found["projectors.vitals.linear_1.weight"], tensors["old.0.weight"])
    for sources, words in (
        ([f"m9={file}:gone"], r"holds projectors of \['m1', 'more', 'old'\], not 'gone'"),
        ([f"m9={file}"], r"not 'm9'; say which: --projector m9=.*:OLD"),
        ([f"m1={file}:old", f"m1={file}:more"], r"modality 'm1' is in .* and in"),
    ):
        with (
            pytest.warns(LeftOutWarning) if len(sources) > 1 else nullcontext(),
            pytest.raises(CheckpointError, match=words),
        ):
            build_checkpoint(base, {"m1": {}}, tmp_path / "none", projector=sources)
    with pytest.raises(CheckpointError, match=r"none of the modalities \['m7'\]; take one by ano"):
        build_checkpoint(base, {"m7": WIDTH}, tmp_path / "none", projector=file)
    assert not (tmp_path / "none").exists()


def test_a_path_with_an_equals_sign_or_a_colon_is_a_path(tmp_path):
    for name in ("a=b", "c:d"):
        (tmp_path / name).write_bytes(b"")
        assert read_source(str(tmp_path / name))[1] == tmp_path / name
    assert read_source(f"m1={tmp_path / 'c:d'}") == ("m1", tmp_path / "c:d", None)
    assert read_source("m1=x.safetensors:old")[2] == "old"


def test_what_cannot_be_told_is_asked_for(base, tmp_path, capsys):
    file, out = tmp_path / "p.safetensors", tmp_path / "out"
    command = ["build", "--base", str(base), "--projector", str(file), "-o", str(out)]
    for tensors in (
        prefixed(sequential(), ""),
        as_llava(sequential()),
        {f"m1.{k}": v for k, v in as_llava(sequential(), "").items()},
        {f"projectors.m1.{k}": v for k, v in as_llava(sequential(), "").items()},
    ):
        save_file(tensors, file)
        assert main([*command, "--modality", "m1"]) == 2
        error = capsys.readouterr().err
        assert "does not tell the projector's activation" in error
        assert "--modality m1=24:activation=..." in error
    rms = {"0.weight": torch.ones(WIDTH), "1.weight": torch.ones(OUT, WIDTH)}
    save_file(rms, file)  # LayerNorm(bias=False), or RMSNorm
    assert main([*command, "--modality", "m1"]) == 2
    assert "--modality m1=24:norm=..." in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["p.safetensors"]
    assert main([*command, "--modality", "m1:norm=rms"]) == 0
    assert read_config(out).modality_specs["m1"].projector.norm == "rms"


def test_spec_file_and_config_that_disagree_are_refused(base, tmp_path):
    """Each pair of them; nothing is written."""
    spec = {"m1": {"dim": WIDTH, "hidden_dim": HIDDEN, "activation": "gelu"}}
    made = build_checkpoint(base, spec, tmp_path / "made")
    file = made / "projectors.safetensors"
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(file.read_bytes())
    for asked, words in (
        ({"activation": "silu"}, "activation is 'silu' by what was asked for, but 'gelu' by the"),
        ({"norm": "layer"}, "norm is 'layer' by what was asked for, but 'none' by the tensors"),
        ({"bias": False}, "bias is False by what was asked for, but True by the tensors"),
        ({"layers": 1}, "layers is 1 by what was asked for, but 2 by the tensors"),
        ({"dim": 25}, "dim is 25 by what was asked for, but 24 by the metadata"),
        ({"hidden_dim": 41}, "hidden_dim is 41 by what was asked for, but 40 by the metadata"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            build_checkpoint(base, {"m1": asked}, tmp_path / "out", projector=alone)
    config = json.loads((made / "config.json").read_text())
    config["modalities"]["m1"]["activation"] = "relu"
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"activation is 'gelu' by the meta.* but 'relu'"):
        build_checkpoint(base, {"m1": WIDTH}, tmp_path / "out", projector=made)
    save_file(load_file(file), file)  # without its metadata
    with pytest.raises(CheckpointError, match=r"'gelu' by what was asked.*, but 'relu' by .*conf"):
        build_checkpoint(base, {"m1": GELU}, tmp_path / "out", projector=made)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_whose_projectors_are_not_its_configs_is_refused(base, tmp_path):
    """Tensors of the same names and shapes: only the record tells GELU from ReLU."""
    from transformers import AutoModelForCausalLM

    from mmqwen.doctor import report

    made = build_checkpoint(base, {"m1": {"dim": WIDTH, **GELU}}, tmp_path / "made")
    config = json.loads((made / "config.json").read_text())
    del config["modalities"]["m1"]["activation"]
    (made / "config.json").write_text(json.dumps(config))
    words = "activation is 'relu' by config.json, but 'gelu' by the metadata of"
    with pytest.raises(CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(made)
    assert any(words in problem for problem in report(made)["checkpoint"]["problems"])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (
            {"0.weight": (8, 24), "2.weight": (8, 8), "4.weight": (64, 8)},
            r"layers \[0, 2, 4\], exp",
        ),
        ({"0.weight": (8, 24), "norm.weight": (24,)}, "expected names or numbers, not both"),
        ({"encoder.layers.0.weight": (8, 24)}, "'encoder.layers.0.weight' belongs to none"),
        ({"0.weight": (40, 24), "0.bias": (40,), "2.weight": (64, 40)}, "linear_2.bias is missing"),
        ({"0.weight": (63, 24)}, r"linear_1.weight \(0.weight\) has shape \[63, 24\], expected"),
    ],
)
def test_files_of_no_known_projector_are_refused(base, tmp_path, tensors, words):
    asked = {"m1": GELU if len(tensors) > 1 else {}}
    with pytest.raises(CheckpointError, match=words):
        imported(base, tmp_path, {k: torch.ones(*v) for k, v in tensors.items()}, asked)
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_pickles_are_refused_with_the_remedy(base, tmp_path):
    torch.save(as_llava(sequential()), tmp_path / "mm_projector.bin")
    with pytest.raises(CheckpointError, match=r"pickle.*convert it: safetensors.torch.save_file"):
        build_checkpoint(
            base, {"m1": GELU}, tmp_path / "out", projector=tmp_path / "mm_projector.bin"
        )


def test_one_without_a_name_among_several_modalities_needs_one(base, tmp_path):
    save_file(as_llava(sequential()), tmp_path / "p.safetensors", GELU)
    asked = {"m1": {"dim": WIDTH}, "m2": {"dim": WIDTH}}
    with pytest.raises(CheckpointError, match=r"without a name.*--projector NAME=FILE"):
        build_checkpoint(base, asked, tmp_path / "no", projector=tmp_path / "p.safetensors")
    source = f"m2={tmp_path / 'p.safetensors'}"
    out = build_checkpoint(base, asked, tmp_path / "out", projector=source)
    specs = read_config(out).modality_specs
    assert [spec.activation for spec in specs.values()] == [None, "gelu"]


def test_files_of_before_there_was_a_choice_read_as_relu(tmp_path):
    module = MultiModalProjector(WIDTH, HIDDEN, OUT)
    file = tmp_path / "old.safetensors"
    record = {"format": "pt", "mmqwen.trained": '{"m1": true}'}
    save_file(prefixed(module, "projectors.m1."), file, record)
    assert len(load_projectors(file, {"m1": ModalitySpec("m1", WIDTH)}, OUT)) == 4
    with pytest.raises(CheckpointError, match="activation is 'gelu' by what was asked for"):
        load_projectors(file, {"m1": ModalitySpec("m1", WIDTH, activation="gelu")}, OUT)
    # One that is written now, by whom does not say what it is, does not pass for an old one.
    save_projectors(prefixed(module, "projectors.m1."), file, trained={"m1": True})
    with pytest.raises(CheckpointError, match="does not tell"):
        load_projectors(file, {"m1": ModalitySpec("m1", WIDTH)}, OUT)


def test_the_pages_snippets_run(base, tmp_path, monkeypatch):
    """docs/projectors.md, with the tests' base and its width in place of Qwen3's."""
    page = (Path(__file__).parents[1] / "docs" / "projectors.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- test: (\w+) -->\n```\w+\n(.*?)```", page, flags=re.DOTALL))
    code = blocks["save"].replace("768", str(WIDTH)).replace("4096", str(OUT))
    command = shlex.split(blocks["build"].replace("Qwen/Qwen3-8B", str(base)))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "projectors.md", "exec"), names)
    assert command[0] == "mmqwen"
    assert main(command[1:]) == 0
    spec = read_config(tmp_path / "CHECKPOINT").modality_specs["vitals"]
    module = MultiModalProjector.of(spec, OUT)
    found = load_file(tmp_path / "CHECKPOINT" / "projectors.safetensors")
    module.load_state_dict({k.split(".", 2)[2]: v for k, v in found.items()})
    torch.testing.assert_close(module(rows()), names["projector"](rows()), atol=1e-5, rtol=1e-5)


# -- the same rows everywhere --------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(base, tmp_path_factory):
    """A checkpoint with an imported GELU projector of LLaVA's names and others, and the module."""
    folder = tmp_path_factory.mktemp("served")
    module = sequential(nn.GELU())
    save_file(as_llava(module), folder / "llava.safetensors")
    flags = [
        "--modality",
        "llava:activation=gelu",
        "--projector",
        f"llava={folder}/llava.safetensors",
    ]
    flags += ["--modality", "rms=40:hidden=30:activation=silu:norm=rms:bias=false"]
    flags += ["--modality", "linear=16:layers=1:norm=layer", "--modality", "plain=8"]
    assert main(["build", "--base", str(base), *flags, "-o", str(folder / "model")]) == 0
    return folder / "model", module


@torch.inference_mode()
def test_an_imported_gelu_projector_equals_its_module_on_both_engines(served):
    pytest.importorskip("vllm")
    from vllm import SamplingParams

    from engines import TOLERANCE, reference, start, worst_difference
    from mmqwen.packs import directory, pack_rows

    checkpoint, module = served
    theirs, x = reference(str(checkpoint)), rows()
    want = module(x)
    torch.testing.assert_close(theirs.projector("llava")(x), want, atol=1e-4, rtol=1e-4)
    engine = start(checkpoint)
    core = engine.llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.model_runner.model
    placed = model.embed_input_ids(
        torch.arange(7),
        [directory(pack_rows([(list(model.specs).index("llava"), x)]))],
        is_multimodal=torch.tensor([False] + [True] * 5 + [False]),
    )
    torch.testing.assert_close(placed[1:6], want, atol=1e-4, rtol=1e-4)

    # And every kind, in one prompt, to the last logit.
    widths = {name: spec.dim for name, spec in model.specs.items()}
    items = {name: [rows(2, width), rows(1, width)] for name, width in widths.items()}
    prompt = "see " + " and ".join(f"<|{name}|>" for name in (*widths, *widths))
    sampling = SamplingParams(
        temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=1, ignore_eos=True
    )
    request = {"prompt": prompt, "multi_modal_data": items}
    output = engine.generate(request, sampling, use_tqdm=False)[0]
    assert worst_difference(output, theirs, items) <= TOLERANCE


def test_a_given_file_tells_vllm_what_it_is(served):
    """`hf_overrides={"projector": FILE}` beside modalities that name only widths."""
    specs = {name: ModalitySpec(name, spec.dim) for name, spec in read_specs(served[0]).items()}
    told = complete_specs(served[0] / "projectors.safetensors", specs)
    assert {n: s.projector for n, s in told.items()} == {
        n: s.projector for n, s in read_specs(served[0]).items()
    }


def read_specs(checkpoint):
    return read_config(checkpoint).modality_specs
