"""The high-level door, on both engines."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from engines import reference
from mmqwen.chat import render_chat
from mmqwen.messages import read_messages
from mmqwen.modalities import ModalityError
from mmqwen.pipeline import MultimodalQwen3Pipeline
from mmqwen.transport import EmbeddingError
from tiny import make_base, make_composite

pytest.importorskip("vllm")

ITEMS = {
    "m1": [torch.linspace(-1, 1, 72).view(3, 24), torch.linspace(1, -1, 24)],
    "m2": [torch.linspace(-2, 2, 80).view(2, 40)],
}
PLAIN = {
    "text": "look <|m1|> and <|m2|> then <|m1|>",
    "multimodal_data": {"multimodal_embeddings": ITEMS},
}
ENGINE = {
    "dtype": "float32",
    "max_model_len": 256,
    "enforce_eager": True,
    "block_size": 32,
    "num_gpu_blocks_override": 128,
}


TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in Path(__file__).parent.glob("chat_templates/*.jinja")
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = make_composite(tmp_path_factory.mktemp("pipeline") / "model")
    config = folder / "tokenizer_config.json"  # Llama's template begins with it
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def by_vllm(checkpoint):
    return MultimodalQwen3Pipeline(checkpoint, **ENGINE)


@pytest.fixture(scope="module")
def by_transformers(checkpoint):
    return MultimodalQwen3Pipeline(
        str(checkpoint), device="cpu", engine="transformers", dtype="float32", max_model_len=256
    )


@pytest.fixture(params=["by_vllm", "by_transformers"])
def pipeline(request):
    return request.getfixturevalue(request.param)


def test_one_input_gives_a_str_and_a_list_a_list(pipeline):
    one = pipeline.generate(PLAIN, max_tokens=8)
    assert isinstance(one, str)
    many = pipeline.generate([PLAIN, "the lazy dog", PLAIN], max_tokens=8)
    assert isinstance(many, list)
    assert many[0] == many[2] == one
    assert isinstance(many[1], str)
    assert pipeline.generate([], max_tokens=8) == []


def test_both_engines_agree(by_vllm, by_transformers):
    inputs = [
        PLAIN,
        {"prompt": "describe", "multi_modal_data": ITEMS},
        "the lazy dog",
        {"prompt_token_ids": [5, 6, 7]},
    ]
    answers = [p.generate(inputs, max_tokens=8) for p in (by_vllm, by_transformers)]
    # vLLM holds back the bytes of an unfinished character; transformers shows a replacement.
    assert [a.rstrip("\ufffd") for a in answers[0]] == [a.rstrip("\ufffd") for a in answers[1]]


def test_stream_joins_to_the_same_text(pipeline):
    whole = pipeline.generate(PLAIN, max_tokens=12)
    pieces = list(pipeline.generate(PLAIN, max_tokens=12, stream=True))
    assert "".join(pieces) == whole
    assert len(pieces) > 1
    joined = {0: "", 1: ""}
    for index, piece in pipeline.generate([PLAIN, "dog"], max_tokens=6, stream=True):
        joined[index] += piece
    assert joined[0] == pipeline.generate(PLAIN, max_tokens=6)
    assert joined[1] == pipeline.generate("dog", max_tokens=6)


def worker_threads():
    return [thread for thread in threading.enumerate() if "_fill" in thread.name]


def idle(pipeline):
    """Whether nothing runs for a stream any more."""
    if hasattr(pipeline._engine, "llm"):
        engine = pipeline._engine
        return not (engine.llm.llm_engine.has_unfinished_requests() or engine._inboxes)
    return not worker_threads()


def test_a_stream_that_is_left_early_ends(pipeline):
    stream = pipeline.generate(PLAIN, max_tokens=150, stream=True)
    next(stream)
    stream.close()
    assert idle(pipeline)

    def consume():
        for _ in pipeline.generate([PLAIN, "dog"], max_tokens=150, stream=True):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError, match="own"):
        consume()
    gc.collect()
    assert idle(pipeline)
    pipeline.generate(PLAIN, max_tokens=150, stream=True)  # never started
    gc.collect()
    assert idle(pipeline)
    assert list(pipeline.generate([], stream=True)) == []


def test_a_stream_in_a_cycle_is_collected_while_another_call_has_the_engine(pipeline):
    expected = pipeline.generate(PLAIN, max_tokens=8)
    cycle = [pipeline.generate(PLAIN, max_tokens=150, stream=True)]
    next(cycle[0])
    cycle.append(cycle)
    other = pipeline.generate(PLAIN, max_tokens=8, stream=True)
    first = next(other)
    del cycle
    gc.collect()
    assert first + "".join(other) == expected
    assert idle(pipeline)


def test_streams_and_calls_at_once_each_get_their_own(pipeline):
    inputs = [PLAIN, "the lazy dog", "describe"]
    expected = pipeline.generate(inputs, max_tokens=10)
    streams = [pipeline.generate(value, max_tokens=10, stream=True) for value in inputs]
    got = [next(stream) for stream in streams]
    assert pipeline.generate(inputs, max_tokens=10) == expected
    open_ones = list(enumerate(streams))
    while open_ones:
        for index, stream in list(open_ones):
            try:
                got[index] += next(stream)
            except StopIteration:
                open_ones.remove((index, stream))
    assert got == expected


def test_threads_share_a_pipeline(pipeline):
    inputs = [PLAIN, "the lazy dog", {"prompt_token_ids": [5, 6, 7]}, "describe"]
    expected = pipeline.generate(inputs, max_tokens=8)
    got = {}

    def ask(index):
        try:
            whole = pipeline.generate(inputs[index], max_tokens=8)
            pieces = pipeline.generate(inputs[index], max_tokens=8, stream=True)
            got[index] = [whole, "".join(pieces)]
        except Exception as error:
            got[index] = error

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[index] for index in range(len(inputs))] == [[text, text] for text in expected]


def test_an_error_of_the_engine_reaches_the_consumer(pipeline, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    engine = pipeline._engine
    with monkeypatch.context() as patch:
        if hasattr(engine, "llm"):
            patch.setattr(engine.llm.llm_engine, "step", fail)
        else:
            patch.setattr(engine.model, "generate", fail)
        with pytest.raises(RuntimeError, match="memory"):
            list(pipeline.generate(PLAIN, max_tokens=4, stream=True))
        with pytest.raises(RuntimeError, match="memory"):
            pipeline.generate(PLAIN, max_tokens=4)
    assert idle(pipeline)
    assert pipeline.generate([PLAIN], max_tokens=4) == [pipeline.generate(PLAIN, max_tokens=4)]


def test_a_request_that_is_aborted_elsewhere_does_not_hang(by_vllm):
    stream = by_vllm.generate(PLAIN, max_tokens=50, stream=True)
    next(stream)
    by_vllm._engine.llm.llm_engine.abort_request(list(by_vllm._engine._inboxes))
    with pytest.raises(RuntimeError, match="aborted elsewhere"):
        list(stream)


def test_stop_strings(by_vllm, by_transformers):
    whole = by_vllm.generate(PLAIN, max_tokens=16)
    stop = whole[4:6]
    expected = whole[: whole.index(stop)]
    assert by_vllm.generate(PLAIN, max_tokens=16, stop=[stop]) == expected
    pieces = by_vllm.generate(PLAIN, max_tokens=16, stop=stop, stream=True)
    assert "".join(pieces) == expected
    text = by_transformers.generate(PLAIN, max_tokens=16, stop_strings=[stop])
    assert text.startswith(expected + stop)
    assert len(text) < len(whole)
    pieces = by_transformers.generate(PLAIN, max_tokens=16, stop_strings=[stop], stream=True)
    assert "".join(pieces) == text


def test_streams_hold_back_bytes_of_an_unfinished_character(by_vllm, by_transformers):
    text = "n\u00e9 \U0001f600 \u4f60\u597d x"
    ids = by_vllm._engine.tokenizer.encode(text)
    assert len(ids) > len(text)  # characters of several tokens
    start = len(by_transformers._engine.tokenizer.encode("dog"))

    def next_one(_, sequence):
        return [ids[len(sequence) - start]]

    options = {"max_tokens": len(ids), "prefix_allowed_tokens_fn": next_one}
    pieces = list(by_transformers.generate("dog", stream=True, **options))
    assert "".join(pieces) == by_transformers.generate("dog", **options) == text
    assert not any("\ufffd" in piece for piece in pieces)
    # Of vLLM, any text of these tokens: what is no character comes as a replacement, once.
    options = {"max_tokens": 24, "allowed_token_ids": sorted(set(ids))}
    pieces = by_vllm.generate("dog", stream=True, **options)
    assert "".join(pieces) == by_vllm.generate("dog", **options)


def test_more_than_one_text_is_refused_by_name(by_vllm, by_transformers):
    for fields in ({"n": 2}, {"logprobs": 1}, {"prompt_logprobs": 0}, {"detokenize": False}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*one text"):
            by_vllm.generate(PLAIN, **fields)
    for fields in (
        {"num_return_sequences": 2, "num_beams": 2},
        {"return_dict_in_generate": True},
        {"output_scores": True},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(fields))}=.*one text"):
            by_transformers.generate(PLAIN, **fields)
    assert by_vllm.generate("dog", n=1, max_tokens=2) == by_vllm.generate("dog", max_tokens=2)
    beams = by_transformers.generate(PLAIN, num_beams=2, num_return_sequences=1, max_tokens=3)
    assert isinstance(beams, str)
    with pytest.raises(ValueError, match="num_beams=2"):
        by_transformers.generate(PLAIN, num_beams=2, stream=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected an integer >= 1"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"temperature": -1}, "temperature is -1, expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"on_error": "ignore"}, "on_error is 'ignore', expected 'raise' or 'return'"),
        ({"max_new_tokens": 4}, "'max_new_tokens'.*did you mean max_tokens"),
        ({"do_sample": True}, "'do_sample'.*temperature"),
        ({"topp": 0.5}, "'topp'.*did you mean top_p"),
        ({"lora_request": object()}, "lora_request"),
    ],
)
def test_bad_fields_are_refused_before_anything_runs(pipeline, fields, words, stream):
    with pytest.raises(ValueError, match=words):
        pipeline.generate(PLAIN, stream=stream, **fields)
    assert idle(pipeline)


def test_fields_of_the_other_engine_and_out_of_range(by_vllm, by_transformers):
    with pytest.raises(ValueError, match="did you mean stop"):
        by_vllm.generate(PLAIN, stop_strings=["x"])
    with pytest.raises(ValueError, match="did you mean stop_strings"):
        by_transformers.generate(PLAIN, stop=["x"])
    for fields in ({"top_p": 2.0}, {"min_tokens": 9, "max_tokens": 4}, {"seed": "x"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            by_vllm.generate(PLAIN, **fields)
    for fields in ({"top_p": "all"}, {"stop": 5}):
        with pytest.raises(ValueError, match="sampling fields"):
            by_vllm.generate(PLAIN, **fields)
    with pytest.raises(ValueError, match="top_k"):
        list(by_transformers.generate(PLAIN, temperature=1.0, top_k=-1, stream=True))
    assert not worker_threads()


@pytest.mark.parametrize("inputs", [None, 5, b"text", 1.5], ids=["none", "int", "bytes", "float"])
def test_inputs_of_another_type(pipeline, inputs):
    with pytest.raises(ValueError, match="inputs are a str, a dict, or a list"):
        pipeline.generate(inputs)


UNSERVABLE = [
    ("lone \ud800 surrogate", "character 5 .*surrogate"),
    ({"text": "\udfff"}, "surrogate"),
    ("", "empty"),
    ({"prompt_token_ids": []}, "empty"),
    ({"text": "", "multi_modal_data": {"m1": []}}, "empty"),
    ({"prompt_token_ids": [5, -1]}, "token id 1 .* -1, expected 0 to"),
    ({"prompt_token_ids": [10**6]}, "token id 0 .*expected 0 to"),
    ({"prompt_token_ids": [10**30]}, "expected 0 to"),
    ({"prompt_token_ids": [5, "6"]}, "token id 1 .*'6', expected an integer"),
    ({"prompt_token_ids": [5, None]}, "None, expected an integer"),
    ({"prompt_token_ids": [True, 5]}, "True, expected an integer"),
    ({"prompt_token_ids": [np.bool_(True)]}, "expected an integer"),
    ({"prompt_token_ids": [5.0]}, "expected an integer"),
    ({"prompt_token_ids": np.ones((2, 2), dtype=np.int64)}, "expected an integer"),
    ({"prompt_token_ids": "56"}, "list of ids, got str"),
    ({"prompt_token_ids": 5}, "list of ids, got int"),
    (None, "got NoneType"),
    (5, "prompt_token_ids"),
    ([5, 6], "got list"),
    (b"bytes", "got bytes"),
    ({}, "exactly one"),
    ({"text": 5}, "'text' is a str"),
    ({"text": "x", "prompt": "x"}, "exactly one"),
    ({"text": "x", "multimodal_data": torch.ones(2)}, "'multimodal_data' is a dict, got Tensor"),
    ({"text": "x", "multi_modal_data": np.ones(2)}, "'multi_modal_data' is a dict, got ndarray"),
    ({"text": "x", "multi_modal_data": {"m1": None}}, "m1"),
    ({"text": "", "multi_modal_data": {"m1": None}}, "m1"),
    ({"prompt_token_ids": [], "multi_modal_data": {"m1": torch.tensor(1.0)}}, "m1"),
    ({"text": "x", "multi_modal_data": {"m1": [None]}}, "m1"),
    ({"text": "x", "multi_modal_data": {"m1": ["rows"]}}, "m1"),
    ({"text": "x", "multi_modal_data": {"m1": torch.tensor(1.0)}}, "m1"),
    ({"text": "x", "multi_modal_data": {"m1": [[True] * 24]}}, "m1"),
    ({"text": "x", "multi_modal_data": {"m1": [torch.full((24,), torch.nan)]}}, "m1"),
    ({"text": "x", "multi_modal_data": {"m9": [torch.ones(24)]}}, "unknown modality 'm9'"),
    ({"text": "x", "multi_modal_data": {9: [torch.ones(24)]}}, "unknown modality"),
    ({"prompt_token_ids": [5] * 256}, "256"),
    ({"prompt_token_ids": [5] * 5000}, "256"),
    ({"text": "x", "multi_modal_data": {"m1": [torch.ones(256, 24)]}}, "256"),
]


def test_each_input_that_cannot_be_served_comes_back_and_its_neighbours_are_served(pipeline):
    inputs = [PLAIN, *(value for value, _ in UNSERVABLE), "dog"]
    results = pipeline.generate(inputs, max_tokens=4, on_error="return")
    assert results[0] == pipeline.generate(PLAIN, max_tokens=4)
    assert results[-1] == pipeline.generate("dog", max_tokens=4)
    for result, (value, words) in zip(results[1:-1], UNSERVABLE, strict=True):
        assert isinstance(result, ValueError), (value, result)
        with pytest.raises(ValueError, match=words):
            raise result
    streamed = list(
        pipeline.generate(["dog", "\ud800"], max_tokens=4, stream=True, on_error="return")
    )
    assert streamed[0][0] == 1
    assert isinstance(streamed[0][1], ValueError)
    assert "".join(piece for index, piece in streamed[1:] if index == 0) == results[-1]
    (alone,) = pipeline.generate("\ud800", stream=True, on_error="return")
    assert isinstance(alone, ValueError)
    assert isinstance(pipeline.generate("", on_error="return"), ValueError)


def test_ids_of_numpy_and_torch_are_ids(pipeline):
    expected = pipeline.generate({"prompt_token_ids": [5, 6, 7]}, max_tokens=4)
    for ids in ([np.int64(5), 6, np.uint8(7)], np.array([5, 6, 7]), torch.tensor([5, 6, 7])):
        assert pipeline.generate({"prompt_token_ids": ids}, max_tokens=4) == expected


def test_rows_alone_are_a_prompt(pipeline):
    rows = {"multi_modal_data": ITEMS}
    texts = pipeline.generate(
        [{"text": "", **rows}, {"prompt_token_ids": [], **rows}], max_tokens=4
    )
    assert texts[0] == texts[1]


def test_a_limit_of_the_engine_fails_its_input_alone(by_vllm, monkeypatch):
    """`--limit-mm-per-prompt` is found by vLLM's side of the check."""
    processor = by_vllm._engine.llm.llm_engine.renderer.get_mm_processor()
    monkeypatch.setitem(vars(processor), "_limited", True)

    def limit(modality, count):
        if count > 1:
            raise ValueError(f"at most 1 {modality} item, got {count}")

    monkeypatch.setattr(processor.info, "validate_num_items", limit)
    results = by_vllm.generate([PLAIN, "dog"], max_tokens=4, on_error="return")
    assert "at most 1 m1" in str(results[0])
    assert results[1] == by_vllm.generate("dog", max_tokens=4)


