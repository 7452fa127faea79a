"""Same rows, same text => the transformers model's answers, whatever the engine does inside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import TOLERANCE, reference, start, worst_difference
from tiny import make_composite

pytest.importorskip("vllm")

GREEDY = {"temperature": 0.0, "max_tokens": 8, "logprobs": 1, "prompt_logprobs": 1}
BF16_TOLERANCE = 0.2
"""Of a log-probability: two layers round some 24 times, each by up to 2**-8 of a value of up to
some 10, and errors of random signs add up to sqrt(24) * 2**-8 * 10. Other rows move it by units."""


def sampling(**options):
    from vllm import SamplingParams

    return SamplingParams(**{**GREEDY, "ignore_eos": True, **options})


def draw(seed, **shapes):
    """Items of unit variance: `draw(0, m1=[3, 1], m2=[2])` has m1 items of 3 and 1 rows."""
    generator = torch.Generator().manual_seed(seed)
    widths = {"m1": 24, "m2": 40}
    return {
        name: [torch.randn(rows, widths[name], generator=generator) for rows in counts]
        for name, counts in shapes.items()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="module")
def llm(checkpoint):
    return start(checkpoint)


def check(llm, checkpoint, prompts, *, tolerance=TOLERANCE, dtype=torch.float32, **options):
    """Serve (prompt, items) pairs in one batch and compare each with the reference."""
    requests = []
    for prompt, items in prompts:
        request = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
        requests.append({**request, "multi_modal_data": items} if items else request)
    outputs = llm.generate(requests, sampling(**options), use_tqdm=False)
    model = reference(str(checkpoint), dtype)
    for (_, items), output in zip(prompts, outputs, strict=True):
        exact = dtype is torch.float32
        assert worst_difference(output, model, items, check_tokens=exact) <= tolerance
    return outputs


def test_interleaved_modalities_many_items_and_text_only_in_one_batch(llm, checkpoint):
    check(
        llm,
        checkpoint,
        [
            ("hello <|m1|> world <|m2|> quick <|m1|> fox", draw(1, m1=[3, 1], m2=[2])),
            ("describe " + "<|m1|> and <|m2|> " * 16, draw(2, m1=[1] * 16, m2=[2] * 16)),
            ("the lazy dog", {}),
            ("no markers here", draw(3, m2=[4, 1], m1=[2])),
            ("<|m2|> only one has markers", draw(4, m1=[5], m2=[1])),
            ("<|m1|>", draw(5, m1=[40])),
        ],
    )


def test_kinds_of_items_give_the_same_answer(llm, checkpoint):
    items = draw(6, m1=[3], m2=[1])
    rows, vector = items["m1"][0], items["m2"][0]
    forms = [
        items,
        {"m1": [rows.numpy()], "m2": [vector[0].numpy()]},
        {"m1": [rows.tolist()], "m2": [vector[0].tolist()]},
        {"m1": rows, "m2": vector[0]},
        {"m1": [rows.double().numpy()[:, ::1]], "m2": [np.asfortranarray(vector.numpy())]},
    ]
    prompts = [("see <|m1|> and <|m2|> now", form) for form in forms]
    outputs = llm.generate(
        [{"prompt": text, "multi_modal_data": form} for text, form in prompts],
        sampling(),
        use_tqdm=False,
    )
    model = reference(str(checkpoint))
    for output in outputs:
        assert worst_difference(output, model, items) <= TOLERANCE


def test_items_without_markers_stand_before_the_text_in_the_order_given(llm):
    items = draw(7, m2=[2, 1], m1=[3])
    output = llm.generate(
        {"prompt": "tell me", "multi_modal_data": items}, sampling(), use_tqdm=False
    )[0]
    tokenizer = llm.get_tokenizer()
    m1, m2 = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("m1", "m2"))
    assert list(output.prompt_token_ids) == [m2] * 3 + [m1] * 3 + tokenizer.encode("tell me")


def test_token_prompts_equal_text_prompts(llm, checkpoint):
    text, items = "a <|m1|> b <|m2|>", draw(8, m1=[2], m2=[3])
    ids = llm.get_tokenizer().encode(text)
    by_text, by_ids = check(llm, checkpoint, [(text, items), (ids, items)])
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids


def test_the_same_item_twice(llm, checkpoint):
    item = draw(9, m1=[4])["m1"][0]
    check(llm, checkpoint, [("x <|m1|> y <|m1|> z", {"m1": [item, item]})])


def test_a_modality_with_an_empty_list_is_a_text_prompt(llm, checkpoint):
    check(llm, checkpoint, [("the lazy dog", {"m1": []}), ("the lazy dog", {})])


def test_several_packs_in_one_prompt(llm, checkpoint):
    """Rows of different messages, and rows far apart, travel in packs of their own."""
    far = "x" * 290  # a token a letter
    check(
        llm,
        checkpoint,
        [
            (
                "<|im_start|>user\n<|m1|> what<|im_end|>\n<|im_start|>assistant\nfox<|im_end|>\n"
                "<|im_start|>user\n<|m2|> and <|m1|><|im_end|>\n",
                draw(10, m1=[3, 2], m2=[4]),
            ),
            (f"<|m1|> {far} <|m2|>", draw(11, m1=[3], m2=[2])),
        ],
    )


def test_sampled_tokens_are_never_placeholders(llm):
    """However much a client wants one: its logit is -inf."""
    tokenizer = llm.get_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("m1", "m2")]
    output = llm.generate(
        ["the"],
        sampling(
            temperature=2.0,
            max_tokens=50,
            prompt_logprobs=None,
            allowed_token_ids=[*ids, 7],
            logit_bias=dict.fromkeys(ids, 100.0),
        ),
        use_tqdm=False,
    )[0]
    assert set(output.outputs[0].token_ids) == {7}


def test_bfloat16(checkpoint):
    llm = start(checkpoint, dtype="bfloat16")
    check(
        llm,
        checkpoint,
        [
            ("hello <|m1|> world <|m2|> quick <|m1|> fox", draw(1, m1=[3, 1], m2=[2])),
            ("describe " + "<|m1|> " * 16, draw(2, m1=[1] * 16)),
            ("the lazy dog", {}),
        ],
        tolerance=BF16_TOLERANCE,
        dtype=torch.bfloat16,
        max_tokens=4,
    )


def test_chunked_prefill_that_cuts_items(checkpoint):
    llm = start(checkpoint, max_num_batched_tokens=16, max_num_seqs=4, enable_chunked_prefill=True)
    check(
        llm,
        checkpoint,
        [
            ("look at <|m1|> then <|m2|> please", draw(12, m1=[40], m2=[37])),
            ("<|m2|><|m1|>" * 6, draw(13, m1=[5] * 6, m2=[3] * 6)),
            ("the quick brown fox jumps over the lazy dog " * 2, {}),
        ],
    )


def test_prefix_cache_hits_give_the_same_answers(checkpoint):
    llm = start(checkpoint, enable_prefix_caching=True)
    model = reference(str(checkpoint))
    items = draw(14, m1=[40, 3], m2=[20])
    request = {
        "prompt": "one <|m1|> two <|m2|> three <|m1|> " + "dog " * 40,
        "multi_modal_data": items,
    }
    options = sampling(prompt_logprobs=None)
    first = llm.generate(request, options, use_tqdm=False)[0]
    again = llm.generate(request, options, use_tqdm=False)[0]
    assert not first.num_cached_tokens
    assert again.num_cached_tokens >= 64
    for output in (first, again):
        assert worst_difference(output, model, items) <= TOLERANCE


def test_preemption(checkpoint):
    """A cache of a few blocks for many growing requests: some are preempted and recomputed."""
    llm = start(
        checkpoint,
        num_gpu_blocks_override=14,
        max_num_seqs=6,
        max_model_len=256,
        enable_prefix_caching=False,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request

    def count(*args, **kwargs):
        preempted.append(1)
        return original(*args, **kwargs)

    scheduler._preempt_request = count
    check(
        llm,
        checkpoint,
        [(f"{seed} look <|m1|> at <|m2|>", draw(20 + seed, m1=[20], m2=[7])) for seed in range(6)],
        max_tokens=60,
        prompt_logprobs=None,
    )
    assert preempted, "the cache was not small enough to preempt anything"


def test_qwen2_backbone(tmp_path):
    checkpoint = make_composite(tmp_path / "qwen2", family="qwen2")
    check(
        start(checkpoint),
        checkpoint,
        [
            ("hello <|m1|> world <|m2|> fox", draw(15, m1=[3], m2=[2])),
            ("the lazy dog", {}),
        ],
    )


def test_text_alone_equals_the_base_model_bit_for_bit(tmp_path):
    """Same raw logits; only the placeholder's own, -inf here, differs."""
    composite = make_composite(tmp_path / "model", {"m1": 24})
    base = tmp_path / "model-base"
    texts = ["the lazy dog", "hello", "the quick brown fox jumps over " * 8]
    results = []
    for folder in (base, composite):
        llm = start(folder, logprobs_mode="raw_logits", max_logprobs=-1)
        outputs = llm.generate(texts, sampling(logprobs=-1, prompt_logprobs=-1), use_tqdm=False)
        results.append(
            [
                {token: entry.logprob for token, entry in step.items()}
                for output in outputs
                for step in [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            ]
        )
    placeholder = build_placeholder_id(composite)
    for of_base, of_composite in zip(*results, strict=True):
        assert of_composite.pop(placeholder) == float("-inf")
        of_base.pop(placeholder)
        assert of_composite == of_base


def build_placeholder_id(composite):
    from mmqwen.hf import MultimodalQwen3Config

    return MultimodalQwen3Config.from_pretrained(composite).modality_specs["m1"].token_id


def test_stock_text_model_with_hf_overrides_and_a_projector_file(checkpoint):
    """No composite checkpoint: modalities and a file of projectors come with the call."""
    base = checkpoint.with_name("model-base")
    llm = start(
        base,
        hf_overrides={
            "architectures": ["MultimodalQwen3ForConditionalGeneration"],
            "modalities": {"m1": {"dim": 24}, "m2": {"dim": 40}},
            "projector": str(checkpoint / "projectors.safetensors"),
        },
    )
    check(
        llm,
        checkpoint,
        [("hello <|m1|> world <|m2|> fox", draw(16, m1=[3], m2=[2])), ("the lazy dog", {})],
    )


def test_multiprocess_engine(tmp_path):
    """The engine in a process of its own, as users run it: packs cross a socket.

    Of Qwen3-MoE, which is served here alone: vLLM makes a process's expert groups for its first
    model. The servers of the other tests are engines of Qwen3 in processes of their own.
    """
    checkpoint = make_composite(tmp_path / "model", family="qwen3_moe")
    script = Path(__file__).with_name("run_multiprocess_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "worst difference" in done.stdout
