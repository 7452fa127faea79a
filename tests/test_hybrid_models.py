"""Text models with recurrent layers, and text models that come inside vision-language ones: built,
computed, trained and saved by transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from engines import TOLERANCE
from mmqwen.checkpoint import CheckpointError, LeftOutWarning, build_checkpoint, read_config
from mmqwen.checkpoint.index import read_header, read_index
from mmqwen.checkpoint.names import ARCHITECTURE, HYBRID_ARCHITECTURE
from mmqwen.hf import MultimodalQwen3Config, MultimodalQwen3ForConditionalGeneration
from mmqwen.hf.samples import SampleRows
from mmqwen.training import TrainSettings, train
from mmqwen.training.config import TrainingError
from tiny import CHAT_TEMPLATE, make_base, make_composite, make_vl_base
from training_runs import losses, write_data

pytestmark = pytest.mark.filterwarnings("ignore::mmqwen.checkpoint.UntrainedProjectorsWarning")

HYBRIDS = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]
MODALITIES = {"m1": 24, "m2": 40}


def load(path):
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not model[1]["missing_keys"]
    assert not model[1]["unexpected_keys"]
    return model[0].eval()


@pytest.fixture(scope="module", params=["qwen3_5_text", "qwen3_5_moe_text"])
def nested(request, tmp_path_factory):
    """A vision-language base, and what `build` makes of it."""
    folder = tmp_path_factory.mktemp("nested")
    base = make_vl_base(folder / "base", request.param)
    with pytest.warns(LeftOutWarning, match=r"base's model\.visual\.\* and mtp\.\* \(\d+ tensors"):
        built = build_checkpoint(base, MODALITIES, folder / "built")
    return base, built


def test_a_text_model_inside_a_vision_language_one_is_linked_untouched(nested):
    base, built = nested
    assert (built / "base-model.safetensors").stat().st_ino == (
        base / "model.safetensors"
    ).stat().st_ino
    names = read_index(built / "model.safetensors.index.json")
    held = read_header(base / "model.safetensors")[0]
    left = {name for name in held if name not in names}
    assert left == {name for name in held if name.startswith(("model.visual.", "mtp."))}
    config = read_config(built)
    assert config.text_config.model_type.startswith("qwen3_5")
    assert config.architectures == [HYBRID_ARCHITECTURE]
    assert AutoTokenizer.from_pretrained(built).chat_template == CHAT_TEMPLATE


def test_its_answers_to_text_are_those_of_the_vision_language_model(nested):
    """Positions count along in all three dimensions that the whole model has."""
    base, built = nested
    model = load(built)
    whole = AutoModelForImageTextToText.from_pretrained(base).eval()
    ids = torch.arange(20, 90)[None]
    with torch.no_grad():
        got, want = model(ids).logits, whole(ids).logits
    words = [i for i in range(got.shape[-1]) if i not in model._placeholders("cpu")]
    torch.testing.assert_close(got[..., words], want[..., words], rtol=0, atol=TOLERANCE)


def test_a_table_that_is_too_small_grows_under_its_nested_name(nested, tmp_path):
    base, few = nested
    many = {f"k{i}": 8 for i in range(70)}
    with pytest.warns(LeftOutWarning):
        built = build_checkpoint(base, many, tmp_path / "grown")
    rows, before = (read_config(folder).vocab_size for folder in (built, few))
    assert rows > before
    assert load(built).get_input_embeddings().weight.shape[0] == rows


def test_what_a_vision_language_base_must_have(tmp_path):
    base = make_vl_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["model_type"] = "qwen3_vl_text"
    config["model_type"] = "qwen3_vl"
    strange = tmp_path / "strange"
    shutil.copytree(base, strange)
    (strange / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"'qwen3_vl_text', which transformers has no causal"):
        build_checkpoint(strange, MODALITIES, tmp_path / "out")
    (base / "chat_template.json").write_text("{}")
    with (
        pytest.warns(LeftOutWarning),
        pytest.raises(CheckpointError, match=r"chat_template\.json cannot be read"),
    ):
        build_checkpoint(base, MODALITIES, tmp_path / "out")


@pytest.mark.parametrize("family", HYBRIDS)
def test_rows_with_a_cache_and_padding_are_answered_as_alone(family, tmp_path):
    model = load(make_composite(tmp_path / "model", family=family))
    marker = {name: spec.token_id for name, spec in model.specs.items()}
    generator = torch.Generator().manual_seed(0)
    prompts, rows = [], []
    for length, count in ((70, 3), (9, 2), (4, 0)):
        words = torch.randint(20, 300, (length,), generator=generator).tolist()
        prompts.append([*words[:2], *[marker["m1"]] * count, *words[2:]])
        rows.append(torch.randn(count, 24, generator=generator))
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    batch = model.generate(ids, attention_mask=mask, embeddings={"m1": torch.cat(rows)}, **options)[
        :, width:
    ]
    for own, row, got in zip(prompts, rows, batch, strict=True):
        alone = model.generate(
            torch.tensor([own]),
            attention_mask=torch.ones(1, len(own)),
            embeddings={"m1": row},
            use_cache=False,
            **options,
        )[0, len(own) :]
        assert torch.equal(alone, got)


def test_the_architecture_follows_the_layers(tmp_path):
    path = make_composite(tmp_path / "hybrid", family="qwen3_5_text")
    model = load(path)
    model.save_pretrained(tmp_path / "again")
    for folder in (path, tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        assert config["architectures"] == [HYBRID_ARCHITECTURE]
    plain = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "llama", "llama")).config
    assert MultimodalQwen3Config(text_config=plain).architectures == [ARCHITECTURE]


@pytest.mark.parametrize("stage", ["projector", "lora", "full"])
def test_a_text_model_inside_a_vision_language_one_is_trained(nested, stage, tmp_path):
    if stage == "lora":
        pytest.importorskip("peft")
    _, built = nested
    data = write_data(tmp_path / "data")
    settings = TrainSettings(
        *(str(p) for p in (built, data, tmp_path / "out")),
        stage=stage,
        tokens_per_step=512,
        max_steps=4,
        lr=3e-3,
        cpu=True,
        log_steps=1,
        progress=False,
    )
    out = train(settings)
    curve = losses(out)
    assert curve[-1] < curve[0]
    assert read_config(out).architectures == [HYBRID_ARCHITECTURE]
    trained = load(out)
    assert trained.projectors_trained["m1"]


@pytest.mark.filterwarnings("ignore::mmqwen.checkpoint.UntestedTextModelWarning")
def test_recurrent_layers_that_cannot_be_told_of_samples_are_not_trained(tmp_path):
    fields = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "hidden_size": 64}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 467}
    text = AutoConfig.for_model("lfm2", **fields)
    specs = {"m1": {"dim": 24, "token_id": 403}}
    config = MultimodalQwen3Config(text_config=text, modalities=specs)
    assert config.architectures == [HYBRID_ARCHITECTURE]
    model = MultimodalQwen3ForConditionalGeneration(config)
    ids, bounds = torch.arange(20, 40)[None], torch.tensor([0, 8, 20], dtype=torch.int32)
    message = "'lfm2': its recurrent layers carry a state from one sample into the next"
    with pytest.raises(ValueError, match=message):
        model(ids, cu_seq_lens_q=bounds, use_cache=False)
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(TrainingError, match=message):
        train(TrainSettings(*(str(tmp_path / name) for name in ("model", "data", "out")), cpu=True))


# -- samples end to end ------------------------------------------------------------------------


def test_each_token_has_its_place_in_its_samples_row():
    bounds = torch.tensor([0, 3, 3, 90, 91, 300, 300])
    rows = SampleRows(bounds)
    assert sum(map(len, rows.real)) == 300
    flat = torch.cat([b.flatten()[r] for b, r in zip(rows.batches, rows.real, strict=True)])
    assert torch.equal(flat[rows.order], torch.arange(300))
    held = sum(batch.numel() for batch in rows.batches)
    assert held <= 209 + 87 + 64 * 2
    with pytest.raises(ValueError, match="expected rising bounds from 0 on"):
        SampleRows(torch.tensor([0, 5, 3]))


def test_samples_end_to_end_take_no_cache_and_must_fill_the_pass(tmp_path):
    model = load(make_composite(tmp_path / "model", family="qwen3_5_text"))
    ids = torch.arange(20, 40)[None]
    bounds = torch.tensor([0, 8, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="expected use_cache=False"):
        model(ids, cu_seq_lens_q=bounds)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q ends at 8: expected .* \[1, 8, D\]"):
        model(ids, cu_seq_lens_q=bounds[:2], use_cache=False)
