"""What an engine that serves our models is told beside what its user says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmqwen.checkpoint.names import HYBRID_ARCHITECTURE
from mmqwen.text_models import has_recurrent_layers
from mmqwen.vllm_plugin.banks import bank_catalog
from mmqwen.vllm_plugin.limits import bank_folder
from mmqwen.vllm_plugin.modality_table import modality_table, text_config_of

DRAFTERS_WITHOUT_EMBEDDINGS = frozenset({"ngram", "ngram_gpu", "suffix"})
"""Speculative methods that read token ids alone; others would be fed raw rows."""

REFERENCES_SWITCH = "mmqwen_row_references"
"""Key of vLLM's `additional_config`: true asks for rows by reference. `settle` puts what it found
there, for the renderer: `{"capacity": bytes, "engine_half": bool}`."""

BANK_WORKER = "mmqwen.vllm_plugin.bank_worker.BankWorker"
"""What vLLM mixes into its workers, so that they load banks while they serve."""

TOKENIZER_MODES = frozenset({"auto", "hf", "slow"})
"""Those whose renderer is ours; others read messages and prompts without our checks."""


def settle(vllm_config: Any) -> None:
    """Refuse what rows cannot do, open banks, settle vLLM's processor cache, widen its encoder
    cache.

    Raises:
        ValueError: a feature is asked for with which rows would be lost or misread, or a bank
            cannot be served.
    """
    refuse_unserved(vllm_config)
    refuse_of_hybrids(vllm_config)
    refuse_bank_updates(vllm_config)
    settle_banks(vllm_config)
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is not None and not settle_references(vllm_config)["engine_half"]:
        # It spares a second conversion and transfer of equal items. Packs take part where tokens
        # name them alone: else its other half, in the engine core, would only keep up to 4 GiB of
        # them, and count their bytes at each request
        # (docs/adr/0003-packs-outside-the-processor-cache.md).
        multimodal.mm_processor_cache_gb = 0.0
    widen_encoder_cache(vllm_config)


def settle_references(vllm_config: Any) -> dict[str, Any]:
    """How many bytes of packs tokens may stand for, and whether the engine keeps them.

    Where it cannot, or its cache might be too small for one pack (before 0.31 such a request
    failed), the front end keeps them, and sends them again with each request that names them.

    Raises:
        ValueError: references are asked for where there is no memory for rows, or where a request
            may come to a process that has never seen what it names.
    """
    options = vllm_config.additional_config
    asked = options.get(REFERENCES_SWITCH) if isinstance(options, Mapping) else None
    if not asked:
        return {"capacity": 0, "engine_half": False}
    if isinstance(asked, Mapping):  # looked at before: a config is checked again when it is copied
        return dict(asked)
    from mmqwen.vllm_plugin.compat import processor_cache as cache

    model = vllm_config.model_config
    capacity = int(model.multimodal_config.mm_processor_cache_gb * 2**30)
    if capacity <= 0:
        raise ValueError(
            "row references keep rows for later requests, and mm_processor_cache_gb=0 leaves no "
            "memory for them; give it a size, or leave row references out"
        )
    if cache.front_ends(vllm_config) > 1:
        raise ValueError(
            f"row references with {cache.front_ends(vllm_config)} API servers: a request may come "
            "to one that has never seen the rows; expected --api-server-count 1 (several servers "
            "behind a balancer that keeps a conversation on one of them can share a key)"
        )
    half = cache.engine_half(vllm_config) and capacity >= largest_pack(model)
    settled = {"capacity": capacity, "engine_half": half}
    vllm_config.additional_config = {**options, REFERENCES_SWITCH: settled}
    return settled


def largest_pack(model_config: Any) -> int:
    """Bytes that no pack exceeds: a prompt of rows alone, with directory and header."""
    widest = max(spec.dim for spec in modality_table(model_config).values())
    row = widest * model_config.dtype.itemsize + 16 + 8
    return int(model_config.max_model_len * row + 2**14)


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


def settle_banks(vllm_config: Any) -> None:
    """Write into the config which version of each bank is served, and by what workers load others.

    Raises:
        BankError: as `BankCatalog`.
    """
    model_config = vllm_config.model_config
    config = model_config.hf_config
    if getattr(config, "banks", None):
        config.banks = bank_catalog(model_config, modality_table(model_config)).to_dict()
        parallel = vllm_config.parallel_config
        parallel.worker_extension_cls = parallel.worker_extension_cls or BANK_WORKER


def refuse_bank_updates(vllm_config: Any) -> None:
    """Refuse updates of banks where a process would not hear of them.

    Raises:
        ValueError: several front ends, or engines that are started while others run.
    """
    if bank_folder() is None:
        return
    from mmqwen.vllm_plugin.compat.processor_cache import front_ends

    if front_ends(vllm_config) > 1:
        raise ValueError(
            f"updates of banks with {front_ends(vllm_config)} API servers: one would learn of an "
            "update, the others would name rows that are gone; expected --api-server-count 1"
        )
    if getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        raise ValueError(
            "updates of banks with enable_elastic_ep: engines that are added later would have the "
            "first versions; serve without one of the two"
        )


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


def refuse_of_hybrids(vllm_config: Any) -> None:
    """Refuse what vLLM forbids of text models with recurrent layers, before it asserts it.

    With prefix caching, their states are kept at the ends of whole blocks ("align"), so that steps
    must be free to end there.

    Raises:
        ValueError: such a setting, or the architecture of a text model without recurrent layers.
    """
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    recurrent = has_recurrent_layers(text_config_of(model_config.hf_config))
    if recurrent and HYBRID_ARCHITECTURE not in model_config.hf_config.architectures:
        raise ValueError(
            f"the text model has recurrent layers: got architecture "
            f"{model_config.hf_config.architectures[0]!r}, expected {HYBRID_ARCHITECTURE!r}, as "
            "`mmqwen build` writes it into config.json; set it there or in hf_overrides"
        )
    if not (recurrent and vllm_config.cache_config.enable_prefix_caching):
        return
    reason = None
    if scheduler.disable_chunked_mm_input:
        reason = "disable_chunked_mm_input: a step may have to end within a message's rows"
    elif not scheduler.enable_chunked_prefill:
        reason = "enable_chunked_prefill=False: a step may have to end within a prompt"
    if reason is not None:
        raise ValueError(
            f"{reason}, since recurrent states are cached at the ends of blocks; serve without "
            "this setting, or with enable_prefix_caching=False"
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
