"""What is known of a completion, and scores of given continuations, on both engines."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3NextConfig

from engines import TOLERANCE, keep, reference, rows_of
from mmqwen.data import DatasetWriter
from mmqwen.pipeline import MultimodalQwen3Pipeline
from mmqwen.scoring import Completion, can_branch, plan_reads, reads_are_cheaper
from mmqwen.training import TrainSettings, train
from tiny import make_composite

pytest.importorskip("vllm")

ITEMS = {
    "m1": [torch.linspace(-1, 1, 72).view(3, 24), torch.linspace(1, -1, 24)],
    "m2": [torch.linspace(-2, 2, 80).view(2, 40)],
}
TEXT = "look <|m1|> and <|m2|> then <|m1|>"
PLAIN = {"prompt": TEXT, "multi_modal_data": ITEMS}
CHOICES = [" the river", " the", " a child", " the engine of the train", " the river"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("scoring") / "model")


@pytest.fixture(scope="module")
def by_vllm(checkpoint):
    options = {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 128}
    return MultimodalQwen3Pipeline(checkpoint, dtype="float32", max_model_len=256, **options)


@pytest.fixture(scope="module")
def by_transformers(checkpoint):
    options = {"device": "cpu", "dtype": "float32", "max_model_len": 256}
    return MultimodalQwen3Pipeline(checkpoint, engine="transformers", **options)


@pytest.fixture(params=["by_vllm", "by_transformers"])
def pipeline(request):
    return request.getfixturevalue(request.param)


@torch.no_grad()
def expected(checkpoint, pipeline, prompt, continuation):
    """The log-probability of each token, by one pass of the reference over all of it."""
    model = reference(str(checkpoint))
    ready = pipeline._checker.prepare(pipeline._read_any(prompt))
    ids = ready.prompt[0] if isinstance(ready.prompt, tuple) else ready.prompt["prompt_token_ids"]
    items = prompt.get("multi_modal_data", {}) if isinstance(prompt, dict) else {}
    logits = model(torch.tensor([[*ids, *continuation]]), embeddings=rows_of(items)).logits[0]
    rows = logits.float().log_softmax(-1)[len(ids) - 1 : -1]
    return rows.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()


def close(got, wanted):
    return got == pytest.approx(wanted, abs=TOLERANCE)


def test_full_completions_say_what_was_said(pipeline, checkpoint):
    text = pipeline.generate(PLAIN, max_tokens=6)
    (full,) = pipeline.generate(PLAIN, max_tokens=6, return_full=True)
    assert isinstance(full, Completion)
    assert full.text == text
    assert full.finish_reason == "length"
    assert len(full.token_ids) == 6
    assert close(full.logprobs, expected(checkpoint, pipeline, PLAIN, full.token_ids))
    first, second = pipeline.generate([PLAIN, "dog"], max_tokens=3, return_full=True)
    assert first[0].token_ids == full.token_ids[:3]
    assert second[0].text == pipeline.generate("dog", max_tokens=3)
    assert pipeline.generate([], return_full=True) == []


def test_several_texts_of_one_prompt(pipeline, checkpoint):
    group = pipeline.generate(PLAIN, max_tokens=4, n=3, temperature=1.0, return_full=True)
    assert len(group) == 3
    assert len({tuple(one.token_ids) for one in group}) > 1
    for one in group:  # before temperature, so that it equals the model's own
        assert close(one.logprobs, expected(checkpoint, pipeline, PLAIN, one.token_ids))
    (answers,) = (
        pipeline.chat(
            [{"role": "user", "content": "hello"}],
            max_tokens=3,
            n=2,
            temperature=1.0,
            return_full=True,
        ),
    )
    assert len(answers) == 2


def test_an_ending_is_among_the_tokens_and_is_the_reason(by_vllm, by_transformers):
    (full,) = by_vllm.generate(PLAIN, max_tokens=8, return_full=True)
    stop = next(t for t in full.token_ids if full.token_ids.index(t) >= 2)
    upto = full.token_ids[: full.token_ids.index(stop) + 1]
    (by_id,) = by_vllm.generate(PLAIN, max_tokens=8, stop_token_ids=[stop], return_full=True)
    inputs = [PLAIN, "the lazy dog"]  # the shorter one is padded
    (twin,), (other,) = by_transformers.generate(
        inputs, max_tokens=8, eos_token_id=[stop], return_full=True
    )
    assert by_id.token_ids == twin.token_ids == upto
    assert by_id.finish_reason == twin.finish_reason == "stop"
    assert close(by_id.logprobs, twin.logprobs)
    assert len(other.token_ids) == len(other.logprobs)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n": 2}, "n=2 with temperature 0"),
        ({"n": 0}, "n is 0, expected an integer >= 1"),
        ({"n": True}, "n is True"),
        ({"logprobs": 3}, "logprobs"),
        ({"stream": True}, "return_full.*leave stream out"),
        ({"lora_request": object()}, "lora_request"),
    ],
)
def test_bad_fields_of_full_completions(pipeline, fields, words):
    with pytest.raises(ValueError, match=words):
        pipeline.generate(PLAIN, return_full=True, **fields)


def test_scores_equal_a_pass_over_all_of_it(pipeline, checkpoint):
    scores = pipeline.score(PLAIN, CHOICES)
    ids = [pipeline._engine.tokenizer.encode(c, add_special_tokens=False) for c in CHOICES]
    assert [score.token_ids for score in scores] == ids
    for score in scores:
        wanted = expected(checkpoint, pipeline, PLAIN, score.token_ids)
        assert close(score.token_logprobs, wanted)
        assert close(score.logprob, sum(wanted))
        assert close(score.per_token, sum(wanted) / len(wanted))
    again = pipeline.score(PLAIN, CHOICES)  # what is cached by now changes nothing
    assert close([s.logprob for s in again], [s.logprob for s in scores])


def test_scores_of_a_batch_keep_their_order(pipeline, checkpoint):
    chat = {"messages": [{"role": "user", "content": [{"type": "m2", "m2": ITEMS["m2"][0]}]}]}
    inputs = [PLAIN, "the lazy dog", {"prompt_token_ids": [5, 6, 7]}, chat]
    asked = [[" a"], CHOICES, [[8], [8, 9]], ["yes", "no"]]
    found = pipeline.score(inputs, asked)
    assert [len(scores) for scores in found] == [1, 5, 2, 2]
    for value, scores in zip(inputs[:3], found, strict=False):
        for score in scores:
            wanted = expected(checkpoint, pipeline, value, score.token_ids)
            assert close(score.token_logprobs, wanted)
    assert all(math.isfinite(score.logprob) for score in found[3])
    assert pipeline.score([], []) == []


def test_more_labels_than_vllm_reads_at_once(by_vllm, by_transformers):
    labels = [[token] for token in range(300)]
    one, other = (p.score("the lazy", labels) for p in (by_vllm, by_transformers))
    assert close([s.logprob for s in one], [s.logprob for s in other])


def test_a_recurrent_state_is_not_shared(by_transformers, monkeypatch):
    """Hybrids: transformers goes on from such a state by single tokens alone."""
    shared = by_transformers.score(PLAIN, CHOICES)
    monkeypatch.setattr("mmqwen.scoring.can_branch", lambda cache: False)
    for one, other in zip(by_transformers.score(PLAIN, CHOICES), shared, strict=True):
        assert close(one.token_logprobs, other.token_logprobs)
    assert can_branch(DynamicCache(config=Qwen3Config(num_hidden_layers=2)))
    layers = ["linear_attention", "full_attention"]
    config = Qwen3NextConfig(num_hidden_layers=2, layer_types=layers)
    assert not can_branch(DynamicCache(config=config))


def test_a_long_continuation_is_run_whole(by_vllm, by_transformers):
    text = ["A child counted bridges: one, two, three, four. Describe the picture."]
    (one,), (other,) = (p.score(PLAIN, text) for p in (by_vllm, by_transformers))
    assert len(one.token_ids) > 10
    assert close(one.token_logprobs, other.token_logprobs)


@pytest.mark.parametrize(
    ("continuations", "words"),
    [
        ([], "no continuations"),
        (" a", "a list of str, or of lists of token ids, got str"),
        ([""], "continuation 0: it is empty"),
        ([" a", []], "continuation 1: it is empty"),
        ([" a <|m1|>"], r"continuation 0: it holds <\|m1\|>"),
        ([[10**6]], "token id 0 of the prompt is 1000000"),
        ([" a" * 300], "expected fewer than 256"),
        ([5], "continuation 0: got int, expected a str or a list"),
    ],
)
def test_bad_continuations(pipeline, continuations, words):
    with pytest.raises(ValueError, match=words):
        pipeline.score(PLAIN, continuations)


def test_a_bad_input_comes_back_in_place(pipeline):
    found = pipeline.score(["dog", {"text": 5}, ""], [[" a"], [" a"], [" a"]], on_error="return")
    assert found[0][0].token_ids
    assert isinstance(found[1], ValueError)
    assert isinstance(found[2], ValueError)
    with pytest.raises(ValueError, match="1 lists of continuations for 2 inputs"):
        pipeline.score(["a", "b"], [[" c"]])
    with pytest.raises(ValueError, match="lora_request"):
        pipeline.score("dog", [" a"], lora_request=object())


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="vLLM's LoRA kernels take no float32 on a GPU"
)
def test_an_adapter_answers_and_scores_as_the_merged_model(checkpoint, tmp_path):
    from vllm.lora.request import LoRARequest

    with DatasetWriter(tmp_path / "data", {"m1": 24, "m2": 40}) as writer:
        writer.add("look <|m1|>", " the river", {"m1": [ITEMS["m1"][0]]})
    fields = {"model": checkpoint, "data": tmp_path / "data", "stage": "lora", "lr": 1e-2}
    fields |= {"max_steps": 3, "tokens_per_step": 64, "cpu": True, "progress": False}
    apart = train(TrainSettings(**fields, output=tmp_path / "apart", merge=False))
    merged = train(TrainSettings(**fields, output=tmp_path / "merged"))
    lora = LoRARequest("trained", 1, str(apart / "adapter"))
    options = {"dtype": "float32", "max_model_len": 128}
    fast = {"enforce_eager": True, "block_size": 32, "num_gpu_blocks_override": 64}
    one = {"prompt": "look <|m1|>", "multi_modal_data": {"m1": [ITEMS["m1"][0]]}}
    with MultimodalQwen3Pipeline(merged, engine="transformers", **options) as twin:
        (wanted,) = twin.generate(one, max_tokens=4, return_full=True)
        scores = [score.logprob for score in twin.score(one, CHOICES)]
    pipeline = MultimodalQwen3Pipeline(apart, enable_lora=True, **options, **fast)
    keep(pipeline._engine.llm)
    pipeline._engine.llm.llm_engine.add_lora(lora)  # first, as docs/training.md says
    (full,) = pipeline.generate(one, max_tokens=4, return_full=True, lora_request=lora)
    found = [score.logprob for score in pipeline.score(one, CHOICES, lora_request=lora)]
    (without,) = pipeline.generate(one, max_tokens=4, return_full=True)
    assert full.token_ids == wanted.token_ids
    assert close(full.logprobs, wanted.logprobs)
    assert close(found, scores)
    assert not close(without.logprobs, full.logprobs)


def test_what_is_read_after_what():
    assert plan_reads([[1, 2], [1, 3], [4]]) == {(): [1, 4], (1,): [2, 3]}
    many = [[a, b] for a in range(20) for b in range(5)]
    assert reads_are_cheaper(1000, many, 16)
    assert not reads_are_cheaper(1000, [list(range(100))], 16)  # one answer, token by token
    assert not reads_are_cheaper(1000, [[1, 2, 3]], None)
    assert reads_are_cheaper(1000, [[1], [2]], None)  # one read gives both
