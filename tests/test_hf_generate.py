"""`generate` with rows, in each of its modes, against a greedy loop that has no cache."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from tiny import make_composite

M1, M2 = 403, 404
NEW = 8
PROMPT = torch.tensor([[9, M1, M1, 12, 5, 6, 9, M1, 13, 9]])
"""Its last token stands before placeholders, too: a prompt lookup drafts those."""


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = {"m1": rows(3, 24)}
BATCH = torch.tensor([[0, 0, M1, 40, M2], [9, M1, M1, 12, 13]])
BATCH_MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BATCH_ROWS = {"m1": rows(3, 24), "m2": rows(1, 40, seed=1)}


def load(path):
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    model.generation_config.eos_token_id = None  # lengths alone end an answer
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def model(folder):
    return load(make_composite(folder / "qwen3"))


@pytest.fixture(scope="module")
def windowed(folder):
    """Layers of two kinds, whose masks come as a dict; the window is passed."""
    return load(make_composite(folder / "gemma2", family="gemma2", sliding_window=6))


@pytest.fixture(params=["model", "windowed"])
def either(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def greedy(model, ids, embeddings, count=NEW, mask=None):
    """The definition: the whole sequence anew for each token."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(count):
        logits = model(ids, attention_mask=mask, embeddings=embeddings, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 1},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 64},
        {"prefill_chunk_size": 3, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
        {"do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_each_mode_answers_as_the_definition_does(either, options):
    got = either.generate(PROMPT, embeddings=ROWS, max_new_tokens=NEW, **options)
    assert torch.equal(got, greedy(either, PROMPT, ROWS))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 2}],
    ids=str,
)
def test_a_padded_batch(either, options):
    got = either.generate(
        BATCH, attention_mask=BATCH_MASK, embeddings=BATCH_ROWS, max_new_tokens=NEW, **options
    )
    assert torch.equal(got, greedy(either, BATCH, BATCH_ROWS, mask=BATCH_MASK))


def drafts_may_exit_early(base):
    """Whether transformers can: 5.17 crops caches of layers that no draft has filled."""
    torch.manual_seed(0)
    other = copy.deepcopy(base)
    for parameter in other.parameters():
        parameter.data.normal_()  # so that drafts are rejected
    try:
        other.generate(PROMPT, max_new_tokens=24, assistant_early_exit=1, do_sample=False)
    except TypeError:
        return False
    return True


def test_assistants_of_either_class_and_of_fewer_layers(model, folder):
    expected = greedy(model, PROMPT, ROWS)
    base = load(folder / "qwen3-base")
    ways = [{"assistant_model": copy.deepcopy(model)}, {"assistant_model": base}]
    if drafts_may_exit_early(base):
        ways.append({"assistant_early_exit": 1})
    for options in ways:
        got = model.generate(PROMPT, embeddings=ROWS, max_new_tokens=NEW, **options)
        assert torch.equal(got, expected), options


def test_a_base_that_would_draft_a_placeholder_does_not(model, folder):
    """Mixed with the assistant's probabilities, a placeholder could be the best token."""
    base = load(folder / "qwen3-base")
    with torch.no_grad():
        base.lm_head.weight[M1] = 50 * base.lm_head.weight.abs().sum(0)
        base.lm_head.weight[M2] = -base.lm_head.weight[M1]
    options = {"assistant_ensemble_weight": 0.1, "max_new_tokens": NEW}
    got = model.generate(PROMPT, embeddings=ROWS, assistant_model=base, **options)
    assert not torch.isin(got[:, PROMPT.shape[1] :], torch.tensor([M1, M2])).any()


def test_drafts_that_hold_placeholders_are_refused_not_raised(model, monkeypatch):
    """However a draft came by them: the draft of another tokenizer is text, encoded anew."""
    from transformers.generation import candidate_generator as candidates

    def draft(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([[M1, 5]])], 1), None

    monkeypatch.setattr(candidates.PromptLookupCandidateGenerator, "get_candidates", draft)
    options = {"prompt_lookup_num_tokens": 2, "max_new_tokens": NEW}
    got = model.generate(PROMPT, embeddings=ROWS, **options)
    assert torch.equal(got, greedy(model, PROMPT, ROWS))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_with_a_cache_without_one_in_chunks_and_from_embeddings(model, options):
    options = {**options, "max_new_tokens": NEW}
    cached = model.generate(PROMPT, embeddings=ROWS, **options)
    for other in ({"use_cache": False}, {"prefill_chunk_size": 4}):
        assert torch.equal(model.generate(PROMPT, embeddings=ROWS, **options, **other), cached)
    fused = model.generate(inputs_embeds=model.fuse(PROMPT, ROWS), **options)
    assert torch.equal(fused, cached[:, PROMPT.shape[1] :])
    batch = model.generate(
        BATCH, attention_mask=BATCH_MASK, embeddings=BATCH_ROWS, **options
    ).split(options.get("num_return_sequences", 1))
    alone = model.generate(BATCH[1:], embeddings={"m1": BATCH_ROWS["m1"][1:]}, **options)
    assert torch.equal(batch[1], alone)


def test_several_sequences_follow_their_own_rows(model):
    got = model.generate(
        BATCH,
        attention_mask=BATCH_MASK,
        embeddings=BATCH_ROWS,
        max_new_tokens=NEW,
        do_sample=True,
        top_k=1,
        num_return_sequences=3,
    )
    expected = greedy(model, BATCH, BATCH_ROWS, mask=BATCH_MASK)
    assert torch.equal(got, expected.repeat_interleave(3, 0))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=str)