CONVERSATION = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}, "And kind."]},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is "},
            {"type": "m1", "m1": ITEMS["m1"][0]},
            {"type": "text", "text": "?"},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
        ],
    },
    {"role": "tool", "content": [{"type": "text", "text": "a bridge"}, "of stone"]},
    {"role": "assistant", "content": [{"type": "text", "text": "A bridge."}], "tool_calls": None},
    {
        "role": "user",
        "content": [{"type": "text", "text": "Sure?"}, {"type": "m2", "m2": ITEMS["m2"][0]}],
    },
]


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen2.5-vl", "qwen3"])
def test_chat_renders_as_the_server_does(by_vllm, name):
    from vllm.renderers import ChatParams

    template = TEMPLATES[name]
    renderer = by_vllm._engine.llm.llm_engine.renderer
    options = {"add_generation_prompt": True, "tokenize": False}
    params = ChatParams(chat_template=template, chat_template_kwargs=options)
    _, server = renderer.render_messages(CONVERSATION, params)
    plain, items = read_messages(CONVERSATION, by_vllm.specs)
    text = render_chat(
        by_vllm._engine.tokenizer, plain, chat_template=template, add_generation_prompt=True
    )
    assert text == server["prompt"]
    for words in ("Be brief.", "And kind.", "What is <|m1|>?", "of stone", "Sure?<|m2|>"):
        assert words in text
    assert {key: len(members) for key, members in items.items()} == {"m1": 1, "m2": 1}


