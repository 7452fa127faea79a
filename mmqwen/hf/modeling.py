"""The reference and training model: a transformers text model, and one projector a modality."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmqwen.checkpoint.index import drop_replaced_files
from mmqwen.checkpoint.names import LEFT_OUT, NESTED_PREFIX
from mmqwen.checkpoint.projector_record import check_recorded
from mmqwen.checkpoint.trained import CONFIG_FIELD, projector_file, read_trained
from mmqwen.hf.configuration import MultimodalQwen3Config
from mmqwen.hf.generation import NO_ROWS, GeneratesWithRows, Rows
from mmqwen.hf.loss import is_plain_head, token_loss
from mmqwen.hf.projector import MultiModalProjector, RowNorm
from mmqwen.hf.samples import keep_samples_apart
from mmqwen.modalities import ModalitySpec
from mmqwen.text_models import refuse_end_to_end, refuse_text_model


class MultimodalQwen3ForConditionalGeneration(GeneratesWithRows, PreTrainedModel, GenerationMixin):
    """A causal language model over tokens and over rows of any number of modalities.

    Hidden states and logits come from the text model's own class, whatever it does to embeddings
    or logits (Gemma's scale and cap, Granite's and Cohere's scales). A row stands in the buffer
    that `inputs_embeds` is: past a scale that belongs to the embedding layer, as Gemma's does.

    Weights keep the base model's names (`model.*`, `lm_head.*`); each modality adds
    `projectors.<name>.linear_1|linear_2.weight|bias`. Row `r` of a modality takes the place of the
    `r`-th placeholder id of that modality in `input_ids`, read batch row by batch row.

    With `labels=None` and outside of training mode, logits of placeholder ids are `-inf`, in
    `forward` as in `generate`: a placeholder is no word, and vLLM's `compute_logits` masks it the
    same way. In training mode, or with labels, logits and loss are raw.

    Attributes:
        projectors_trained: modality to whether its projector was ever trained, where that is known:
            read with the weights, set by training steps that have rows of it, saved with the model.

    Raises:
        ValueError: a modality of `config` has no `token_id`, or rows cannot be given to the text
            model (see `mmqwen.text_models`).
    """

    config_class = MultimodalQwen3Config
    base_model_prefix = "model"
    input_modalities = "text"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers' own form
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        rf"^{re.escape(prefix)}" for prefix in LEFT_OUT
    ]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MultimodalQwen3Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.specs: dict[str, ModalitySpec] = config.modality_specs
        self.projectors_trained: dict[str, bool] = {}
        self.fused_loss: Any = None  # see `mmqwen.hf.loss.token_loss`
        for name, spec in self.specs.items():
            if spec.token_id is None:
                raise ValueError(
                    f"modality {name!r} has no token_id; `mmqwen build` or "
                    "mmqwen.modalities.assign_token_ids gives it one"
                )
        refuse_text_model(text.model_type)
        causal_lm = AutoModelForCausalLM.from_config(text)
        parts = [name for name, _ in causal_lm.named_children()]
        if sorted(parts) != ["lm_head", "model"]:
            raise ValueError(
                f"text model type {text.model_type!r}: {type(causal_lm).__name__} consists of "
                f"{parts}, expected model and lm_head"
            )
        keep_samples_apart(causal_lm)
        self._is_stateful = bool(getattr(causal_lm, "_is_stateful", False))
        self.model, self.lm_head = causal_lm.model, causal_lm.lm_head
        # Past nn.Module's registry: its weights are this model's, under this model's names.
        self.__dict__["_causal_lm"] = causal_lm
        vars(causal_lm)["_modules"] = self._modules
        causal_lm.config = text
        std = getattr(text, "initializer_range", None) or 0.02
        self.projectors = nn.ModuleDict(
            {
                name: MultiModalProjector.of(spec, text.hidden_size, output_std=std)
                for name, spec in self.specs.items()
            }
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = vars(module).get("init_std")
        if std is not None and isinstance(module, nn.Linear):  # a projector's
            # transformers' own functions leave alone what a checkpoint has already filled.
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RowNorm):
            init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers does; also reads which projectors were ever trained.

        A text model that comes inside a vision-language one is found under its names there.

        Raises:
            CheckpointError: `projectors.safetensors` records other projectors than the config.
        """
        path = pretrained_model_name_or_path
        kwargs.setdefault("key_mapping", {rf"^{re.escape(NESTED_PREFIX)}": "model."})
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if path is not None:
            where = {"revision": kwargs.get("revision"), "cache": kwargs.get("cache_dir")}
            check_recorded(projector_file(path, **where), model.specs)
            model.projectors_trained = read_trained(path, model.config, **where)
        return loaded

    def _text_model(self) -> Any:
        """The text model's own causal LM, made of this model's parts as they are now."""
        view = self.__dict__["_causal_lm"]
        if view._modules is not self._modules:  # this model is a copy, as DataParallel makes them
            view = self.__dict__["_causal_lm"] = copy.copy(view)
            vars(view)["_modules"] = self._modules
        view.training = self.training
        return view

    def projector(self, name: str) -> MultiModalProjector:
        """The projector of one modality."""
        return cast(MultiModalProjector, self.projectors[name])

    def fuse(
        self,
        input_ids: Tensor,
        embeddings: Mapping[str, Rows] | None,
        slots: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Token embeddings with projected rows at the placeholders of their modality.

        Args:
            input_ids: `[B, T]` int64.
            embeddings: for each modality, its `[R, d]` rows of the whole batch, or a list of items,
                in the order of batch row, then position. Any floating dtype; computed in the
                projector's, which is the model's unless it was cast for training.
            slots: for each modality, the places `[R]` int64 of its placeholders in `input_ids`,
                flattened. Looked for, which waits for the GPU, unless given.

        Returns:
            `[B, T, D]` in the token table's dtype. In training mode, every projector takes part in
            the graph, one without rows with a gradient of zeros, so that
            DistributedDataParallel needs no `find_unused_parameters`.

        Raises:
            ValueError: an unknown modality, rows of the wrong width, or a count that differs from
                the number of placeholders.
        """
        embeddings = embeddings or {}
        for name in embeddings:
            if name not in self.specs:
                raise ValueError(f"unknown modality {name!r}; expected one of {sorted(self.specs)}")
        if not embeddings and not self.training:  # most steps of a loop with a cache
            placeholders = torch.isin(input_ids, self._placeholders(input_ids.device))
            if not bool(placeholders.any()):
                return self.get_input_embeddings()(input_ids)
        places, packed = [], []
        for name, spec in self.specs.items():
            rows = self._read_rows(spec, embeddings.get(name), input_ids.device)
            if slots is not None:
                at = slots[name]
            else:
                at = input_ids.reshape(-1).eq(spec.token_id or 0).nonzero().squeeze(1)
            if at.numel() != rows.shape[0]:
                raise ValueError(
                    f"modality {name!r}: got {rows.shape[0]} row(s), expected {at.numel()}, the "
                    f"number of {spec.token} placeholders (id {spec.token_id}) in input_ids"
                )
            places.append(at)
            packed.append(rows)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self._note_training(places)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        projected, kept = [], []
        for name, at, rows in zip(self.specs, places, packed, strict=True):
            if at.numel() or learns:
                kept.append(at)
                projected.append(self.projector(name)(rows).to(inputs_embeds.dtype))
        if not kept:
            return inputs_embeds
        flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
        # Out of place: the lookup may be a leaf's view, and autograd needs its input.
        at = torch.cat(kept).to(flat.device)
        fused = flat.index_put((at,), torch.cat(projected).to(flat.device))
        return fused.view_as(inputs_embeds)

    def _note_training(self, places: Sequence[Tensor]) -> None:
        for name, at in zip(self.specs, places, strict=True):
            if at.numel() and self.projector(name).linear_1.weight.requires_grad:
                self.projectors_trained[name] = True

    def _read_rows(self, spec: ModalitySpec, rows: Rows | None, device: torch.device) -> Tensor:
        """`[R, d]` in the dtype of the projector, which may be trained in more than the model's.

        On the projector's device; on `device` where accelerate keeps its weights elsewhere and
        moves them, and what they are applied to, when they are called for.
        """
        like = self.projector(spec.name).linear_1.weight
        if like.device.type != "meta":
            device = like.device
        if rows is None:
            return torch.zeros(0, spec.dim, dtype=like.dtype, device=device)
        if not isinstance(rows, Tensor):
            items = [torch.as_tensor(item) for item in rows]
            items = [item.unsqueeze(0) if item.ndim == 1 else item for item in items]
            for item in items:
                _check_width(spec, item)
            if not items:
                return torch.zeros(0, spec.dim, dtype=like.dtype, device=device)
            rows = torch.cat([item.to(device, like.dtype) for item in items])
        _check_width(spec, rows)
        return rows.to(device, like.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        embeddings: Mapping[str, Rows] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        slots: Mapping[str, Tensor] | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model on a batch.

        Args:
            input_ids: `[B, T]` int64, padded on either side.
            attention_mask: `[B, T]` (with a cache `[B, past + T]`), 1 at real tokens. Positions
                are counted along it, so a left-padded sequence equals the sequence alone.
            position_ids: `[B, T]`; derived from `attention_mask` unless given.
            past_key_values: a cache; placeholders are looked for only in `input_ids`, and each
                wants a row, whatever the cache holds.
            inputs_embeds: `[B, T, D]`, instead of `input_ids` and `embeddings`.
            labels: `[B, T]` int64; label `t` is predicted from the tokens before `t`; -100 is
                ignored.
            embeddings: rows for the placeholders; see `fuse`.
            use_cache: whether to return a cache.
            logits_to_keep: logits of the last so many positions only (0: all), or of these.
            slots: where the rows go, if known; see `fuse`.
            shift_labels: `[K]` int64, instead of `labels`: what the positions `logits_to_keep`
                `[K]` of the one batch row predict. Only the loss is computed, without the logits
                of all K in memory at once.
            **kwargs: passed on to the text model (`output_hidden_states`, ...) and to the loss
                (`num_items_in_batch`). With `cu_seq_lens_q` `[S + 1]`, the bounds of samples that
                stand end to end in the one batch row, recurrent layers begin anew at each.

        Returns:
            What the text model's class returns: `loss` (with labels), `logits` `[B, T, V]`,
            `past_key_values`, `hidden_states`, `attentions`; for a mixture of experts whose
            `output_router_logits` is set, also `router_logits` and `aux_loss`, which the loss then
            includes.

        Raises:
            ValueError: see `fuse`; or not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            if embeddings is NO_ROWS:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.fuse(input_ids, embeddings, slots)
        elif embeddings:
            raise ValueError("embeddings need input_ids, whose placeholders say where they go")
        if position_ids is None and isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
            position_ids = positions[:, past : past + cast(Tensor, inputs_embeds).shape[1]]

        if kwargs.get("cu_seq_lens_q") is not None:
            refuse_end_to_end(self.config.text_config, recurrent=self._is_stateful or None)
        num_items = kwargs.pop("num_items_in_batch", None)
        text = self._text_model()
        if shift_labels is not None:
            kwargs |= {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
            kwargs["attention_mask"] = attention_mask
            mean = self._packed_loss(text, logits_to_keep, shift_labels, num_items, kwargs)
            return CausalLMOutputWithPast(loss=mean)
        outputs = text.forward(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{**kwargs, "return_dict": True},
        )
        logits, loss = outputs.logits, None
        if labels is not None:
            # Not by the text model, whose labels must be as long as the logits that it keeps.
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            loss = self.loss_function(
                logits=logits,
                labels=labels[:, keep],
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items,
            )
            aux_loss = getattr(outputs, "aux_loss", None)
            if aux_loss is not None:
                loss = loss + text.router_aux_loss_coef * aux_loss.to(loss.device)
        elif not self.training:
            logits = self._mask_placeholders(logits)
        return type(outputs)(**{**outputs, "loss": loss, "logits": logits})

    def _packed_loss(
        self,
        text: Any,
        keep: Any,
        targets: Tensor,
        num_items: int | Tensor | None,
        inputs: Mapping[str, Any],
    ) -> Tensor:
        """Mean, or sum over `num_items`, of the cross-entropy of `targets` at the places `keep`."""
        config = self.config.text_config
        inputs = {**inputs, "use_cache": False}
        balances = inputs.get("output_router_logits", getattr(config, "output_router_logits", None))
        if is_plain_head(config) and not balances:
            hidden = text.model(**inputs).last_hidden_state[0].index_select(0, keep)
            total = token_loss(hidden, self.lm_head, targets, fused=self.fused_loss)
            aux_loss: Any = None
        else:
            outputs = text.forward(logits_to_keep=keep, **inputs)
            total = F.cross_entropy(outputs.logits[0].float(), targets, reduction="sum")
            aux_loss = getattr(outputs, "aux_loss", None)
        count = max(len(targets), 1) if num_items is None else num_items
        if aux_loss is not None:  # each pass of a step weighs as much as its tokens
            total = total + len(targets) * text.router_aux_loss_coef * aux_loss.to(total.device)
        return total / count

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save the whole model; over a `mmqwen build` directory, in place of its links and index.

        The base that the links led to is not written to.
        """
        if hasattr(self.config, CONFIG_FIELD):
            delattr(self.config, CONFIG_FIELD)
        if self.projectors_trained:
            setattr(self.config, CONFIG_FIELD, dict(self.projectors_trained))
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            drop_replaced_files(Path(save_directory))

    def _mask_placeholders(self, logits: Tensor) -> Tensor:
        if not self.specs:
            return logits
        return logits.index_fill(-1, self._placeholders(logits.device), float("-inf"))


def _check_width(spec: ModalitySpec, rows: Tensor) -> None:
    if rows.ndim != 2 or rows.shape[1] != spec.dim:
        raise ValueError(
            f"modality {spec.name!r}: got rows of shape {tuple(rows.shape)}, expected "
            f"[rows, {spec.dim}]"
        )
