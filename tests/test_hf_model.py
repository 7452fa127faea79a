"""The transformers model: parity with its base, placement of rows, padding, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from spelling import make_spelling_checkpoint
from transformers import AutoModelForCausalLM

from engines import TOLERANCE
from mmqwen.hf import MultimodalQwen3Config, MultimodalQwen3ForConditionalGeneration
from tiny import FAMILY_FIELDS, make_base, make_composite

FAMILIES = ["qwen3", "qwen3_moe", "qwen2"]
EVERY_FAMILY = sorted(FAMILY_FIELDS)
M1, M2 = 403, 404


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {}

    def get(family, tied=False):
        key = f"{family}{'-tied' if tied else ''}"
        if key not in made:
            made[key] = make_composite(root / key, family=family, tie_word_embeddings=tied)
        return made[key]

    return get


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, **kwargs).eval()


@pytest.fixture(scope="module")
def model(checkpoints):
    return load(checkpoints("qwen3"))


@pytest.fixture(scope="module")
def model64(checkpoints):
    """In float64: the fusion, which rounds nowhere else, differs by 1e-12 between two orders."""
    return load(checkpoints("qwen3"), dtype=torch.float64)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_columns(logits):
    keep = torch.ones(logits.shape[-1], dtype=torch.bool)
    keep[[M1, M2]] = False
    return logits[..., keep]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_text_alone_equals_the_base_bit_for_bit(checkpoints, family, tied):
    path = checkpoints(family, tied)
    model = load(path)
    base = load(path.with_name(path.name + "-base"))
    ids = torch.randint(0, 400, (2, 17), generator=torch.Generator().manual_seed(1))
    got, expected = model(ids).logits, base(ids).logits
    assert torch.equal(text_columns(got), text_columns(expected))
    assert (got[..., [M1, M2]] == -torch.inf).all()
    labelled, reference = model(ids, labels=ids), base(ids, labels=ids)
    assert torch.equal(labelled.logits, reference.logits)
    assert torch.equal(labelled.loss, reference.loss)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    answer = {"max_new_tokens": 6, "suppress_tokens": [M1, M2]}
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **answer),
        base.generate(ids, attention_mask=mask, **answer),
    )


@pytest.mark.parametrize("family", EVERY_FAMILY)
@torch.no_grad()
def test_rows_that_equal_token_embeddings_are_answered_as_the_tokens(tmp_path, family):
    """The row is what stands in the buffer: past a scale of the embedding layer, as Gemma's."""
    model = load(make_spelling_checkpoint(tmp_path / "model", hidden_size=64, family=family))
    spell = model.specs["spell"].token_id
    words = torch.tensor([[7, 30, 31, 32, 9]])
    spelled = words.clone()
    spelled[0, 1:4] = spell
    rows = {"spell": model.get_input_embeddings()(words[0, 1:4])}
    got, expected = model(spelled, embeddings=rows).logits, model(words).logits
    assert torch.equal(model.fuse(spelled, rows), model.get_input_embeddings()(words))
    assert torch.equal(got, expected)
    labelled = model(spelled, embeddings=rows, labels=words)
    assert torch.equal(labelled.loss, model(words, labels=words).loss)


