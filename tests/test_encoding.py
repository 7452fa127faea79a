"""What of a conversation is learnt, with the templates that models ship (see chat_templates/)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from mmqwen.chat import render_chat
from mmqwen.data import DatasetError, DatasetWriter, Encoding, Sample, encode, validate
from mmqwen.data.encoding import IGNORED, stop_ids
from mmqwen.modalities import assign_token_ids, parse_modalities
from mmqwen.tokens import add_placeholder_tokens

TEMPLATES = Path(__file__).with_name("chat_templates")
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THINK = "<think>\n\n</think>\n\n"

# Of each model: special tokens, other added tokens, end of sequence, beginning of sequence.
MODELS = {
    "qwen3": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"],
        "<|im_end|>",
        None,
    ),
    "qwen2.5": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], [], "<|im_end|>", None),
    "llama3": (
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ],
        [],
        "<|end_of_text|>",
        "<|begin_of_text|>",
    ),
    "phi3": (
        ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        [],
        "<|endoftext|>",
        None,
    ),
    "deepseek_r1_distill": (
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        ["<think>", "</think>"],
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
    ),
}
ENDS = {"qwen3": "<|im_end|>", "qwen2.5": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|end|>"}


@cache
def _vocabulary() -> str:
    """A byte-level BPE that splits as Qwen's does and knows runs of newlines as one token."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(["user\n\nassistant\n\n\n  hi in think there \n"] * 9, trainer)
    return tokenizer.to_str()


def load(name: str, *, eos: str | None = None, template: str | None = None):
    """A tokenizer with a model's added tokens and its real chat template, or another."""
    specials, others, own_eos, bos = MODELS[name]
    tokenizer = Tokenizer.from_str(_vocabulary())
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in specials])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in others])
    if bos:  # as Llama's: every text begins with it, unless asked not to
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos or own_eos,
        bos_token=bos,
        chat_template=template or (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
    )


def with_m1(tokenizer):
    """The tokenizer's spec of a modality m1, whose token it learns."""
    specs = parse_modalities({"m1": 4})
    specs = assign_token_ids(specs, tokenizer.get_added_vocab(), len(tokenizer))
    add_placeholder_tokens(tokenizer, specs)
    return specs


