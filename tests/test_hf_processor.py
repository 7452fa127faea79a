"""The processor: markers, packing order, padding, token ids, round trips, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

from engines import TOLERANCE
from mmqwen.hf import MultimodalQwen3Processor
from mmqwen.modalities import ModalityError, parse_modalities
from mmqwen.tokens import add_placeholder_tokens, next_token_id
from mmqwen.transport import EmbeddingError
from tiny import make_composite, make_tokenizer

M1, M2 = 403, 404
MODALITIES = {"m1": {"dim": 24, "token_id": M1}, "m2": {"dim": 40, "token_id": M2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(tmp_path_factory.mktemp("processor") / "composite")


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_auto_processor_reads_the_composite_config(processor):
    assert type(processor) is MultimodalQwen3Processor
    assert {n: (s.dim, s.token_id) for n, s in processor.specs.items()} == {
        "m1": (24, M1),
        "m2": (40, M2),
    }
    assert processor.tokenizer.convert_tokens_to_ids("<|m2|>") == M2


def test_a_marker_becomes_one_placeholder_a_row(processor):
    ids = processor.tokenizer
    batch = processor(
        "A <|m2|> b <|m1|><|m2|>", {"m1": [rows(2, 24)], "m2": [rows(40), rows(3, 40)]}
    )
    expected = [
        *ids("A ")["input_ids"],
        M2,
        *ids(" b ")["input_ids"],
        *[M1] * 2,
        *[M2] * 3,
    ]
    assert batch["input_ids"].tolist() == [expected]
    assert batch["attention_mask"].tolist() == [[1] * len(expected)]
    assert torch.equal(batch["embeddings"]["m1"], rows(2, 24))
    assert torch.equal(batch["embeddings"]["m2"], torch.cat([rows(40)[None], rows(3, 40)]))


def test_items_without_markers_go_before_the_text(processor):
    batch = processor("Hi <|m1|>", {"m2": [rows(2, 40)], "m1": [rows(24)]})
    assert batch["input_ids"][0, :2].tolist() == [M2, M2]
    assert batch["input_ids"][0, -1] == M1
    unmarked = processor("Hi", {"m2": [rows(2, 40)], "m1": [rows(24)]})
    assert unmarked["input_ids"][0, :3].tolist() == [M2, M2, M1]


def test_every_form_of_input_gives_the_same_batch(processor):
    text, item = "Look <|m1|> here", rows(2, 24)
    nested = {"multimodal_embeddings": {"m1": [item]}}
    ids = processor.tokenizer(text)["input_ids"]
    forms = [
        processor(text, {"m1": [item]}),
        processor(text, {"m1": item}),
        processor(text, {"m1": [item.tolist()]}),
        processor(text, {"m1": [item.numpy().astype(np.float64)]}),
        processor(text, nested),
        processor([text], [nested]),
        processor(ids, nested),
        processor({"text": text, "multimodal_data": nested}),
        processor([{"text": text, "multimodal_data": nested}]),
        processor({"prompt": text, "multi_modal_data": {"m1": [item]}}),
    ]
    for form in forms[1:]:
        assert torch.equal(form["input_ids"], forms[0]["input_ids"])
        torch.testing.assert_close(form["embeddings"]["m1"], item, rtol=1e-6, atol=1e-6)


def test_a_batch_is_padded_left_and_packed_in_order(processor):
    prompts = ["<|m1|> a much longer prompt about bridges", "b", {"text": "<|m2|><|m1|>"}]
    data = [{"m1": [rows(3, 24)]}, None, {"m1": [rows(24, seed=1)], "m2": [rows(2, 40)]}]
    batch = processor(prompts, data)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape
    for row, prompt, own in zip(range(3), prompts, data, strict=True):
        alone = processor(prompt, own)["input_ids"][0]
        assert torch.equal(ids[row][mask[row].bool()], alone)
        assert mask[row, -1] == 1
    assert (ids[mask == 0] == processor.tokenizer.pad_token_id).all()
    assert torch.equal(batch["embeddings"]["m1"], torch.cat([rows(3, 24), rows(24, seed=1)[None]]))


def test_padding_and_return_types(processor):
    right = processor(["a much longer one", "b"], padding_side="right")
    assert right["attention_mask"][1].tolist()[0] == 1
    assert right["attention_mask"][1].tolist()[-1] == 0
    fixed = processor("b", padding="max_length", max_length=9)
    assert fixed["input_ids"].shape == (1, 9)
    lists = processor(["a much longer one", "b"], padding=False, return_tensors=None)
    assert len(lists["input_ids"][0]) > len(lists["input_ids"][1])
    assert isinstance(processor("b", return_tensors=None)["input_ids"][0], int)
    assert processor("b")["embeddings"] == {}


def test_to_moves_and_casts_the_rows(processor):
    batch = processor("x", {"m1": [rows(2, 24)]}).to(torch.bfloat16)
    assert batch["embeddings"]["m1"].dtype is torch.bfloat16
    assert batch["input_ids"].dtype is torch.int64
    assert processor("x", {"m1": [rows(24)]}, dtype=torch.float16)["embeddings"]["m1"].dtype is (
        torch.float16
    )


@torch.no_grad()
def test_model_takes_what_the_processor_makes(processor, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    batch = processor(["See <|m1|>.", "None."], [{"m1": [rows(2, 24)]}, None])
    together = model(**batch).logits
    alone = model(**processor("See <|m1|>.", {"m1": [rows(2, 24)]})).logits
    torch.testing.assert_close(together[0, -1], alone[0, -1], rtol=0, atol=TOLERANCE)
    assert model.generate(**batch, max_new_tokens=3).shape[0] == 2


def test_chat_template_passes_through(processor):
    messages = [{"role": "user", "content": "Is <|m1|> a bridge?"}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == ("<|im_start|>user\nIs <|m1|> a bridge?<|im_end|>\n<|im_start|>assistant\n")
    assert processor(text, {"m1": [rows(2, 24)]})["input_ids"].tolist()[0].count(M1) == 2


def test_chat_template_reads_parts_and_lists_of_text(processor):
    template = (Path(__file__).parent / "chat_templates" / "qwen3.jinja").read_text("utf-8")
    parts = [
        {"type": "text", "text": "Is "},
        {"type": "m1"},
        {"type": "text", "text": " a bridge?"},
    ]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts},
    ]
    text = processor.apply_chat_template(messages, template, add_generation_prompt=True)
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs <|m1|> a bridge?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert text == expected
    assert (
        processor.apply_chat_template([messages, messages], template)
        == [expected.removesuffix("<|im_start|>assistant\n")] * 2
    )
    ids = processor.apply_chat_template(messages[:1], template, tokenize=True)["input_ids"]
    assert processor.tokenizer.decode(ids) == "<|im_start|>system\nBe brief.<|im_end|>\n"
    for wrong in ([{"type": "image"}], [{"type": "m9"}], 5):
        with pytest.raises(ModalityError):
            processor.apply_chat_template([{"role": "user", "content": wrong}], template)


def test_tokenized_chat_template_brings_the_rows_of_its_parts(processor):
    def ask(item):
        return [{"role": "user", "content": ["See ", {"type": "m1", "m1": item}]}]

    options = {"tokenize": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(ask(rows(2, 24)), return_tensors="pt", **options)
    text = "<|im_start|>user\nSee <|m1|><|im_end|>\n<|im_start|>assistant\n"
    expected = processor(text, {"m1": [rows(2, 24)]})
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["embeddings"]["m1"], rows(2, 24))
    both = processor.apply_chat_template(
        [ask(rows(2, 24)), ask(rows(24))], return_tensors="pt", padding=True, **options
    )
    length = expected["input_ids"].shape[1]
    assert both["attention_mask"].sum(dim=1).tolist() == [length, length - 1]
    assert torch.equal(both["embeddings"]["m1"], torch.cat([rows(2, 24), rows(24)[None]]))
    lists = processor.apply_chat_template(ask(rows(2, 24)), return_dict=False, **options)
    assert lists == expected["input_ids"][0].tolist()
    silent = "{%- for message in messages %}{{- message.role }}{%- endfor %}"
    with pytest.raises(ModalityError, match="dropped them"):
        processor.apply_chat_template(ask(rows(24)), silent, **options)


@pytest.mark.parametrize("ids", [[np.int64(5), 6], (5, 6), [np.uint8(5), np.int32(6)]])
def test_ids_of_other_integers(processor, ids):
    assert processor(ids)["input_ids"].tolist() == [[5, 6]]


def test_saved_alone_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = MultimodalQwen3Processor.from_pretrained(tmp_path)
    assert again.specs == processor.specs
    assert again.vocab_size == processor.vocab_size == 467
    data = {"m1": [rows(2, 24)]}
    assert torch.equal(
        again("a <|m1|>", data)["input_ids"], processor("a <|m1|>", data)["input_ids"]
    )
    assert again.apply_chat_template([{"role": "user", "content": "x"}])


def test_composite_config_outranks_a_stale_processor_file(processor, checkpoint, tmp_path):
    processor.save_pretrained(tmp_path)
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    config.modalities["m1"]["max_rows"] = 7
    config.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).specs["m1"].max_rows == 7


def test_placeholders_are_added_once_at_the_ids_of_the_config():
    tokenizer = make_tokenizer()
    first = next_token_id(tokenizer)
    reversed_ids = {"a": {"dim": 1, "token_id": first + 1}, "b": {"dim": 1, "token_id": first}}
    assert add_placeholder_tokens(tokenizer, parse_modalities(reversed_ids)) == 2
    assert add_placeholder_tokens(tokenizer, parse_modalities(reversed_ids)) == 0
    assert tokenizer.convert_tokens_to_ids(["<|a|>", "<|b|>"]) == [first + 1, first]
    assert tokenizer.decode([5, first, 6], skip_special_tokens=True) == tokenizer.decode([5, 6])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dim": 1}, "no token_id"),
        ({"dim": 1, "token_id": 5}, "the tokenizer gives new tokens the ids .403."),
        ({"dim": 1, "token_id": 500}, "the tokenizer gives new tokens the ids .403."),
        ({"dim": 1, "token_id": 403, "token": "<|im_end|>"}, "has id 402 in the tokenizer"),
    ],
)
def test_ids_that_the_tokenizer_cannot_give_are_refused(fields, words):
    with pytest.raises(ModalityError, match=words):
        MultimodalQwen3Processor(make_tokenizer(), {"m1": fields})


@pytest.mark.parametrize(
    ("text", "data", "error", "words"),
    [
        ("x", {"m9": [rows(24)]}, EmbeddingError, "unknown modality 'm9'"),
        ("x", {"m1": [rows(25)]}, EmbeddingError, "'m1'.*width 25.*width 24"),
        ("x", {"m1": [rows(24), rows(0, 24)]}, EmbeddingError, "item 1.*0 rows"),
        ("x", {"m1": [rows(24) * torch.nan]}, EmbeddingError, "'m1'"),
        ("x", {"m1": [torch.ones(24, dtype=torch.long)]}, EmbeddingError, "dtype"),
        ("<|m1|><|m1|>", {"m1": [rows(24)]}, ModalityError, r"2 <\|m1\|> marker.*1 item"),
        ("<|m1|>", {"m1": [rows(24)] * 2}, ModalityError, r"1 <\|m1\|> marker.*2 item"),
        ("<|m1|>", None, ModalityError, "no 'm1' item"),
        ("<|m1|>", {"m1": []}, ModalityError, "no 'm1' item"),
        (["x", "y"], {"m1": [rows(24)]}, ValueError, "must be a list"),
        (["x", "y"], [None], ValueError, "got 1 for 2"),
        (None, None, ValueError, "expected a prompt"),
        ("lone \ud800", None, ValueError, "character 5.*surrogate"),
        ([[5, None]], None, ValueError, "token id 1 .*None, expected an integer"),
        ([3.5], None, ValueError, "got float"),
        ([5, 467], None, ValueError, "token id 1 of the prompt is 467, expected 0 to 466"),
        ([5, -1], None, ValueError, "token id 1 of the prompt is -1, expected 0 to 466"),
        ([[5], [2**40]], None, ValueError, "token id 0 of the prompt is 1099511627776"),
        ({"prompt_token_ids": [467]}, None, ValueError, "token id 0 of the prompt is 467"),
        ({"multimodal_data": {}}, None, ValueError, "exactly one of .text."),
        ({"text": "x", "extra": 1}, None, ValueError, "extra"),
        ({"text": "x", "multi_modal_data": {"m1": [rows(24)]}}, {}, ValueError, "twice"),
    ],
)
def test_bad_input_is_refused(processor, text, data, error, words):
    with pytest.raises(error, match=words):
        processor(text, data)


def test_ids_beyond_the_tokenizer_where_no_table_is_known():
    alone = MultimodalQwen3Processor(make_tokenizer(), MODALITIES)
    assert alone([M2 - 2])["input_ids"].tolist() == [[M2 - 2]]
    with pytest.raises(ValueError, match=f"is {M2 + 1}, expected 0 to {M2}"):
        alone([M2 + 1])


@pytest.mark.parametrize("tokenize", [False, True])
@pytest.mark.parametrize(
    "content", ["lone \ud800", [{"type": "text", "text": "lone \ud800"}], ["lone \ud800"]]
)
def test_messages_that_are_no_unicode(processor, content, tokenize):
    with pytest.raises(ValueError, match=r"character 5 .*surrogate"):
        processor.apply_chat_template([{"role": "user", "content": content}], tokenize=tokenize)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"truncation": True}, "would cut items"),
        ({"padding": "max_length", "max_length": 1}, "max_length is 1"),
        ({"padding": "most"}, "got 'most'"),
        ({"padding_side": "top"}, "got 'top'"),
        ({"padding": False}, "lengths"),
        ({"return_tensors": "np"}, "got 'np'"),
    ],
)
def test_bad_options_are_refused(processor, options, words):
    with pytest.raises(ValueError, match=words):
        processor(["one two three", "four"], **options)
