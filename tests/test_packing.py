"""Samples end to end: which stand together, and that each learns as if it stood alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import TOLERANCE
from mmqwen.data import DatasetError, RowsDataset
from mmqwen.hf import MultimodalQwen3ForConditionalGeneration, MultimodalQwen3Processor
from mmqwen.hf.loss import token_loss
from mmqwen.training import Collator, TrainSettings, train
from mmqwen.training.packing import PackedSampler, pack, split_to
from tiny import make_composite
from training_runs import SAME_CURVE, losses, write_data

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=80)


# -- which samples stand together --------------------------------------------------------------


@given(LENGTHS, st.integers(50, 120))
def test_every_sample_stands_in_one_pass_that_holds_it(lengths, tokens):
    bins = pack(lengths, range(len(lengths)), tokens)
    assert sorted(s for samples in bins for s in samples) == list(range(len(lengths)))
    assert all(sum(lengths[s] for s in samples) <= tokens for samples in bins)
    # No two of the few passes left half empty could have been one.
    loads = sorted(sum(lengths[s] for s in samples) for samples in bins)
    if len(bins) <= 32 and len(loads) > 1:
        assert loads[0] + loads[1] > tokens


def test_ragged_samples_leave_little_free():
    lengths = np.random.default_rng(0).lognormal(4.6, 0.8, 10_000).clip(8, 900).astype(int)
    bins = pack(lengths.tolist(), range(len(lengths)), 4_096)
    assert 1 - lengths.sum() / (len(bins) * 4_096) < 0.01


@given(LENGTHS, st.integers(1, 40))
def test_splitting_loses_nothing(lengths, count):
    bins = split_to(pack(lengths, range(len(lengths)), 64), count)
    assert len(bins) >= count
    assert sorted(s for samples in bins for s in samples) == list(range(len(lengths)))
    assert all(bins) or len(lengths) < count


@settings(max_examples=30)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_processes_share_the_passes_of_one(lengths, world, accumulation, seed):
    def passes(rank, world, accumulation):
        sampler = PackedSampler(
            lengths, 64, seed=seed, epochs=3, accumulation=accumulation, rank=rank, world=world
        )
        epochs = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            epochs.append(list(sampler))
            assert len(epochs[-1]) == len(sampler)
            assert max(map(len, epochs[-1])) <= sampler.most_samples
        return epochs

    alone = passes(0, 1, accumulation * world)
    parts = [passes(rank, world, accumulation) for rank in range(world)]
    for epoch, whole in enumerate(alone):
        assert sorted(s for samples in whole for s in samples) == list(range(len(lengths)))
        woven = [part[epoch][i] for i in range(len(whole) // world) for part in parts]
        assert woven == whole  # so each step's are the same


def test_epochs_differ_and_repeat():
    def order(seed, epoch):
        sampler = PackedSampler([5] * 100, 50, seed=seed, epochs=2)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    fixed = PackedSampler([5] * 100, 50)
    assert list(fixed) == list(fixed)
    assert [s for samples in fixed for s in samples] == list(range(100))


# -- one row of tokens -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    return make_composite(folder / "model"), write_data(folder / "data")


@pytest.fixture(scope="module")
def examples(places):
    data = RowsDataset(places[1])
    return [data[i] for i in (0, 1, 3, 23, 4, 8)]


def collate(places, examples, **options):
    processor = MultimodalQwen3Processor.from_pretrained(places[0])
    return Collator(processor.tokenizer, processor.specs, **options)(examples)


def test_samples_stand_end_to_end(places, examples):
    alone = [collate(places, [e]) for e in examples]
    tokens = sum(a["input_ids"].shape[1] for a in alone) + 70
    longest = max(a["input_ids"].shape[1] for a in alone)
    batch = collate(places, examples, tokens=tokens, samples=9, longest=longest)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, tokens)
    bounds = batch["cu_seq_lens_q"].tolist()
    assert bounds[0] == 0
    assert bounds[-1] == tokens
    assert max(np.diff(bounds)) <= longest == batch["max_length_q"]
    assert batch["padding"] == 70
    for at, own in enumerate(alone):
        begin, end = bounds[at], bounds[at + 1]
        assert torch.equal(batch["input_ids"][0, begin:end], own["input_ids"][0])
        assert torch.equal(batch["position_ids"][0, begin:end], torch.arange(end - begin))
    for begin, end in itertools.pairwise(bounds):
        assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
    for name in ("m1", "m2"):
        assert torch.equal(
            batch["embeddings"][name], torch.cat([a["embeddings"][name] for a in alone])
        )
        assert len(batch["slots"][name]) == len(batch["embeddings"][name])
    learnt = torch.cat([a["shift_labels"] for a in alone])
    assert torch.equal(batch["shift_labels"], learnt)
    assert torch.equal(batch["input_ids"][0, batch["logits_to_keep"] + 1], learnt)
    few = collate(places, examples[:1], tokens=tokens, samples=9, longest=longest)
    assert few["cu_seq_lens_q"].shape == batch["cu_seq_lens_q"].shape


def padded_reference(model, alone):
    """Loss and gradients of a left-padded batch, all logits at once, by transformers' own loss."""
    width = max(a["input_ids"].shape[1] for a in alone)

    def left(value, rows):
        return torch.stack(
            [torch.nn.functional.pad(r, (width - len(r), 0), value=value) for r in rows]
        )

    ids = [a["input_ids"][0] for a in alone]
    labels = []
    for own in alone:
        label = torch.full_like(own["input_ids"][0], -100)
        label[own["logits_to_keep"] + 1] = own["shift_labels"]
        labels.append(label)
    rows = {n: torch.cat([a["embeddings"][n] for a in alone]) for n in model.specs}
    loss = model(
        input_ids=left(0, ids),
        attention_mask=left(0, [torch.ones_like(i) for i in ids]),
        labels=left(-100, labels),
        embeddings=rows,
        use_cache=False,
    ).loss
    return loss.item(), gradients(model, loss)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def run_packed(model, batch):
    return model(**{k: v for k, v in batch.items() if k != "padding"}).loss