def talk(*turns: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": text} for role, text in turns)


def learnt(encoding: Encoding, tokenizer) -> list[str]:
    """The runs of learnt tokens, as text."""
    runs: list[list[int]] = [[]]
    for label in encoding.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def tokens(tokenizer, messages, **options) -> list[int]:
    """The ids by which a server reads a conversation."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encoded(tokenizer, messages) -> Encoding:
    return encode(Sample(messages=messages), {}, tokenizer, {})


# -- one answer ----------------------------------------------------------------------------------

ANSWERS = ["hi", "n", "in", "user", "assistant", "think", "a\n\nb", "hi ", "hi\n", "hi \n\n", " hi"]
ANSWERS += ["é😀 日本", "<b>", "{{ x }}", "answer0"]


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_learnt_with_the_end_of_its_turn(name, answer):
    """Whatever it says, and wherever else that stands: in the template, in the question."""
    tokenizer = load(name)
    question = [("system", f"in {answer}"), ("user", f"think hi n {answer}")]
    messages = talk(*question, ("assistant", answer))
    encoding = encoded(tokenizer, messages)
    written = answer.strip() if name == "llama3" else answer  # its template strips
    head = THINK if name == "qwen3" else ""
    assert learnt(encoding, tokenizer) == [head + written + ENDS[name]]
    assert encoding.token_ids == tokens(tokenizer, messages)
    prompt = tokens(tokenizer, messages[:-1], add_generation_prompt=True)
    assert encoding.token_ids[: len(prompt)] == prompt  # what is served
    assert set(encoding.labels[: len(prompt)]) == {IGNORED}
    assert encoding.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("name", ["qwen2.5", "phi3"])
def test_a_prompt_ends_where_it_is_served_though_the_text_would_merge(name):
    """`assistant\\n` and `\\nhi`: the whole text has one token for both newlines."""
    tokenizer = load(name)
    messages = talk(("user", "hi"), ("assistant", "\nhi"))
    encoding = encoded(tokenizer, messages)
    prompt = tokens(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = tokens(tokenizer, messages)
    assert whole[: len(prompt)] != prompt  # or this test shows nothing
    assert encoding.token_ids[: len(prompt)] == prompt
    assert tokenizer.decode(encoding.token_ids) == tokenizer.decode(whole)
    assert learnt(encoding, tokenizer) == ["\nhi" + ENDS[name]]


@pytest.mark.parametrize("name", ["qwen2.5-vl", "smolvlm"])
@pytest.mark.parametrize("turns", [1, 2])
def test_a_template_that_reads_parts_is_given_parts(name, turns):
    """As serving does it: SmolVLM's prints nothing of a text that stands where it expects parts."""
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = load("qwen2.5", template=template)
    end = {"qwen2.5-vl": "<|im_end|>", "smolvlm": "<end_of_utterance>"}[name]
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    specs = with_m1(tokenizer)
    asked = [("user", "think <|m1|> hi"), ("assistant", "hi"), ("user", "n"), ("assistant", "in")]
    messages = talk(*asked[: 2 * turns])
    encoding = encode(Sample(messages=messages, items={"m1": [0]}), {"m1": [1]}, tokenizer, specs)
    text = render_chat(tokenizer, messages[:-1], add_generation_prompt=True)
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "think <|m1|> hi" in text
    assert encoding.token_ids[: len(prompt)] == prompt
    assert encoding.labels[len(prompt)] != IGNORED
    written = [" hi", " in"] if name == "smolvlm" else ["hi", "in"]
    assert learnt(encoding, tokenizer) == [answer + end for answer in written[:turns]]
    assert stop_ids(tokenizer)[-1] == tokenizer.convert_tokens_to_ids(end)


def test_the_empty_think_block_is_prompt_where_serving_writes_it():
    """Learnt from the default prompt on; with thinking switched off, the answer follows alike."""
    tokenizer = load("qwen3")
    messages = talk(("user", "hi"), ("assistant", "in"))
    encoding = encoded(tokenizer, messages)
    for options, answer in (({}, THINK + "in"), ({"enable_thinking": False}, "in")):
        prompt = tokens(tokenizer, messages[:-1], add_generation_prompt=True, **options)
        assert encoding.token_ids[: len(prompt)] == prompt
        rest = tokenizer.decode([t for t in encoding.labels[len(prompt) :] if t != IGNORED])
        assert rest == answer + "<|im_end|>"


def test_a_reasoning_is_learnt_with_its_answer():
    tokenizer = load("qwen3")
    said = "<think>\nso\n</think>\n\nhi"
    messages = talk(("user", "hi"), ("assistant", said))
    assert learnt(encoded(tokenizer, messages), tokenizer) == [said + "<|im_end|>"]


def test_the_beginning_of_sequence_stands_once():
    tokenizer = load("llama3")
    encoding = encoded(tokenizer, talk(("user", "hi"), ("assistant", "in")))
    assert encoding.token_ids.count(tokenizer.bos_token_id) == 1
    prompt = encode(Sample(prompt="hi", answer=" in"), {}, tokenizer, {})
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.token_ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5"])
def test_the_template_s_end_is_learnt_not_the_tokenizer_s(name):
    """A base model's tokenizer: its eos ends documents, its template ends turns otherwise."""
    tokenizer = load(name, eos="<|endoftext|>")
    (text,) = learnt(encoded(tokenizer, talk(("user", "a"), ("assistant", "in "))), tokenizer)
    assert text.endswith("in <|im_end|>")
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_ids(tokenizer) == ids  # what a server of the trained model must stop at


def test_an_answer_that_spells_the_end_goes_on_to_its_own():
    tokenizer = load("qwen2.5")
    messages = talk(("user", "a"), ("assistant", "hi<|im_end|>in"))
    assert learnt(encoded(tokenizer, messages), tokenizer) == ["hi<|im_end|>in<|im_end|>"]


# -- several turns -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENDS)
def test_every_answer_is_learnt(name):
    tokenizer, end = load(name), ENDS[name]
    head = THINK if name == "qwen3" else ""  # in the last turn only, as the template has it
    turns = [("user", "hi"), ("assistant", "hi"), ("user", "hi in"), ("assistant", "in")]
    turns += [("user", "hi"), ("assistant", "hi")]
    for system in ([], [("system", "hi in")]):
        messages = talk(*system, *turns)
        encoding = encoded(tokenizer, messages)
        assert learnt(encoding, tokenizer) == ["hi" + end, "in" + end, head + "hi" + end]
        assert encoding.token_ids == tokens(tokenizer, messages)
        for at in (at for at, m in enumerate(messages) if m["role"] == "assistant"):
            prompt = tokens(tokenizer, messages[:at], add_generation_prompt=True)
            assert encoding.token_ids[: len(prompt)] == prompt
            assert encoding.labels[len(prompt) - 1] == IGNORED
            assert encoding.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize("name", ENDS)
def test_a_system_message_alone_before_the_answer(name):
    tokenizer = load(name)
    encoding = encoded(tokenizer, talk(("system", "hi"), ("assistant", "hi")))
    assert learnt(encoding, tokenizer) == ["hi" + ENDS[name]]


def test_answers_between_tools_are_learnt():
    """The call is text, as the format has it; the tool's answer is a question to the model."""
    call = '<tool_call>\n{"name": "hi", "arguments": {}}\n</tool_call>'
    turns = [("user", "hi"), ("assistant", call), ("tool", "in"), ("tool", "hi")]
    turns += [("assistant", "in"), ("user", "hi"), ("assistant", "n")]
    for name, head in (("qwen3", THINK), ("qwen2.5", "")):
        tokenizer = load(name)
        encoding = encoded(tokenizer, talk(*turns))
        wanted = [call + "<|im_end|>", "in<|im_end|>", head + "n<|im_end|>"]
        assert learnt(encoding, tokenizer) == wanted
        assert encoding.token_ids == tokens(tokenizer, talk(*turns))


def test_markers_and_rows_do_not_move_the_labels():
    tokenizer = load("qwen3")
    specs = with_m1(tokenizer)
    turns = [("user", "a <|m1|> b"), ("assistant", "hi"), ("user", "<|m1|>"), ("assistant", "in")]
    encoding = encode(Sample(messages=talk(*turns)), {"m1": [3, 2]}, tokenizer, specs)
    assert learnt(encoding, tokenizer) == ["hi<|im_end|>", THINK + "in<|im_end|>"]
    assert encoding.token_ids.count(specs["m1"].token_id) == 5
    with pytest.raises(ValueError, match=r"an answer holds <\|m1\|>"):
        encode(Sample(messages=talk(turns[0], ("assistant", "<|m1|>"))), {}, tokenizer, specs)
    tokenizer = load("phi3")  # knows no tools and leaves their messages out
    specs = with_m1(tokenizer)
    turns = [("user", "a"), ("tool", "<|m1|>"), ("assistant", "in")]
    with pytest.raises(ValueError, match=r"leaves out or repeats a <\|m1\|>"):
        encode(Sample(messages=talk(*turns)), {"m1": [1]}, tokenizer, specs)


# -- what cannot be told ---------------------------------------------------------------------------

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages|length }}" + TURNS + ASK, "rewrites earlier messages"),
        (TURNS.replace("<|im_end|>", "\n") + ASK, "holds no special token"),
        (TURNS.replace("<|im_end|>", "<|end|>") + ASK, "holds no special token"),
        (TURNS.replace("{{ m.content }}", "") + ASK, "cannot be told where message 1 ends"),
        (
            TURNS.replace("content }}", "content * 2 }}") + ASK,
            "cannot be told where message 1 ends",
        ),
        ("{{ raise_exception('no system here') }}", "refuses the conversation: no system here"),
        ("{{ messages[0].content + messages }}", "refuses the conversation: "),
        ("{% for m in messages %", "refuses the conversation: "),
    ],
)
def test_what_cannot_be_told_is_refused_with_file_and_line(tmp_path, template, message):
    tokenizer = load("qwen2.5", template=template)
    with DatasetWriter(tmp_path / "data", {"m1": 4}) as writer:
        writer.add("hi", "in")
        writer.add_messages(talk(("user", "hi"), ("assistant", "in")))
    specs = with_m1(tokenizer)
    with pytest.raises(DatasetError, match=rf"data\.jsonl:2: .*{message}"):
        validate(tmp_path / "data", specs, tokenizer=tokenizer)