def test_chat_with_lists_of_text(pipeline):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Look."}, {"type": "m1", "m1": ITEMS["m1"][0]}],
        },
    ]
    by_hand = {
        "qwen3": (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nLook.<|m1|><|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
        "smolvlm": (
            "<|im_start|>System: Be brief.<end_of_utterance>\n"
            "User: Look.<|m1|><end_of_utterance>\nAssistant:"
        ),
    }
    for name, text in by_hand.items():
        answer = pipeline.chat(
            messages, max_tokens=6, chat_template_kwargs={"chat_template": TEMPLATES[name]}
        )
        prompt = {"prompt": text, "multi_modal_data": {"m1": ITEMS["m1"][:1]}}
        assert answer == pipeline.generate(prompt, max_tokens=6)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "list of dicts"),
        (["hello"], "a message is a dict"),
        ([{"content": "hello"}], "role"),
        ([{"role": "user", "content": 5}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "m1"}]}], "lacks the field 'm1'"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "text is a string"),
        ([{"role": "user", "content": "lone \ud800"}], "surrogate"),
        ([{"role": "odd", "content": [{"type": "m1", "m1": ITEMS["m1"][0]}]}], "dropped them"),
    ],
)
def test_messages_that_cannot_be_read(pipeline, messages, words):
    options = {"chat_template_kwargs": {"chat_template": TEMPLATES["qwen3"]}, "max_tokens": 2}
    with pytest.raises(ValueError, match=words):
        pipeline.chat(messages, **options)
    assert isinstance(pipeline.chat(messages, on_error="return", **options), ValueError)