HYBRIDS = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]


@pytest.mark.parametrize(
    "family", ["qwen3", "qwen2", "qwen3_moe", "mistral", "gemma2", "granite", *HYBRIDS]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_samples_learn_what_padded_ones_do(family, attention, tmp_path, places, examples):
    """Neither attention nor a window, a capped logit or an expert sees a neighbour."""
    if family == "gemma2" and attention == "sdpa":
        attention = "eager"  # sdpa leaves out its cap, as transformers itself says
    path = make_composite(tmp_path / "model", family=family)
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(path).train()
    model.set_attn_implementation(attention)
    own = (path, places[1])
    alone = [collate(own, [e]) for e in examples]
    want, want_gradients = padded_reference(model, alone)
    tokens = sum(a["input_ids"].shape[1] for a in alone) + 40
    loss = run_packed(model, collate(own, examples, tokens=tokens, longest=64, samples=8))
    assert loss.item() == pytest.approx(want, rel=1e-5)
    got = gradients(model, loss)
    assert got.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got[name] / scale, gradient / scale, rtol=0, atol=TOLERANCE)


def test_a_packed_run_has_the_curve_of_a_padded_one(places, tmp_path):
    """`train` over passes of all samples, against a loop over them as one padded batch."""
    model_path, data = places
    settings = TrainSettings(
        *(str(p) for p in (model_path, data, tmp_path / "out")),
        tokens_per_step=2_048,
        max_steps=6,
        lr=1e-2,
        schedule="constant",
        warmup=0.0,
        max_grad_norm=0.0,
        log_steps=1,
        cpu=True,
        progress=False,
    )
    packed = losses(train(settings))
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(model_path).train()
    model.requires_grad_(False)
    model.projectors.requires_grad_(True)
    alone = [collate(places, [example]) for example in RowsDataset(data)]
    optimizer = torch.optim.AdamW(model.projectors.parameters(), lr=1e-2, weight_decay=0.0)
    padded = []
    for _ in packed:
        loss, _ = padded_reference(model, alone)
        optimizer.step()
        padded.append(loss)
    assert packed == pytest.approx(padded, rel=SAME_CURVE)
    assert padded[-1] < padded[0]