def test_turns_that_end_otherwise_than_the_last_are_refused():
    end = "{% if m.role == 'user' or loop.last %}<|im_end|>{% endif %}"
    last_only = TURNS.replace("<|im_end|>", end)
    tokenizer = load("qwen2.5", template=last_only + ASK)
    one = [("user", "hi"), ("assistant", "in")]
    assert learnt(encoded(tokenizer, talk(*one)), tokenizer) == ["in<|im_end|>"]
    with pytest.raises(ValueError, match=r"does not end message 1 by '<\|im_end\|>'"):
        encoded(tokenizer, talk(*one, *one))


def test_thoughts_that_the_template_drops_are_refused():
    """Qwen3's keeps a reasoning for the last turn only; deepseek's opens one and writes none."""
    tokenizer = load("qwen3")
    thought = ("assistant", "<think>\nso\n</think>\n\nhi")
    messages = talk(("user", "hi"), thought, ("user", "hi"), ("assistant", "hi"))
    with pytest.raises(ValueError, match="rewrites earlier messages, so that message 1"):
        encoded(tokenizer, messages)
    with pytest.raises(ValueError, match="rewrites earlier messages, so that message 2"):
        encoded(tokenizer, talk(("user", "hi"), ("assistant", "a"), ("assistant", "b")))
    tokenizer = load("deepseek_r1_distill")
    with pytest.raises(ValueError, match="rewrites earlier messages, so that message 1"):
        encoded(tokenizer, talk(("user", "hi"), ("assistant", "hi")))


