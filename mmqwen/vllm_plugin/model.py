"""The vLLM model class: a text model of vLLM's own, with raw rows fused into its embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmqwen.checkpoint.names import LEFT_OUT, NESTED_PREFIX, PROJECTOR_PREFIX
from mmqwen.checkpoint.trained import untrained_message
from mmqwen.text_models import refuse_text_model, untested_warning
from mmqwen.vllm_plugin import compat
from mmqwen.vllm_plugin.banks import Projection, ResidentBanks, bank_catalog
from mmqwen.vllm_plugin.compat.text_model import build_text_model, plain_table
from mmqwen.vllm_plugin.engine_config import refuse_drafter
from mmqwen.vllm_plugin.modality_table import text_config_of
from mmqwen.vllm_plugin.pack_reader import PackReader
from mmqwen.vllm_plugin.parsing import DummyInputs, ProcessingInfo
from mmqwen.vllm_plugin.processing import PackingProcessor
from mmqwen.vllm_plugin.projector import ModalityProjectors, ShardedProjector
from mmqwen.vllm_plugin.projector_origin import ProjectorOrigin
from mmqwen_kernels import fuse_embeddings, plan_rows, project_rows, select_backend, warm_up

logger = init_logger(__name__)

PROBED_IDS = 256
"""Tokens by which the text model's embedding is compared with rows of its table."""

AT_ONCE = 8192
"""Rows of a bank that are projected by one call, at most; the largest step has memory for them."""

BACKEND_VARIABLE = "MMQWEN_BACKEND"
"""Environment variable that names the fusion backend; see `select_backend`."""

DEFAULT_BACKEND = "auto"
"""The kernels where they have been validated, else torch."""