def test_chat_equals_the_template_with_markers(pipeline):
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is "},
                {"type": "m1", "m1": ITEMS["m1"][0]},
                {"type": "m2", "m2": ITEMS["m2"][0]},
                {"type": "text", "text": "?"},
            ],
        },
    ]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is <|m1|><|m2|>?<|im_end|>\n<|im_start|>assistant\n"
    )
    by_hand = {"prompt": text, "multi_modal_data": {"m1": ITEMS["m1"][:1], "m2": ITEMS["m2"]}}
    assert pipeline.chat(messages, max_tokens=8) == pipeline.generate(by_hand, max_tokens=8)


def test_marker_text_typed_into_a_message_is_refused(pipeline):
    with pytest.raises(ModalityError, match="m1"):
        pipeline.chat([{"role": "user", "content": "ignore <|m1|> please"}])


def test_bad_inputs_raise_before_anything_runs_or_come_back_in_place(pipeline):
    wide = {"text": "x", "multimodal_data": {"multimodal_embeddings": {"m1": [torch.ones(25)]}}}
    long = {"prompt": "x", "multi_modal_data": {"m1": [torch.ones(200, 24)] * 2}}
    with pytest.raises(EmbeddingError, match="25") as caught:
        pipeline.generate([PLAIN, wide])
    assert "input 1 of 2" in caught.value.__notes__[0]
    results = pipeline.generate(
        [PLAIN, wide, "see <|m2|>", long, {"txt": "x"}, PLAIN], max_tokens=4, on_error="return"
    )
    assert results[0] == results[5] == pipeline.generate(PLAIN, max_tokens=4)
    assert [type(result) for result in results[1:3]] == [EmbeddingError, ModalityError]
    assert "256" in str(results[3])
    assert isinstance(results[4], ValueError)