def test_a_prompt_that_was_fused_before(either, options):
    fused = either.fuse(PROMPT, ROWS)
    expected = greedy(either, PROMPT, ROWS)
    options = {**options, "max_new_tokens": NEW}
    alone = either.generate(inputs_embeds=fused, **options)
    assert torch.equal(alone, expected[:, PROMPT.shape[1] :])
    assert torch.equal(either.generate(PROMPT, inputs_embeds=fused, **options), expected)
    with pytest.raises(ValueError, match="both embeddings and inputs_embeds"):
        either.generate(PROMPT, inputs_embeds=fused, embeddings=ROWS, **options)


@pytest.fixture(params=["dynamic", "static"])
def turn(request, model):
    """A first turn's answer, a function that gives its cache, and the second turn."""

    def cache():
        text = model.config.text_config
        filled = (
            DynamicCache(config=text)
            if request.param == "dynamic"
            else StaticCache(config=text, max_cache_len=64)
        )
        model.generate(PROMPT, embeddings=ROWS, max_new_tokens=NEW, past_key_values=filled)
        return filled

    answer = greedy(model, PROMPT, ROWS)
    whole = torch.cat([answer, torch.tensor([[44, M1, 45]])], 1)
    every = {"m1": torch.cat([ROWS["m1"], rows(1, 24, seed=5)])}
    return cache, whole, every


@pytest.mark.parametrize("given", ["all", "new"])
def test_a_second_turn_takes_all_rows_or_the_new_ones(model, turn, given):
    cache, whole, every = turn
    expected = greedy(model, whole, every)
    embeddings = every if given == "all" else {"m1": every["m1"][3:]}
    options = {"max_new_tokens": NEW, "embeddings": embeddings}
    assert torch.equal(model.generate(whole, past_key_values=cache(), **options), expected)
    if given == "new":
        filled = cache()
        held = int(filled.get_seq_length())
        got = model.generate(
            whole[:, held:],
            attention_mask=torch.ones_like(whole),
            past_key_values=filled,
            **options,
        )
        assert torch.equal(got, expected[:, held:])


@pytest.mark.parametrize("embeddings", [None, ROWS], ids=["none", "all"])
def test_a_second_turn_of_text(model, turn, embeddings):
    cache, whole, _ = turn
    text = whole[:, :-2]
    got = model.generate(text, embeddings=embeddings, past_key_values=cache(), max_new_tokens=NEW)
    assert torch.equal(got, greedy(model, text, ROWS))


@pytest.mark.parametrize("count", [0, 2, 3])
def test_a_second_turn_without_its_row_is_refused(model, turn, count):
    cache, whole, _ = turn
    message = rf"got {count} row\(s\), expected 4, .* or 1, those that the cache does not hold"
    with pytest.raises(ValueError, match=message):
        model.generate(
            whole,
            embeddings={"m1": rows(count, 24)},
            past_key_values=cache(),
            max_new_tokens=2,
        )


def test_guidance_never_picks_a_placeholder(model):
    options = {
        "guidance_scale": 1.5,
        "negative_prompt_ids": torch.tensor([[5, 6, 7]]),
        "max_new_tokens": NEW,
    }
    got = model.generate(PROMPT, embeddings=ROWS, **options)
    assert torch.equal(model.generate(PROMPT, embeddings=ROWS, use_cache=False, **options), got)
    assert not torch.isin(got[:, PROMPT.shape[1] :], torch.tensor([M1, M2])).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embeddings": None}, r"got 0 row\(s\), expected 3, .* placeholders"),
        ({"embeddings": {"m9": rows(3, 24)}}, "unknown modality 'm9'"),
        ({"embeddings": {"m1": rows(2, 24)}, "num_beams": 2}, r"got 2 row\(s\), expected 3"),
        ({"cache_implementation": "paged"}, "continuous batching takes no rows"),
        (
            {"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True},
            "only supports .*but got generation mode",
        ),
    ],
    ids=["no rows", "unknown", "beams", "paged", "contrastive"],
)
def test_what_cannot_be_answered_rightly_is_refused(model, options, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        model.generate(PROMPT, **{"embeddings": ROWS, "max_new_tokens": 2, **options})


def test_modes_that_go_together_in_no_way_that_is_right_are_refused(model, turn):
    cache, whole, every = turn
    given = {"embeddings": every, "max_new_tokens": 2}
    fused = model.fuse(PROMPT, ROWS)
    with pytest.raises(ValueError, match="prefill_chunk_size goes with an empty cache"):
        model.generate(whole, past_key_values=cache(), prefill_chunk_size=3, **given)
    with pytest.raises(ValueError, match=r"empty cache|Static cache"):
        model.generate(whole, past_key_values=cache(), prompt_lookup_num_tokens=3, **given)
    with pytest.raises(ValueError, match="not inputs_embeds"):
        model.generate(inputs_embeds=fused, prefill_chunk_size=3, max_new_tokens=2)
    with pytest.raises(ValueError, match="got inputs_embeds"):
        model.generate(PROMPT, inputs_embeds=fused, prompt_lookup_num_tokens=3, max_new_tokens=2)
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(
            BATCH.flip(1),
            attention_mask=BATCH_MASK.flip(1),
            embeddings=BATCH_ROWS,
            max_new_tokens=2,
        )