@pytest.mark.parametrize("answer", ["", " ", "\n", "\u3000"])
def test_empty_answers_are_refused(answer):
    tokenizer = load("qwen3")
    with pytest.raises(ValueError, match="an answer is empty"):
        encoded(tokenizer, talk(("user", "hi"), ("assistant", answer)))
    with pytest.raises(ValueError, match="an answer is empty"):
        encode(Sample(prompt="hi", answer=answer), {}, tokenizer, {})


# -- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_s_answer_is_learnt_with_one_end():
    tokenizer = load("qwen2.5")
    for answer in (" hi", " hi<|im_end|>"):
        encoding = encode(Sample(prompt="in", answer=answer), {}, tokenizer, {})
        assert learnt(encoding, tokenizer) == [" hi<|im_end|>"]


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = load("qwen2.5")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token, so that no end of an answer"):
        encode(Sample(prompt="in", answer=" hi"), {}, tokenizer, {})
    messages = talk(("user", "a"), ("assistant", "in"))
    assert learnt(encoded(tokenizer, messages), tokenizer) == ["in<|im_end|>"]
    assert stop_ids(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_stop_ids_without_a_template():
    tokenizer = load("llama3")
    assert stop_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    tokenizer.chat_template = None
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
    with pytest.raises(ValueError, match="no chat template"):
        encoded(tokenizer, talk(("user", "a"), ("assistant", "in")))
    tokenizer = load("deepseek_r1_distill")  # the end of its turns cannot be told
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
