"""Rows in transformers' `generate`: which of a prompt's rows each of its steps places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.configuration_utils import GenerationMode

from mmqwen.modalities import ModalitySpec

Rows = Tensor | Sequence[Any]
"""`[R, d]` packed rows of one modality, or a list of `[n, d]` and `[d]` items in the same order."""

NO_ROWS: Mapping[str, Rows] = MappingProxyType({})
"""What a step of generated tokens alone hands to `forward`, which then looks for no placeholder."""


@dataclass(frozen=True)
class PromptRows:
    """The rows of a prompt, carried through all steps of one `generate`.

    Attributes:
        ids: `[B, T]`, the prompt as it was given.
        rows: as given, for all of the prompt or for what a cache does not hold of it.
        repeat: how many sequences (beams, `num_return_sequences`) follow each prompt.
    """

    ids: Tensor
    rows: Mapping[str, Rows]
    repeat: int = 1


class GeneratesWithRows(GenerationMixin):
    """`generate` for a model whose `forward` takes `embeddings` beside `input_ids`.

    A step hands `forward` the rows of just those columns of the prompt that it computes: all of
    them, a chunk, or what a cache does not hold yet. Beyond the prompt no placeholder asks for a
    row: none is ever sampled, and one that a draft copied from the prompt is always refused.
    """

    specs: dict[str, ModalitySpec]

    # The other modes are code from the Hub, which calls the model in ways that were not tried.
    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.ASSISTED_GENERATION,
    )

    if TYPE_CHECKING:  # the model's own, which this class is mixed into

        def _read_rows(
            self, spec: ModalitySpec, rows: Rows | None, device: torch.device
        ) -> Tensor: ...

    # transformers reads this signature to know what `generate` may be given.
    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        embeddings: PromptRows | Mapping[str, Rows] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `forward` for a step, with the rows that the step places.

        Raises:
            ValueError: the prompt's placeholders and the rows differ in number, or an unknown
                modality.
        """
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            cast(Any, input_ids),
            past_key_values=past_key_values,
            attention_mask=cast(Any, attention_mask),
            inputs_embeds=cast(Any, inputs_embeds),
            **kwargs,
        )
        step = inputs.get("input_ids")
        if step is None:  # the prompt came as inputs_embeds
            return inputs
        prompt = embeddings
        if not isinstance(prompt, PromptRows):
            prompt = PromptRows(input_ids, prompt or {})
        length = prompt.ids.shape[1]
        if input_ids.shape[1] < length:  # a chunk of the prompt, behind what the cache holds
            begin = int(past_key_values.get_seq_length())
        else:
            begin = input_ids.shape[1] - step.shape[1]
        end = begin + step.shape[1]
        inputs["embeddings"] = (
            self._rows_between(prompt, begin, min(end, length)) if begin < length else NO_ROWS
        )
        if end > length and step.shape[1] > 1:
            # Drafts behind what was last accepted: any other token will do for one that is refused.
            drafts = step[:, max(length - begin, 0) :]
            drafts = drafts.masked_fill(torch.isin(drafts, self._placeholders(step.device)), 0)
            inputs["input_ids"] = torch.cat([step[:, : step.shape[1] - drafts.shape[1]], drafts], 1)
        return inputs

    def _rows_between(self, prompt: PromptRows, begin: int, end: int) -> dict[str, Rows]:
        """The rows of the prompt's columns `begin` to `end`, repeated beside each sequence."""
        for name in prompt.rows:
            if name not in self.specs:
                raise ValueError(f"unknown modality {name!r}; expected one of {sorted(self.specs)}")
        found: dict[str, Rows] = {}
        for name, spec in self.specs.items():
            rows = self._read_rows(spec, prompt.rows.get(name), prompt.ids.device)
            batch, column = prompt.ids.eq(cast(int, spec.token_id)).nonzero(as_tuple=True)
            here = (column >= begin) & (column < end)
            batch = batch[here]
            if rows.shape[0] == here.numel():
                rows = rows[here.to(rows.device)]
            elif not begin or rows.shape[0] != batch.numel():
                cached = f", or {batch.numel()}, those that the cache does not hold"
                raise ValueError(
                    f"modality {name!r}: got {rows.shape[0]} row(s), expected {here.numel()}, the "
                    f"number of {spec.token} placeholders (id {spec.token_id}) in the prompt"
                    + (cached if begin else "")
                )
            if prompt.repeat > 1:
                counts = batch.bincount(minlength=prompt.ids.shape[0]).tolist()
                parts = rows.split(counts)
                rows = torch.cat([part for part in parts for _ in range(prompt.repeat)])
            if rows.shape[0]:
                found[name] = rows
        return found

    def _placeholders(self, device: torch.device) -> Tensor:
        ids = [cast(int, spec.token_id) for spec in self.specs.values()]
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Take the prompt's rows in hand; transformers calls this once, with the whole prompt."""
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise ValueError(
                "got a prompt that is padded on the right, where generation begins; pad on the left"
            )
        embeddings = model_kwargs.get("embeddings")
        if embeddings and model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "got both embeddings and inputs_embeds; give rows with input_ids, or "
                "inputs_embeds=model.fuse(input_ids, embeddings) alone"
            )
        if not isinstance(embeddings, PromptRows):  # an assistant of ours is handed the main one's
            model_kwargs["embeddings"] = PromptRows(
                cast(Tensor, input_ids), embeddings or {}, expand_size
            )
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=cast(Any, input_ids),
            **model_kwargs,
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # transformers would take its chunks from the ids alone, and from the first one on.
        if generation_config.prefill_chunk_size is not None:
            if model_kwargs.get("inputs_embeds") is not None:
                raise ValueError(
                    "prefill_chunk_size goes with input_ids (and embeddings), not inputs_embeds"
                )
            if _cached(model_kwargs):
                raise ValueError(
                    "prefill_chunk_size goes with an empty cache, without an assistant; got a "
                    f"cache of {_cached(model_kwargs)} tokens"
                )
        return super()._prefill(  # type: ignore[misc]
            cast(Any, input_ids), generation_config, model_kwargs, *args, **kwargs
        )

    def _get_candidate_generator(  # type: ignore[override]
        self,
        *,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        assistant_model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Drafts: an assistant of another class is not handed rows, and drafts no placeholder."""
        if _cached(model_kwargs):  # transformers would compute the cached part once more
            raise ValueError(
                "assisted decoding (an assistant, prompt_lookup_num_tokens) starts from an empty "
                f"cache; got one of {_cached(model_kwargs)} tokens"
            )
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "assisted decoding drafts from ids; got inputs_embeds, give input_ids and "
                "embeddings"
            )
        if assistant_model is not None and not isinstance(assistant_model, GeneratesWithRows):
            model_kwargs = {k: v for k, v in model_kwargs.items() if k != "embeddings"}
        suppress = self._suppress(kwargs["input_ids"].device)
        logits_processor = LogitsProcessorList([*(logits_processor or ()), *suppress])
        return super()._get_candidate_generator(  # type: ignore[misc]
            logits_processor=logits_processor,
            model_kwargs=model_kwargs,
            assistant_model=assistant_model,
            **kwargs,
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Guidance subtracts the placeholders' -inf from -inf, and NaN would be the best token."""
        processors = super()._get_logits_processor(*args, **kwargs)
        for at, processor in enumerate(processors):
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processors[at + 1 : at + 1] = self._suppress(kwargs["device"])
                break
        return processors

    def _suppress(self, device: Any) -> list[SuppressTokensLogitsProcessor]:
        ids = self._placeholders(device).tolist()
        return [SuppressTokensLogitsProcessor(ids, device=device)] if ids else []

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: transformers' paged engine has no place for rows.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "transformers' continuous batching takes no rows; use generate without "
            'cache_implementation="paged", or serve the checkpoint with vLLM'
        )


def _cached(model_kwargs: Mapping[str, Any]) -> int:
    cache = model_kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
