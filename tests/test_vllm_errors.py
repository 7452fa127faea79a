"""Bad input gets an error that names modality, got and expected, before the engine sees it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from engines import TOLERANCE, reference, start, worst_difference
from tiny import make_base, make_composite

pytest.importorskip("vllm")

GOOD = {"m1": [torch.ones(2, 24)]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(
        tmp_path_factory.mktemp("errors") / "model",
        modalities={"m1": {"dim": 24, "max_rows": 64}, "m2": 40},
    )


@pytest.fixture(scope="module")
def llm(checkpoint):
    return start(checkpoint, max_model_len=256)


def greedy():
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=2, logprobs=1, ignore_eos=True)


def nan(rows=2):
    bad = torch.ones(rows, 24)
    bad[rows - 1, 5] = float("nan")
    return bad


BAD = {
    "unknown modality": ("hi", {"m3": [torch.ones(24)]}, ["m3", "m1", "m2"]),
    "wrong width": ("hi", {"m1": [torch.ones(2, 25)]}, ["m1", "25", "24"]),
    "no rows": ("hi", {"m1": [torch.ones(0, 24)]}, ["m1", "0 rows", "64"]),
    "too many rows": ("hi", {"m1": [torch.ones(65, 24)]}, ["m1", "65", "64"]),
    "3-D item": ("hi", {"m1": [torch.ones(1, 2, 24)]}, ["m1", "3"]),
    "3-D array": ("hi", {"m1": torch.ones(1, 2, 24)}, ["m1", "3"]),
    "integer": ("hi", {"m1": [torch.ones(2, 24, dtype=torch.int32)]}, ["m1", "int32"]),
    "integer array": ("hi", {"m1": [np.ones((2, 24), dtype=np.int64)]}, ["m1", "int64"]),
    "bool": ("hi", {"m1": [torch.ones(2, 24, dtype=torch.bool)]}, ["m1", "bool"]),
    "complex": ("hi", {"m1": [torch.ones(2, 24, dtype=torch.complex64)]}, ["m1", "complex64"]),
    "sparse": ("hi", {"m1": [torch.ones(2, 24).to_sparse()]}, ["m1", "sparse"]),
    "NaN": ("hi", {"m1": [torch.ones(2, 24), nan()]}, ["m1", "item 1", "NaN"]),
    "Inf": ("hi", {"m1": [torch.full((1, 24), float("inf"))]}, ["m1", "Inf"]),
    "more markers": ("<|m1|> <|m1|>", GOOD, ["m1", "2", "1"]),
    "fewer markers": ("<|m1|>", {"m1": [torch.ones(24)] * 3}, ["m1", "1", "3"]),
    "markers of another modality": ("<|m2|>", GOOD, ["m2", "1"]),
    "markers without items": ("see <|m1|>", None, ["m1", "1"]),
    "markers with an empty list": ("see <|m1|>", {"m1": []}, ["m1", "1"]),
    "too long": ("hi", {"m1": [torch.ones(64, 24)] * 5}, ["256", "320"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(llm, checkpoint, name):
    text, items, words = BAD[name]
    request = {"prompt": text} if items is None else {"prompt": text, "multi_modal_data": items}
    with pytest.raises(ValueError) as caught:
        llm.generate(request, greedy(), use_tqdm=False)
    for word in words:
        assert word in str(caught.value)
    good = llm.generate(
        {"prompt": "see <|m1|>", "multi_modal_data": GOOD}, greedy(), use_tqdm=False
    )[0]
    assert worst_difference(good, reference(str(checkpoint)), GOOD) <= TOLERANCE


ROWS = [[1.0] * 24] * 2
MISPLACED = {
    "the pipeline's spelling": {"multimodal_data": {"multimodal_embeddings": {"m1": [ROWS]}}},
    "the pipeline's spelling, short": {"multimodal_data": {"m1": [ROWS]}},
    "without what is around": {"multimodal_embeddings": {"m1": [ROWS]}},
    "one word": {"multimodaldata": {"m1": [ROWS]}},
    "mm_data": {"mm_data": {"m1": [ROWS]}},
    "embeddings": {"embeddings": ROWS},
    "the modality itself": {"m1": [ROWS]},
    "the wire's name": {"m1_embeds": {"data": "AA==", "dtype": "float32", "shape": [1, 24]}},
    "a typing error": {"mutli_modal_data": {"m1": ROWS}},
    "a typing error over tensors": {"anything": [torch.ones(2, 24)]},
    "an array": {"extra": {"deep": np.ones((2, 24))}},
    "a list of items": {"multi_modal_data": [torch.ones(2, 24)]},
    "uuids alone": {"multi_modal_uuids": {"m1": ["x"]}},
    "options of a processor": {"mm_processor_kwargs": {"m1": ROWS}},
}


@pytest.mark.parametrize("name", MISPLACED)
@pytest.mark.parametrize(
    "prompt", [{"prompt": "hi"}, {"prompt_token_ids": [5, 6]}], ids=["text", "ids"]
)
def test_rows_where_vllm_would_not_look_are_refused(llm, name, prompt):
    """Each was answered as text alone."""
    request = {**prompt, **MISPLACED[name]}
    with pytest.raises(ValueError, match="multi_modal_data") as caught:
        llm.generate(request, greedy(), use_tqdm=False)
    assert next(iter(MISPLACED[name])) in str(caught.value)


def test_rows_in_the_options_of_a_call_are_refused(llm):
    with pytest.raises(ValueError, match="mm_processor_kwargs"):
        llm.generate(["hi"], greedy(), mm_processor_kwargs={"m1": ROWS}, use_tqdm=False)


def test_beam_search_takes_rows_and_refuses_misplaced_ones(llm):
    from vllm.sampling_params import BeamSearchParams

    beams = BeamSearchParams(beam_width=2, max_tokens=2)
    prompt = {"prompt": "see <|m1|>", "multi_modal_data": GOOD}
    with_rows = llm.beam_search([prompt], beams)[0].sequences[0].tokens
    marker = llm.get_tokenizer().convert_tokens_to_ids("<|m1|>")
    assert list(with_rows).count(marker) == 2  # one item of two rows
    with pytest.raises(ValueError, match="multi_modal_data"):
        llm.beam_search([{"prompt": "hi", "multimodal_data": {"m1": [ROWS]}}], beams)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "hi", "multi_modal_data": {"m1": [ROWS]}},
        {"role": "user", "content": "hi", "m1": [ROWS]},
        {"role": "user", "content": [{"type": "text", "text": "hi", "m1": ROWS}]},
        {"role": "user", "content": [{"type": "m1", "m1": torch.ones(24), "m2": torch.ones(40)}]},
    ],
    ids=["message", "message, by name", "text part", "part of another modality"],
)
def test_rows_beside_the_parts_of_a_message_are_refused(llm, message):
    with pytest.raises(ValueError, match=r"would be dropped.*'m1_embeds'"):
        llm.chat([message], greedy(), use_tqdm=False)


def test_fields_that_hold_no_rows_are_none_of_our_business(llm):
    """Users keep ids and labels in the dicts that they hand over."""
    request = {"prompt": "hi", "id": 7, "label": "m1", "tags": ["m1"], "rows": [], "m1": "a name"}
    assert llm.generate(request, greedy(), use_tqdm=False)[0].outputs[0].token_ids
    message = {"role": "user", "content": "hi", "name": "m1", "id": [1, 2]}
    assert llm.chat([message], greedy(), use_tqdm=False)[0].outputs[0].token_ids


def test_prompt_embeds_beside_rows_are_refused(checkpoint):
    """vLLM serves one of the two: `_process_embeds` does not look at `multi_modal_data`."""
    import base64
    import io

    llm = start(checkpoint, max_model_len=256, enable_prompt_embeds=True)
    embeds = torch.zeros(3, 64)
    both = {"prompt_embeds": embeds, "multi_modal_data": GOOD}
    with pytest.raises(ValueError, match="both rows and 'prompt_embeds'"):
        llm.generate(both, greedy(), use_tqdm=False)
    out = io.BytesIO()
    torch.save(embeds, out)
    data = base64.b64encode(out.getvalue()).decode()
    messages = [
        {"role": "user", "content": [{"type": "prompt_embeds", "data": data}]},
        {"role": "assistant", "content": "and?"},
        {"role": "user", "content": [{"type": "m1", "m1": torch.ones(2, 24)}]},
    ]
    with pytest.raises(ValueError, match="both rows and 'prompt_embeds'"):
        llm.chat(messages, greedy(), use_tqdm=False)
    assert llm.chat(messages[:2], greedy(), use_tqdm=False)[0].outputs[0].token_ids


def test_tokens_that_already_hold_expanded_placeholders(llm):
    tokenizer = llm.get_tokenizer()
    marker = tokenizer.convert_tokens_to_ids("<|m1|>")
    request = {"prompt_token_ids": [marker, marker, 5], "multi_modal_data": GOOD}
    with pytest.raises(ValueError, match=r"'m1'.* 2 .*marker.* 1 item"):
        llm.generate(request, greedy(), use_tqdm=False)


def test_a_bad_request_leaves_its_batch_neighbours_alone(llm, checkpoint):
    """vLLM refuses the whole call; nothing of it stays in the engine."""
    good = {"prompt": "see <|m1|>", "multi_modal_data": GOOD}
    bad = {"prompt": "see <|m1|>", "multi_modal_data": {"m1": [nan()]}}
    with pytest.raises(ValueError, match="NaN"):
        llm.generate([good, bad, good], greedy(), use_tqdm=False)
    outputs = llm.generate([good, good], greedy(), use_tqdm=False)
    assert len(outputs) == 2
    for output in outputs:
        assert worst_difference(output, reference(str(checkpoint)), GOOD) <= TOLERANCE


def test_a_tensor_that_bypassed_the_processor_does_not_end_the_engine(llm, checkpoint):
    from mmqwen.packs import directory, pack_rows

    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.model
    wrong = [
        torch.ones(7),
        torch.ones(4, dtype=torch.int64),
        torch.full((64,), 2**62),
        pack_rows([(0, torch.ones(2, 25))]),
        pack_rows([(9, torch.ones(2, 24))]),
        "no tensor",
    ]
    ids = torch.zeros(8, dtype=torch.int64, device=next(model.parameters()).device)
    directories = model.embed_multimodal(pack=[[entry] for entry in wrong])
    assert len(directories) == len(wrong)
    embeds = model.embed_input_ids(
        ids,
        [directories[0][2:5]],
        is_multimodal=torch.tensor([False] * 5 + [True] * 3),
    )
    assert torch.isfinite(embeds).all()
    # A header that is right over a directory that is not: beside a good one, which is served.
    for row, word, value in ((1, 0, -(1 << 44)), (1, 1, 1 << 33), (0, 1, 0xFFFFFFFF)):
        broken = pack_rows([(0, torch.ones(2, 24))])
        kernel_rows = directory(broken)
        kernel_rows[row, word] ^= value
        good = pack_rows([(0, torch.ones(2, 24))])
        parts = model.embed_multimodal(pack=[[broken], [good]])
        if row == 1:
            parts[0] = parts[0][1:]
        count = 2 + len(parts[0])
        embeds = model.embed_input_ids(
            ids,
            parts,
            is_multimodal=torch.tensor([False] * (8 - count) + [True] * count),
        )
        both = torch.tensor([True] * 2)
        alone = model.embed_input_ids(ids[:2], parts[1:], is_multimodal=both)
        assert torch.isfinite(embeds).all()
        torch.testing.assert_close(embeds[-2:], alone, rtol=0, atol=TOLERANCE)


def test_speculative_drafters_that_read_embeddings_are_refused():
    from types import SimpleNamespace

    from mmqwen.vllm_plugin.engine_config import refuse_drafter

    def config(method):
        return SimpleNamespace(speculative_config=SimpleNamespace(method=method))

    with pytest.raises(ValueError, match=r"eagle3.*ngram"):
        refuse_drafter(config("eagle3"))
    refuse_drafter(config("ngram"))
    refuse_drafter(SimpleNamespace(speculative_config=None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}},
            "ec_transfer_config",
        ),
        ({"mm_encoder_only": True}, "mm_encoder_only"),
        ({"tokenizer_mode": "mistral"}, "tokenizer_mode 'mistral'"),
        # vLLM's own refusal: a pack may be as long as a prompt.
        (
            {"disable_chunked_mm_input": True, "max_num_batched_tokens": 64},
            "[Cc]hunked MM input disabled",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_features_that_would_lose_rows_are_refused_at_the_start(checkpoint, options, words):
    from vllm.config import ECTransferConfig

    if "ec_transfer_config" in options:
        options = {"ec_transfer_config": ECTransferConfig(**options["ec_transfer_config"])}
    with pytest.raises(ValueError, match=words):
        start(checkpoint, max_model_len=256, **options)


def test_rows_that_may_not_be_cut(checkpoint):
    """`disable_chunked_mm_input` with steps that hold a prompt: as without it."""
    llm = start(
        checkpoint, max_model_len=256, max_num_batched_tokens=256, disable_chunked_mm_input=True
    )
    requests = [
        {"prompt": "a " * 60 + "<|m1|>", "multi_modal_data": {"m1": [torch.ones(60, 24)]}}
        for _ in range(4)
    ]
    for output in llm.generate(requests, greedy(), use_tqdm=False):
        items = requests[0]["multi_modal_data"]
        assert worst_difference(output, reference(str(checkpoint)), items) <= TOLERANCE


def test_language_model_only_serves_text_and_refuses_rows(checkpoint):
    llm = start(checkpoint, max_model_len=256, language_model_only=True)
    assert llm.generate("hi", greedy(), use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(ValueError):
        llm.generate({"prompt": "see <|m1|>", "multi_modal_data": GOOD}, greedy(), use_tqdm=False)
    with pytest.raises(ValueError):
        llm.chat(
            [{"role": "user", "content": [{"type": "m1", "m1": torch.ones(24)}]}],
            greedy(),
            use_tqdm=False,
        )


def _rewrite_projectors(source, target, edit):
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        if any(name.startswith("projectors.") for name in tensors):
            edit(tensors)
            file.unlink()
            save_file(tensors, file, metadata={"format": "pt"})
    return target


def test_a_missing_projector_weight(tmp_path, checkpoint):
    def drop(tensors):
        tensors.pop("projectors.m2.linear_2.bias", None)

    broken = _rewrite_projectors(checkpoint, tmp_path / "missing", drop)
    with pytest.raises(ValueError, match=r"m2.*projectors\.m2\.linear_2\.bias"):
        start(broken)


def test_a_misshaped_projector_weight(tmp_path, checkpoint):
    def cut(tensors):
        if "projectors.m1.linear_1.weight" in tensors:
            weight = tensors["projectors.m1.linear_1.weight"]
            tensors["projectors.m1.linear_1.weight"] = weight[:, :-1].contiguous()

    broken = _rewrite_projectors(checkpoint, tmp_path / "misshaped", cut)
    with pytest.raises(ValueError, match=r"m1.*linear_1\.weight.*23.*24"):
        start(broken)


def test_hf_overrides_without_modalities(tmp_path):
    base = make_base(tmp_path / "base")
    with pytest.raises(ValueError, match="modalities"):
        start(base, hf_overrides={"architectures": ["MultimodalQwen3ForConditionalGeneration"]})


def test_unknown_base_model(tmp_path):
    from mmqwen.pipeline import MultimodalQwen3Pipeline

    with pytest.raises(FileNotFoundError, match="nowhere"):
        MultimodalQwen3Pipeline(tmp_path / "nowhere", modalities={"m1": 24})