def test_a_text_model_with_modalities_given(checkpoint):
    base = checkpoint.with_name("model-base")
    with pytest.warns(UserWarning, match="UNTRAINED"):
        fresh = MultimodalQwen3Pipeline(
            base, modalities={"m1": 24, "m2": 40}, engine="transformers", dtype="float32"
        )
    with fresh:
        assert isinstance(fresh.generate(PLAIN, max_tokens=2), str)
    trained = MultimodalQwen3Pipeline(
        base,
        modalities={"m1": 24, "m2": 40},
        projector=checkpoint / "projectors.safetensors",
        engine="transformers",
        dtype="float32",
    )
    with trained:
        projectors = trained._engine.model.projectors.state_dict()
        expected = reference(str(checkpoint)).projectors.state_dict()
        assert projectors.keys() == expected.keys()
        assert all(torch.equal(projectors[name].cpu(), expected[name]) for name in expected)


def test_modalities_are_read_off_the_first_input(tmp_path):
    base = make_base(tmp_path / "base")
    lazy = MultimodalQwen3Pipeline(base, engine="transformers", dtype="float32")
    with pytest.raises(ValueError, match="no modalities are known"):
        lazy.generate("text alone")
    with pytest.warns(UserWarning, match=r"'sensor': 12"):
        answer = lazy.generate(
            {"prompt": "read", "multi_modal_data": {"sensor": [[0.5] * 12]}}, max_tokens=2
        )
    assert isinstance(answer, str)
    assert lazy.specs["sensor"].dim == 12


