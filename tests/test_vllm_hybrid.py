"""Text models with recurrent layers, served: spelled tokens, caches, and what vLLM forbids."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("vllm")

from run_gpu_engine import BF16_REFERENCE, run_one
from spelling import answers_of, compare, make_pairs, spell_exactly, spelling
from torchvision_stand_in import import_qwen3_5

import engines
from mmqwen.checkpoint import LeftOutWarning, UntrainedProjectorsWarning, build_checkpoint
from mmqwen.checkpoint.names import ARCHITECTURE, HYBRID_ARCHITECTURE
from tiny import make_composite, make_vl_base


@pytest.mark.parametrize(
    "configuration",
    ["next-chunked", "qwen35-moe", "qwen35-preempted", "qwen35-lora-eager"],
)
def test_spelled_tokens_are_answered_as_tokens(configuration):
    """Chunks that cut items and prefix hits; verified preemptions; an adapter."""
    result = run_one(configuration, requests=12, extra={}, answers_file=None)
    assert result["ok"], result
    assert result["spelled"]["equal"] == 12, result


def test_a_text_model_inside_a_vision_language_one_is_served(tmp_path):
    """Built of a base as Qwen3.5 is published; and against transformers."""
    from vllm import SamplingParams

    import_qwen3_5()
    base = make_vl_base(tmp_path / "base", dtype="bfloat16", initializer_range=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)
        warnings.simplefilter("ignore", UntrainedProjectorsWarning)
        built = build_checkpoint(base, spelling(64), tmp_path / "built")
    spell_exactly(built, 64)
    pairs = make_pairs(built, 12, seed=1)
    llm = engines.start(built, dtype="bfloat16")
    config = llm.llm_engine.vllm_config
    assert config.model_config.is_hybrid
    # What vLLM's own hook does for the text model: one position a token.
    assert not config.model_config.uses_mrope
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
    plain = llm.generate([text for text, _ in pairs], params, use_tqdm=False)
    spelled = llm.generate([rows for _, rows in pairs], params, use_tqdm=False)
    assert compare(answers_of(plain), answers_of(spelled)).equal == 12
    model = engines.reference(str(built))
    for (_, request), output in zip(pairs, spelled, strict=True):
        items = request.get("multi_modal_data", {})
        off = engines.worst_difference(output, model, items, check_tokens=False)
        assert off <= BF16_REFERENCE


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid") / "model"
    return make_composite(path, family="qwen3_next", dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"disable_chunked_mm_input": True},
            r"disable_chunked_mm_input.*prefix_caching=False",
        ),
        ({"enable_chunked_prefill": False}, r"enable_chunked_prefill=False: .*ends of blocks"),
        (
            {"hf_overrides": {"architectures": [ARCHITECTURE]}},
            f"recurrent layers: got .*'{ARCHITECTURE}', expected '{HYBRID_ARCHITECTURE}'",
        ),
    ],
)
def test_what_a_hybrid_cannot_be_served_with_is_refused_with_what_to_set(options, message, hybrid):
    from vllm import LLM

    settings = {"enable_prefix_caching": True, "max_model_len": 512, **options}
    with pytest.raises(Exception, match=message):
        LLM(model=str(hybrid), dtype="bfloat16", **settings)


def test_a_text_model_without_recurrent_layers_is_none_of_the_hybrids(tmp_path):
    from vllm import LLM

    path = make_composite(tmp_path / "model")
    with pytest.raises(ValueError, match=f"no recurrent layers: got .*expected '{ARCHITECTURE}'"):
        LLM(
            model=str(path),
            max_model_len=512,
            enforce_eager=True,
            hf_overrides={"architectures": [HYBRID_ARCHITECTURE]},
        )
