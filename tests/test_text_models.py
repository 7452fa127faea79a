"""Text models that were tested with rows, those that were not, and those that cannot take any."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoConfig

from mmqwen.checkpoint import CheckpointError, UntestedTextModelWarning, build_checkpoint
from mmqwen.hf import MultimodalQwen3Config, MultimodalQwen3ForConditionalGeneration
from mmqwen.text_models import TESTED, refuse_text_model, untested_warning
from tiny import FAMILY_FIELDS, make_base

IDS_INSIDE = ["gemma3n_text", "gemma4_text"]


def test_the_list_the_tests_and_the_page_name_the_same_models():
    page = (Path(__file__).parents[1] / "docs" / "text-models.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_]+)` \|", page, re.MULTILINE)
    assert set(rows) == set(TESTED) == FAMILY_FIELDS.keys()


@pytest.mark.filterwarnings("ignore::mmqwen.checkpoint.UntrainedProjectorsWarning")
def test_build_warns_of_a_text_model_that_was_not_tested(tmp_path, recwarn):
    base = make_base(tmp_path / "base", family="llama")
    build_checkpoint(base, {"m1": 24}, tmp_path / "llama")
    assert not [w for w in recwarn if w.category is UntestedTextModelWarning]
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "olmo2"}))
    with pytest.warns(UntestedTextModelWarning, match=r"'olmo2' was NEVER TESTED with rows.*wrong"):
        build_checkpoint(base, {"m1": 24}, tmp_path / "olmo2")


@pytest.mark.parametrize("model_type", IDS_INSIDE)
def test_text_models_that_look_up_ids_in_each_layer_are_refused(tmp_path, model_type):
    message = f"{model_type!r} cannot take rows: its layers look up token ids.*expected one of"
    config = AutoConfig.for_model(model_type)
    config.save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        build_checkpoint(tmp_path / "base", {"m1": 24}, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        MultimodalQwen3ForConditionalGeneration(MultimodalQwen3Config(text_config=config))


def test_a_model_that_is_not_made_of_model_and_lm_head_is_refused():
    text = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=16)
    config = MultimodalQwen3Config(text_config=text)
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel consists of .*expected model and lm_head"
    ):
        MultimodalQwen3ForConditionalGeneration(config)


def test_what_is_said_of_each_type():
    for model_type in TESTED:
        refuse_text_model(model_type)
        assert untested_warning(model_type) is None
    assert "token embeddings" in untested_warning("no_such_type")