def test_modalities_are_read_off_the_whole_first_batch(tmp_path):
    base = make_base(tmp_path / "base")
    lazy = MultimodalQwen3Pipeline(base, engine="transformers", dtype="float32")
    assert lazy.generate([]) == []
    assert list(lazy.generate([], stream=True)) == []
    batch = [
        "text alone",
        {"prompt": "<|a|>", "multi_modal_data": {"a": [torch.ones(12)], "b": []}},
        {"prompt": "<|b|>", "multi_modal_data": {"b": [torch.ones(2, 7)]}},
        {"prompt": "<|a|>", "multi_modal_data": {"a": [torch.ones(13)]}},
        {"prompt": "x", "multi_modal_data": {"no name": [torch.ones(3)]}},
    ]
    with pytest.warns(UserWarning, match=r"'a': 12, 'b': 7"):
        results = lazy.generate(batch, max_tokens=2, on_error="return")
    assert [type(result) for result in results[:3]] == [str, str, str]
    assert "width 12" in str(results[3])
    assert "no name" in str(results[4])
    assert {name: spec.dim for name, spec in lazy.specs.items()} == {"a": 12, "b": 7}
    lazy.close()
    with pytest.raises(ValueError, match="closed"):
        lazy.generate("text")


@pytest.fixture
def late_start(tmp_path, monkeypatch):
    """A pipeline in a thread that starts its engine; the event lets it go on."""
    from mmqwen import pipeline as module

    begun, go_on = threading.Event(), threading.Event()

    class Late(module.TransformersEngine):
        def __init__(self, *args):
            begun.set()
            go_on.wait(60)
            super().__init__(*args)

    monkeypatch.setattr(module, "TransformersEngine", Late)
    lazy = MultimodalQwen3Pipeline(
        make_base(tmp_path / "base"), engine="transformers", dtype="float32"
    )
    results = []

    def ask():
        prompt = {"prompt": "read", "multi_modal_data": {"m1": [[0.5] * 12]}}
        try:
            results.append(lazy.generate(prompt, max_tokens=2))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(60)
    yield lazy, go_on, thread, results
    go_on.set()
    thread.join()


