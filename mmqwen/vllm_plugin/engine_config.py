"""What an engine that serves our models is told beside what its user says."""

from __future__ import annotations

from typing import Any

from mmqwen.vllm_plugin.banks import bank_catalog
from mmqwen.vllm_plugin.modality_table import modality_table

DRAFTERS_WITHOUT_EMBEDDINGS = frozenset({"ngram", "ngram_gpu", "suffix"})
"""Speculative methods that read token ids alone; others would be fed raw rows."""

TOKENIZER_MODES = frozenset({"auto", "hf", "slow"})
"""Those whose renderer is ours; others read messages and prompts without our checks."""


def settle(vllm_config: Any) -> None:
    """Refuse what rows cannot do, open banks, turn vLLM's processor cache off, widen its encoder
    cache.

    Raises:
        ValueError: a feature is asked for with which rows would be lost or misread, or a bank
            cannot be served.
    """
    refuse_unserved(vllm_config)
    settle_banks(vllm_config.model_config)
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None:
        # It spares a second conversion and transfer of equal items. Packs never take part, so
        # its other half, in the engine core, would only keep up to 4 GiB of them, and count
        # their bytes at each request (docs/adr/0003-packs-outside-the-processor-cache.md).
        multimodal.mm_processor_cache_gb = 0.0
    widen_encoder_cache(vllm_config)


def widen_encoder_cache(vllm_config: Any) -> None:
    """Let the scheduler admit packs for every step that may be in flight, and one more.

    vLLM counts a pack's rows from when a step is scheduled until its result is in, and allows as
    many as one step has tokens: with two steps in flight, requests of more rows than text wait for
    each other, and a batch takes more steps than the same tokens as text. That limit protects GPU
    memory, of which packs take none. They lie in host memory as long as their requests do, and
    what is kept for reuse is bounded by this size.
    """
    scheduler = vllm_config.scheduler_config
    steps = vllm_config.parallel_config.pipeline_parallel_size + 2
    rows = steps * scheduler.max_num_batched_tokens
    scheduler.encoder_cache_size = max(scheduler.encoder_cache_size, rows)


def settle_banks(model_config: Any) -> None:
    """Write into the model's config which version of each bank is served, for every process.

    Raises:
        BankError: as `BankCatalog`.
    """
    config = model_config.hf_config
    if getattr(config, "banks", None):
        config.banks = bank_catalog(model_config, modality_table(model_config)).to_dict()


def refuse_unserved(vllm_config: Any) -> None:
    """Refuse features of vLLM with which rows would be lost or misread, by name.

    Raises:
        ValueError: one is configured.
    """
    refuse_drafter(vllm_config)
    if getattr(vllm_config, "ec_transfer_config", None) is not None:
        raise ValueError(
            "ec_transfer_config: a connector carries the encoder cache to other engines, and ours "
            "holds where rows lie in this process, not the rows; serve without it"
        )
    multimodal = vllm_config.model_config.multimodal_config
    if getattr(multimodal, "mm_encoder_only", False):
        raise ValueError(
            "mm_encoder_only: there is no encoder to run apart from the text model, rows come "
            "from the client; serve without it"
        )
    mode = vllm_config.model_config.tokenizer_mode
    if mode not in TOKENIZER_MODES:
        raise ValueError(
            f"tokenizer_mode {mode!r} bypasses the renderer that takes rows and checks prompts; "
            f"expected one of {sorted(TOKENIZER_MODES)}"
        )


def refuse_drafter(vllm_config: Any) -> None:
    """Refuse a speculative drafter that reads embeddings: it would be fed raw rows.

    Raises:
        ValueError: such a drafter is configured.
    """
    speculative = getattr(vllm_config, "speculative_config", None)
    method = getattr(speculative, "method", None)
    if speculative is not None and method not in DRAFTERS_WITHOUT_EMBEDDINGS:
        raise ValueError(
            f"speculative method {method!r} feeds prompt embeddings to its drafter, which has no "
            f"projectors; expected one of {sorted(DRAFTERS_WITHOUT_EMBEDDINGS)}, or none"
        )