@torch.no_grad()
def test_parts_that_are_replaced_or_copied_are_used(checkpoints):
    """As adapters and quantizers replace modules, and DataParallel copies the whole model."""
    model = load(checkpoints("cohere2"))
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    twin = copy.deepcopy(model)
    model.model.norm.weight.mul_(2)
    assert not torch.equal(model(ids).logits, expected)
    assert torch.equal(twin(ids).logits, expected)
    replica = model._replicate_for_data_parallel()
    replica._modules["model"], replica._modules["lm_head"] = twin.model, twin.lm_head
    assert torch.equal(replica(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)
    model.model, model.lm_head = twin.model, twin.lm_head
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_fuse_places_each_row_at_its_slot(model64):
    model = model64
    ids = torch.tensor([[M2, 5, M1, M1], [M1, 6, 7, M2]])
    a, b = rows(3, 24).double(), rows(2, 40, seed=1).double()
    fused = model.fuse(ids, {"m2": b, "m1": a})
    expected = model.get_input_embeddings()(ids)
    p1, p2 = (
        lambda x, p=model.projectors[name]: p.linear_2(p.linear_1(x).clamp(min=0))
        for name in ("m1", "m2")
    )
    expected[0, 2:] = p1(a[:2])
    expected[1, 0] = p1(a[2])
    expected[0, 0], expected[1, 3] = p2(b[0]), p2(b[1])
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_rows_as_items_of_one_or_more_rows(model):
    ids = torch.tensor([[M1, 5, M1, M1]])
    packed = rows(3, 24)
    items = [packed[0], packed[1:].numpy()]
    assert torch.equal(model.fuse(ids, {"m1": packed}), model.fuse(ids, {"m1": items}))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_left_padded_batch_equals_each_prompt_alone(checkpoints, family, attention):
    model = load(checkpoints(family), attn_implementation=attention)
    assert model.model.config._attn_implementation == attention
    long = torch.tensor([[9, M1, M1, 12, M2, 30, 31, 32]])
    short = torch.tensor([[M1, 40, M2]])
    a, b = rows(3, 24), rows(2, 40, seed=1)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = model(batch, attention_mask=mask, embeddings={"m1": a, "m2": b}).logits
    first = model(long, embeddings={"m1": a[:2], "m2": b[:1]}).logits
    second = model(short, embeddings={"m1": a[2:], "m2": b[1:]}).logits
    torch.testing.assert_close(together[:1], first, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(together[1:, 5:], second, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_generate_with_a_cache_without_one_and_step_by_step(model):
    ids = torch.tensor([[0, 0, M1, 40, M2], [9, M1, M1, 12, 13]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    embeddings = {"m1": rows(3, 24), "m2": rows(1, 40, seed=1)}
    options = {"attention_mask": mask, "embeddings": embeddings, "max_new_tokens": 8}
    cached = model.generate(ids, **options, eos_token_id=None)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options, eos_token_id=None))
    sequence, width = ids, mask
    for _ in range(8):
        logits = model(sequence, attention_mask=width, embeddings=embeddings, logits_to_keep=1)
        assert logits.logits.shape[1] == 1
        sequence = torch.cat([sequence, logits.logits[:, -1:].argmax(-1)], 1)
        width = torch.cat([width, width.new_ones(2, 1)], 1)
    assert torch.equal(cached, sequence)
    other = model.generate(
        ids, **{**options, "embeddings": {"m1": rows(3, 24, seed=9), "m2": embeddings["m2"]}}
    )
    assert not torch.equal(cached, other)


@torch.no_grad()
def test_beams_and_several_sequences_repeat_the_rows_of_their_prompt(model):
    ids = torch.tensor([[M1, 40, M2], [9, M1, M1]])
    embeddings = {"m1": [rows(24), rows(2, 24, seed=1)], "m2": rows(1, 40, seed=2)}
    single = model.generate(ids, embeddings=embeddings, max_new_tokens=5)
    many = model.generate(
        ids,
        embeddings=embeddings,
        max_new_tokens=5,
        do_sample=True,
        top_k=1,
        num_return_sequences=3,
    )
    assert torch.equal(many, single.repeat_interleave(3, 0))
    with pytest.raises(ValueError, match="got 2 row"):
        model.generate(ids, embeddings={"m1": rows(2, 24)}, num_beams=2, max_new_tokens=2)


@torch.no_grad()
def test_placeholders_are_never_generated(model):
    logits = model(torch.tensor([[5, 6]])).logits
    assert logits.isinf().sum() == 2 * 2
    model.train()
    try:
        assert model(torch.tensor([[5, 6]])).logits.isfinite().all()
    finally:
        model.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_projector(checkpoints, family, checkpointing):
    model = load(checkpoints(family)).train()
    model.requires_grad_(False)
    model.projectors.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.tensor([[M1, 40, 41, 42]])
    labels = torch.tensor([[-100, 40, 41, 42]])
    model(ids, labels=labels, embeddings={"m1": rows(1, 24)}).loss.backward()
    for parameter in model.projectors["m1"].parameters():
        assert parameter.grad.abs().sum() > 0
    for parameter in model.projectors["m2"].parameters():  # DDP waits for a gradient of each
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_gradient_of_the_fusion_is_that_of_its_definition(model64):
    model = model64.train()
    try:
        ids = torch.tensor([[M1, 5, M1]])
        a, weight = rows(2, 24).double().requires_grad_(), rows(1, 3, 64, seed=3).double()
        (model.fuse(ids, {"m1": a}) * weight).sum().backward()
        got = a.grad.clone()
        a.grad = None
        (model.projectors["m1"](a) * weight[0, [0, 2]]).sum().backward()
        torch.testing.assert_close(got, a.grad, rtol=0, atol=1e-9)
        assert not model.get_input_embeddings().weight.grad[M1].any()
        assert torch.equal(model.get_input_embeddings().weight.grad[5], weight[0, 1])
    finally:
        model.zero_grad()
        model.eval()


@torch.no_grad()
def test_ignored_labels_and_kept_logits(model):
    ids = torch.tensor([[M1, 40, 41, 42, 43]])
    embeddings = {"m1": rows(1, 24)}
    labels = torch.tensor([[-100, -100, -100, 42, 43]])
    full = model(ids, labels=labels, embeddings=embeddings)
    expected = torch.nn.functional.cross_entropy(full.logits[0, 2:4], ids[0, 3:5])
    torch.testing.assert_close(full.loss, expected, rtol=0, atol=TOLERANCE)
    kept = model(ids, labels=labels, embeddings=embeddings, logits_to_keep=3)
    torch.testing.assert_close(kept.loss, expected, rtol=0, atol=TOLERANCE)


def test_experts_balance_loss_joins_the_loss(checkpoints):
    model = load(checkpoints("qwen3_moe"))
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model(ids, labels=ids)
    balanced = model(ids, labels=ids, output_router_logits=True)
    coefficient = model.config.text_config.router_aux_loss_coef
    expected = plain.loss + coefficient * balanced.aux_loss
    assert coefficient * balanced.aux_loss > 10 * TOLERANCE
    torch.testing.assert_close(balanced.loss, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_save_and_load_round_trip(checkpoints, tmp_path, family, tied):
    model = load(checkpoints(family, tied))
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(again) is MultimodalQwen3ForConditionalGeneration
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids, embeddings = torch.tensor([[M2, 5, M1]]), {"m1": rows(1, 24), "m2": rows(1, 40)}
    torch.testing.assert_close(  # grouped matmul of experts rounds by the memory's alignment
        model(ids, embeddings=embeddings).logits,
        again.eval()(ids, embeddings=embeddings).logits,
        rtol=0,
        atol=TOLERANCE,
    )


def test_fresh_projectors_put_out_the_spread_of_token_embeddings(tmp_path):
    base = load(make_base(tmp_path / "base"))
    config = MultimodalQwen3Config(
        text_config=base.config, modalities={"m1": {"dim": 96, "hidden_dim": 512, "token_id": M1}}
    )
    model = MultimodalQwen3ForConditionalGeneration(config)
    spread = model.projectors["m1"](rows(256, 96)).std().item()
    assert spread == pytest.approx(config.text_config.initializer_range, rel=0.15)
    assert not model.projectors["m1"].linear_1.bias.any()


@torch.no_grad()
def test_bfloat16_model_takes_float32_rows(checkpoints):
    model = load(checkpoints("qwen3"), dtype=torch.bfloat16)
    ids = torch.tensor([[M1, 5]])
    whole = model(ids, embeddings={"m1": rows(1, 24)}).logits
    assert whole.dtype is torch.bfloat16
    model.projectors.float()  # projectors may be trained in more than the model's dtype
    assert model.fuse(ids, {"m1": rows(1, 24)}).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [
        (None, r"modality 'm1': got 0 row\(s\), expected 2"),
        ({"m1": rows(3, 24)}, r"modality 'm1': got 3 row\(s\), expected 2"),
        ({"m1": rows(2, 24), "m2": rows(1, 40)}, r"modality 'm2': got 1 row\(s\), expected 0"),
        ({"m1": rows(2, 25)}, r"modality 'm1': got rows of shape \(2, 25\), expected \[rows, 24\]"),
        ({"m1": rows(1, 2, 24)}, r"shape \(1, 2, 24\)"),
        ({"m9": rows(2, 24)}, "unknown modality 'm9'; expected one of"),
    ],
)
def test_wrong_rows_are_refused(model, embeddings, words):
    with pytest.raises(ValueError, match=words):
        model(torch.tensor([[M1, 5, M1]]), embeddings=embeddings)


def test_a_cached_turn_without_its_rows_is_refused(model):
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.text_config)
    model(torch.tensor([[5, M1]]), embeddings={"m1": rows(1, 24)}, past_key_values=cache)
    assert model(torch.tensor([[6]]), past_key_values=cache).logits.shape[1] == 1
    with pytest.raises(ValueError, match=r"modality 'm2': got 0 row\(s\), expected 1"):
        model(torch.tensor([[M2, 7]]), past_key_values=cache)


@torch.no_grad()
def test_weights_that_accelerate_keeps_elsewhere(checkpoints, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = load(checkpoints("qwen3"))
    ids, embeddings = torch.tensor([[5, M1, 6, M2]]), {"m1": [rows(24)], "m2": rows(1, 40)}
    expected = model(ids, embeddings=embeddings).logits
    answer = model.generate(ids, embeddings=embeddings, max_new_tokens=4)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.projectors["m1"].linear_1.weight.is_meta
    found = offloaded(ids, embeddings=embeddings).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    assert torch.equal(offloaded.generate(ids, embeddings=embeddings, max_new_tokens=4), answer)
    places = {"model": "cpu", "lm_head": "disk", "projectors": "disk"}
    mapped = load(checkpoints("qwen3"), device_map=places, offload_folder=tmp_path)
    assert mapped.projectors["m1"].linear_1.weight.is_meta
    assert torch.equal(mapped(ids, embeddings=embeddings).logits, expected)


def test_ids_or_embeds_but_not_both(model):
    ids = torch.tensor([[5]])
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=torch.zeros(1, 1, 64))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="need input_ids"):
        model(inputs_embeds=torch.zeros(1, 1, 64), embeddings={"m1": rows(1, 24)})


def test_a_modality_without_an_id_is_refused(model):
    config = MultimodalQwen3Config(text_config=model.config.text_config, modalities={"m1": 24})
    with pytest.raises(ValueError, match="'m1' has no token_id"):
        MultimodalQwen3ForConditionalGeneration(config)
