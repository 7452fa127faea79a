"""The high-level door, on both engines."""

from __future__ import annotations

import pytest
import torch

from engines import reference
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("pipeline") / "model")


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


def test_a_stream_that_is_left_early_frees_the_engine(by_vllm):
    stream = by_vllm.generate(PLAIN, max_tokens=50, stream=True)
    next(stream)
    stream.close()
    assert not by_vllm._engine.llm.llm_engine.has_unfinished_requests()


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
    assert [type(result) for result in results[1:4]] == [EmbeddingError, ModalityError, ValueError]
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
        assert all(torch.equal(projectors[name], expected[name]) for name in expected)


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


def test_mistakes_at_construction(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="engine"):
        MultimodalQwen3Pipeline(checkpoint, engine="tensorrt")
    with pytest.raises(ValueError, match="composite"):
        MultimodalQwen3Pipeline(checkpoint, modalities={"m1": 24})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MultimodalQwen3Pipeline(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="device"):
        MultimodalQwen3Pipeline(checkpoint, device="tpu")