def test_a_neighbour_changes_nothing(places, examples):
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(places[0]).train()
    first = collate(places, [examples[0]])
    count = len(first["shift_labels"])
    for other in examples[1:]:
        both = collate(places, [examples[0], other])
        embeds = model.fuse(both["input_ids"], both["embeddings"], both["slots"])
        hidden = model.model(inputs_embeds=embeds, position_ids=both["position_ids"])[0][0]
        alone = model.fuse(first["input_ids"], first["embeddings"], first["slots"])
        want = model.model(inputs_embeds=alone, position_ids=first["position_ids"])[0][0]
        torch.testing.assert_close(hidden[: len(want)], want, rtol=0, atol=TOLERANCE)
        assert torch.equal(both["shift_labels"][:count], first["shift_labels"])


def test_a_pass_without_samples_has_a_loss_and_gradients_of_zero(places):
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(places[0]).train()
    batch = collate(places, [], tokens=64, longest=32, samples=3)
    loss = run_packed(model, batch)
    assert loss.item() == 0.0
    found = gradients(model, loss)
    # Of all weights: else other processes would wait for this one's.
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_pieces_of_the_loss_are_the_whole(piece, monkeypatch):
    monkeypatch.setattr("mmqwen.hf.loss.PIECE", piece)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=g, requires_grad=True)
    head = torch.nn.Linear(16, 50)
    targets = torch.randint(0, 50, (7,), generator=g)
    token_loss(hidden, head, targets).backward()
    got = [hidden.grad.clone(), head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None
    torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum").backward()
    for one, other in zip(got, [hidden.grad, head.weight.grad], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [None, lambda h, w, t, b: F.cross_entropy(h @ w.T + b, t)])
def test_the_loss_of_a_head_in_shards_is_one_call_of_it(fused, monkeypatch):
    """Between torch's FSDP hooks, which run at the beginning and the end of a call."""
    monkeypatch.setattr("mmqwen.hf.loss.PIECE", 3)
    head, calls = torch.nn.Linear(16, 50), []
    head.register_forward_hook(lambda module, arguments, result: calls.append(result))
    hidden, targets = torch.randn(7, 16, requires_grad=True), torch.arange(7)
    leaves = (hidden, head.weight, head.bias)
    want = token_loss(hidden, head, targets, fused=fused)
    gradients_of_want = torch.autograd.grad(want, leaves)
    calls.clear()
    monkeypatch.setattr("mmqwen.hf.loss._is_sharded", lambda module: True)
    loss = token_loss(hidden, head, targets, fused=fused)
    assert torch.equal(loss, want)
    for got, other in zip(torch.autograd.grad(loss, leaves), gradients_of_want, strict=True):
        assert torch.equal(got, other)
    assert [call.shape for call in calls] == [()]
    assert head(hidden).shape == (7, 50)  # the head is what it was


# -- samples that do not fit -------------------------------------------------------------------


def test_a_sample_that_is_too_long_is_refused_or_cut(places, examples):
    whole = collate(places, examples[1:2])
    length = whole["input_ids"].shape[1]
    with pytest.raises(
        DatasetError, match=rf"data.jsonl:2: {length} tokens .* at most {length - 1}"
    ):
        collate(places, examples[1:2], longest=length - 1)
    short = collate(places, examples[1:2], longest=length - 1, cut=True)
    assert torch.equal(short["input_ids"], whole["input_ids"][:, :-1])
    assert len(short["shift_labels"]) == len(whole["shift_labels"]) - 1
    with pytest.raises(DatasetError, match=r"data.jsonl:2: no answer begins in its first 2 tokens"):
        collate(places, examples[1:2], longest=2, cut=True)


def test_rows_that_are_cut_off_are_left_out(tmp_path, places):
    """An item after the first answer: what is left of the sample teaches that answer alone."""
    from mmqwen.data import DatasetWriter

    with DatasetWriter(tmp_path / "data", {"m1": 24, "m2": 40}) as writer:
        texts = ("What?", "A train", "<|m1|>", "no")
        turns = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant") * 2, texts, strict=True)
        ]
        writer.add_messages(turns, {"m1": [torch.ones(5, 24)]})
    example = RowsDataset(tmp_path / "data")[0]
    whole = collate(places, [example])
    third = int(whole["slots"]["m1"][2])
    batch = collate(places, [example], longest=third, cut=True)
    assert len(batch["embeddings"]["m1"]) == len(batch["slots"]["m1"]) == 2
    first = collate(places, [example], longest=int(whole["slots"]["m1"][0]), cut=True)
    assert len(first["embeddings"]["m1"]) == 0
    assert torch.equal(first["shift_labels"], batch["shift_labels"])
