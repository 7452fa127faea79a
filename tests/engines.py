"""Engines and references for the vLLM tests; each engine is started once a session."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 2e-2 if torch.cuda.is_available() else 1e-4
"""Largest difference of a logit or log-probability of `tiny`'s float32 models between two orders of
summation: other batches, chunks, engines, threads or CPUs.

On the way to a logit lie some 2,000 additions (in each of two layers 64 products of a projection,
32 of a score, up to 512 of a context, 128, 64 and 128 more; 64 of the head), each wrong by up to
2**-24 of a value of up to some 10. Errors of random signs add up to sqrt(2000) * 2**-24 * 10 =
2.7e-5; this is four times that. A row that is lost or misplaced shows at 1e-1. Greedy tokens may
differ only where the best two are closer than this. A GPU's attention multiplies float32 by TF32,
whose unit is 2**-11: 2,000 times as much at each of a score's and a context's additions (seen on an
H100: 2.3e-3).
"""

_started: list[Any] = []
"""Engines live until the process ends: freeing one tears down the process groups of all."""


def keep(llm: Any) -> Any:
    """Let an engine live until the process ends."""
    _started.append(llm)
    return llm


def start(checkpoint: str | Path, **options: Any) -> Any:
    """A vLLM engine with the tests' settings: small, eager, in float32 unless told."""
    from vllm import LLM
    from vllm.distributed import parallel_state

    from mmqwen.vllm_plugin import register

    register()
    settings = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "block_size": 32,
        "num_gpu_blocks_override": 256,
        "disable_log_stats": True,
        **options,
    }
    # vLLM makes its groups once a process, that of experts only if the first model has experts.
    gc.collect()  # an engine that a test has dropped would take the groups with it later
    if parallel_state._TP is not None and parallel_state._EP is None:
        parallel_state._EP = parallel_state._TP
    return keep(LLM(model=str(checkpoint), **settings))


@lru_cache(maxsize=8)
def reference(checkpoint: str, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model of a checkpoint."""
    from mmqwen.hf import MultimodalQwen3ForConditionalGeneration

    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
    return model.eval()


def rows_of(items: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
    """Items as users give them -> `[R, d]` float32 by modality."""
    return {
        name: torch.cat([torch.as_tensor(item).float().reshape(-1, _width(item)) for item in value])
        for name, value in items.items()
        if len(value)
    }


def _width(item: Any) -> int:
    return torch.as_tensor(item).shape[-1]


@torch.no_grad()
def worst_difference(
    output: Any, model: Any, items: Mapping[str, Sequence[Any]], *, check_tokens: bool = True
) -> float:
    """Largest difference of any sampled or prompt log-probability from the reference's.

    Also checks, unless told otherwise, that each sampled token is the reference's best, or as good
    but for rounding.
    """
    prompt_ids = list(output.prompt_token_ids)
    sampled = output.outputs[0]
    ids = prompt_ids + list(sampled.token_ids)
    logits = model(torch.tensor([ids]), embeddings=rows_of(items)).logits[0].float()
    logprobs = logits.log_softmax(-1)
    worst = 0.0
    for step, token in enumerate(sampled.token_ids):
        row = logprobs[len(prompt_ids) - 1 + step]
        if check_tokens:
            lead = float(row.max() - row[token])
            assert lead <= TOLERANCE, f"step {step}: {token}, expected {row.argmax()}"
        worst = max(worst, abs(float(row[token]) - sampled.logprobs[step][token].logprob))
    placeholders = {spec.token_id for spec in model.specs.values()}
    for at in range(1, len(prompt_ids)) if output.prompt_logprobs else ():
        if prompt_ids[at] not in placeholders:  # masked: -inf on both sides
            got = output.prompt_logprobs[at][prompt_ids[at]].logprob
            worst = max(worst, abs(float(logprobs[at - 1, prompt_ids[at]]) - got))
    return worst