@pytest.mark.filterwarnings("ignore:modalities")
def test_close_waits_for_an_engine_that_is_starting(late_start):
    lazy, go_on, thread, results = late_start
    folder = Path(lazy._folder.name)
    closing = threading.Thread(target=lazy.close)
    closing.start()
    closing.join(0.2)
    assert folder.is_dir()  # which the engine is about to read
    go_on.set()
    thread.join()
    closing.join()
    assert "closed" in str(results[0])
    assert lazy._engine is None
    assert not folder.exists()


@pytest.mark.filterwarnings("ignore:modalities")
def test_an_engine_that_does_not_start_leaves_no_folder(late_start, monkeypatch):
    lazy, go_on, thread, results = late_start
    folder = Path(lazy._folder.name)
    (folder / "checkpoint" / "projectors.safetensors").unlink()
    go_on.set()
    thread.join()
    assert isinstance(results[0], Exception)
    assert not folder.exists()
    assert lazy._folder is None


def test_a_model_that_accelerate_places_is_left_where_it_is(checkpoint, by_transformers, tmp_path):
    pytest.importorskip("accelerate")
    places = {
        "model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu", "projectors": "disk",
    }  # fmt: skip
    options = {"engine": "transformers", "dtype": "float32", "max_model_len": 256}
    options |= {"offload_folder": str(tmp_path)}
    with MultimodalQwen3Pipeline(checkpoint, device_map=places, **options) as mapped:
        model = mapped._engine.model
        assert model.hf_device_map == places
        assert model.get_input_embeddings().weight.is_meta
        expected = by_transformers.generate(PLAIN, max_tokens=4)
        assert mapped.generate(PLAIN, max_tokens=4) == expected
        assert "".join(mapped.generate(PLAIN, max_tokens=4, stream=True)) == expected
    with pytest.raises(ValueError, match=r"device 'cpu' beside device_map='auto'"):
        MultimodalQwen3Pipeline(checkpoint, device="cpu", device_map="auto", **options)


def test_mistakes_at_construction(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="engine"):
        MultimodalQwen3Pipeline(checkpoint, engine="tensorrt")
    with pytest.raises(ValueError, match="composite"):
        MultimodalQwen3Pipeline(checkpoint, modalities={"m1": 24})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MultimodalQwen3Pipeline(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device"):
        MultimodalQwen3Pipeline(checkpoint, device="tpu")
    for device in ("cuda:99", "tpu", ""):
        with pytest.raises(ValueError, match="cannot be used here"):
            MultimodalQwen3Pipeline(checkpoint, device=device, engine="transformers")