@MULTIMODAL_REGISTRY.register_processor(
    PackingProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs
)
class MultimodalQwen3Model(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """Serves checkpoints of architecture `MultimodalQwen3ForConditionalGeneration`.

    `embed_multimodal` returns the directories of packs of raw rows, on the host; the projection
    waits for `embed_input_ids`, which projects just the rows that a step places.

    Also takes a plain text checkpoint with
    `hf_overrides={"architectures": [...], "modalities": {...}, "projector": FILE}`.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            NESTED_PREFIX: "language_model.model.",
            **dict.fromkeys(LEFT_OUT),
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )
    packed_modules_mapping: dict[str, list[str]] = {  # noqa: RUF012 - vLLM's own name and type
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        refuse_drafter(vllm_config)
        self.config = model_config.hf_config
        text_config = text_config_of(self.config)
        self._origin = ProjectorOrigin(vllm_config)
        self.specs = self._origin.specs()
        self._max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._prepared = False
        self._loaded = False
        self._gathers: bool | None = None
        self._backend = os.environ.get(BACKEND_VARIABLE, DEFAULT_BACKEND)
        self._choice = choice = select_backend(
            compat.device_type(), cast(torch.dtype, model_config.dtype), self._backend
        )
        logger.info("Fusion backend: %s (%s)", choice.name, choice.reason)
        refuse_text_model(text_config.model_type)
        warning = untested_warning(text_config.model_type)
        if warning is not None:
            logger.warning("%s", warning)
        build_text_model(self, vllm_config, text_config, prefix)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.packed_modules_mapping = getattr(
            self.language_model, "packed_modules_mapping", type(self).packed_modules_mapping
        )
        self._ranks = get_tensor_model_parallel_world_size()
        self._place = get_pp_group().is_first_rank
        rank = get_tensor_model_parallel_rank()
        self.projectors = ModalityProjectors(
            self.specs,
            text_config.hidden_size,
            rank=rank,
            ranks=self._ranks,
            dtype=cast(torch.dtype, model_config.dtype),
            place=self._place,
        )
        # In the constructor, so that vLLM counts them among the weights.
        self._banks = ResidentBanks(
            bank_catalog(model_config, self.specs),
            list(self.specs),
            cast(torch.dtype, model_config.dtype),
            home=self if self._place else None,
            projection=Projection(
                self._project_rows,
                text_config.hidden_size,
                min(self._max_tokens, AT_ONCE),
                rank,
                self._ranks,
            ),
        )
        self._packs = PackReader(
            self.specs,
            self._banks,
            cast(torch.dtype, model_config.dtype),
            model_config.max_model_len,
        )
        if self._place and (rank == 0 or self._banks.projected):
            names = self._origin.untrained(self.specs)
            self._banks.refuse_untrained(names)
            if names and rank == 0:
                logger.warning("%s", untrained_message(names))
        placeholder_ids = sorted(spec.token_id for spec in self.specs.values())  # type: ignore[type-var]
        self.register_buffer(
            "_placeholder_ids", torch.tensor(placeholder_ids, dtype=torch.int64), persistent=False
        )

    def load_bank(self, number: int, fields: Mapping[str, str], seconds: float) -> bool:
        """Load some more of a version of a bank; see `ResidentBanks.advance`."""
        return self._banks.advance(number, fields, seconds)

    def drop_bank(self, number: int) -> None:
        """Let a version of a bank go; see `ResidentBanks.drop`."""
        self._banks.drop(number)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The marker of a modality whose token has the usual spelling."""
        return f"<|{modality}|>"

    def get_mm_mapping(self) -> MultiModelKeys:
        """Module prefixes, which vLLM's LoRA manager asks for."""
        return MultiModelKeys.from_string_field(
            language_model="language_model.", connector=PROJECTOR_PREFIX, tower_model=[]
        )

    # -- rows -----------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: object) -> list[torch.Tensor]:
        """Directories `[rows, 2]` of the packs, int64, on the host; nothing is projected yet.

        What is no pack is read as rows of zeros; see `PackReader`.
        """
        packs = kwargs.get("pack")
        if not isinstance(packs, (list, tuple)):
            return []
        return [self._packs.open(pack) for pack in packs]

    def _prepare(self) -> None:
        """Claim the memory that the largest step needs, and compile what requests will need.

        At the first forward pass, which is vLLM's profiling run: it never calls `embed_input_ids`
        with rows, and its V2 runner not even `embed_multimodal`.
        """
        self._prepared = True
        if not self._place:
            return
        self._complete()
        self._token_table()
        every = self.projectors.weights()
        weights = max(every, key=lambda projector: projector.width + projector.w2.shape[1])
        table = weights.w2.new_zeros(1, weights.w2.shape[0])
        rows = torch.zeros(self._max_tokens, weights.width, dtype=weights.w2.dtype)
        fuse_embeddings(
            torch.zeros(self._max_tokens, dtype=torch.int64, device=table.device),
            table,
            [(0, rows)],
            [weights],
            slots=range(self._max_tokens),
            backend=self._backend,
        )
        self._project_banks()
        if self._choice.name == "triton":
            ready = warm_up(
                every,
                backend=self._backend,
                resident=self._banks.on_device,
                projected=bool(self._banks.projected),
            )
            logger.info("Fusion kernels made ready: %d", ready)

    def _project_rows(self, modality: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[n, d]` of a modality on the device -> embeddings `[n, D]`, as in a step."""
        weights = cast(ShardedProjector, self.projectors[modality]).weights()
        with torch.inference_mode():
            done = project_rows(rows, weights, backend=self._backend)
            return tensor_model_parallel_all_reduce(done) if self._ranks > 1 else done

    def _project_banks(self) -> None:
        """Project the banks that are so placed, where their projectors have other weights now.

        Before the first rows are placed, and not where weights are loaded: an update may come in
        many parts, and some loaders fill parameters by themselves. All ranks place rows, and so
        come here, in the same steps.
        """
        if self.projectors.changed:
            self._banks.project(self.projectors.changed)
            self.projectors.changed.clear()

    # -- the step -------------------------------------------------------------------------------

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """Token embeddings `[T, D]`, with this step's rows projected into their slots.

        Args:
            input_ids: `[T]` on the device.
            multimodal_embeddings: slices of what `embed_multimodal` returned, in slot order.
            is_multimodal: bool `[T]` on the host, True at slots of rows.
        """
        if not multimodal_embeddings or is_multimodal is None:
            return self.language_model.embed_input_ids(input_ids)
        self._complete()
        self._project_banks()
        projectors = self.projectors.weights()
        dtype = projectors[0].w2.dtype
        with compat.single_threaded():
            plan = plan_rows(
                self._packs.find(multimodal_embeddings, dtype),
                is_multimodal.cpu(),
                input_ids.shape[0],
                self._packs.widths,
                dtype=dtype,
                device=input_ids.device,
            )
        table = self._token_table()
        if table is not None:
            weight, vocab_start = table
            fused = fuse_embeddings(
                input_ids,
                weight,
                plan,
                projectors,
                vocab_start=vocab_start,
                backend=self._backend,
            )
            return tensor_model_parallel_all_reduce(fused) if self._ranks > 1 else fused
        # The text model embeds its own tokens: a quantised or LoRA-wrapped table, a scale, a norm.
        text = self.language_model.embed_input_ids(input_ids)
        nothing = text.new_zeros(1, text.shape[1])
        rows = fuse_embeddings(
            torch.zeros_like(input_ids), nothing, plan, projectors, backend=self._backend
        )
        rows = tensor_model_parallel_all_reduce(rows) if self._ranks > 1 else rows
        at = plan.all_slots
        return text.index_copy_(0, at, rows.index_select(0, at))

    def _token_table(self) -> tuple[torch.Tensor, int] | None:
        """The token table (or this rank's shard) and its first id, where gathering embeds tokens.

        Whether it does is asked of the text model once: no list of architectures whose embedding
        also scales or normalises would stay complete.
        """
        table = plain_table(self.language_model)
        if self._gathers is None:
            self._gathers = table is not None and self._embeds_by_gathering(*table)
            if not self._gathers:
                logger.info("The text model embeds its own tokens; rows are placed beside them")
        return table if self._gathers else None

    @torch.inference_mode()
    def _embeds_by_gathering(self, table: torch.Tensor, vocab_start: int) -> bool:
        vocab_size = text_config_of(self.config).vocab_size
        ids = torch.linspace(0, vocab_size - 1, PROBED_IDS, device=table.device).long()
        gathered = fuse_embeddings(
            ids, table, [], [], slots=(), vocab_start=vocab_start, backend="torch"
        )
        if self._ranks > 1:
            gathered = tensor_model_parallel_all_reduce(gathered)
        # Zeros, of weights that are yet to come, would look the same scaled.
        embedded = self.language_model.embed_input_ids(ids)
        return bool(gathered.any()) and torch.equal(gathered, embedded)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """The text model's forward."""
        if not self._prepared:
            self._prepare()
        if intermediate_tensors is not None:
            inputs_embeds = None
        # Not its `.model`: some text models do more than that, such as scale what it returns.
        return self.language_model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The text model's logits, placeholders masked so that none is ever sampled."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits.index_fill_(-1, self._placeholder_ids, float("-inf"))
        return logits

    # -- weights --------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the text model by vLLM's own loader, and the projectors: all of them, or any part.

        The first load, before the engine's first pass, must bring every projector. Later ones
        (`reload_weights`, weight updates) change what they bring, in place, and nothing else.
        `projector: FILE` of `hf_overrides` is read at the first load, and again where vLLM reads
        the checkpoint from disk again; not over what an update gives. Where a loader never comes
        here (`load_format` dummy, sharded_state, ...), it is read before the first rows are placed.

        Returns:
            Names of the parameters that were loaded.

        Raises:
            ValueError: a projector's weight is misshaped, no floating point, or of an unknown
                modality; at the first load: missing. Weights that come as a list or a tuple are
                looked at before anything is copied.
        """
        first = not (self._loaded or self._prepared)
        if isinstance(weights, (list, tuple)):
            for name, tensor in weights:
                if name.startswith(PROJECTOR_PREFIX):
                    self.projectors.check(name, tensor)
        loaded: set[str] = set()

        def without_projectors() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith(PROJECTOR_PREFIX):
                    self.projectors.load(name, tensor)
                    loaded.add(name)
                else:
                    yield name, tensor

        text_loaded = AutoWeightsLoader(self).load_weights(
            without_projectors(), mapper=self.hf_to_vllm_mapper
        )
        if first or compat.are_of_a_loader(weights):
            keep = set() if first else loaded
            for name, tensor in self._origin.weights(self.specs, keep).items():
                self.projectors.load(name, tensor)
                loaded.add(name)
        if first:
            self.projectors.refuse_missing(loaded)
            self._loaded = True
        return set(text_loaded) | loaded

    def _complete(self) -> None:
        """Read `projector: FILE` where the loader has filled the parameters by itself."""
        if not self._loaded:
            self._loaded = True
            for name, tensor in self._origin.weights(self.specs, set()).items():
                self.projectors.load(name, tensor)
