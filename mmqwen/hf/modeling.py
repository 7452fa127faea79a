"""The reference and training model: a transformers text model, and one projector a modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from mmqwen.hf.configuration import MultimodalQwen3Config
from mmqwen.modalities import ModalitySpec
from mmqwen.shards import drop_replaced_files
from mmqwen.trained import CONFIG_FIELD, read_trained

Rows = Tensor | Sequence[Any]
"""`[R, d]` packed rows of one modality, or a list of `[n, d]` and `[d]` items in the same order."""


class MultiModalProjector(nn.Module):
    """`linear_2(relu(linear_1(x)))`: rows `[R, dim]` of one modality to embeddings `[R, out_dim]`.

    Args:
        dim: width of a row.
        hidden_dim: hidden units.
        out_dim: width of a token embedding.
        output_std: spread of the outputs of a fresh projector, for rows of unit variance.
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int, *, output_std: float = 0.02
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, hidden_dim)
        self.linear_2 = nn.Linear(hidden_dim, out_dim)
        # He's initialisation for ReLU (arXiv:1502.01852) keeps the second moment of the input;
        # linear_2 then scales it to that of the token embeddings, so that untrained rows neither
        # drown the text nor vanish in it.
        vars(self.linear_1)["init_std"] = math.sqrt(2.0 / dim)
        vars(self.linear_2)["init_std"] = output_std / math.sqrt(hidden_dim)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: rows of unit variance come out with the spread `output_std`.

        Weights are normal, biases zero. `generator` makes the draw repeatable.
        """
        for linear in (self.linear_1, self.linear_2):
            linear.weight.normal_(0.0, vars(linear)["init_std"], generator=generator)
            linear.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        """Project `[..., dim]` to `[..., out_dim]`, in the weights' dtype."""
        return self.linear_2(torch.relu(self.linear_1(rows)))


class MultimodalQwen3ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A causal language model over tokens and over rows of any number of modalities.

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
        ValueError: a modality of `config` has no `token_id`.
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
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MultimodalQwen3Config) -> None:
        super().__init__(config)
        text = config.text_config
        self.specs: dict[str, ModalitySpec] = config.modality_specs
        self.projectors_trained: dict[str, bool] = {}
        for name, spec in self.specs.items():
            if spec.token_id is None:
                raise ValueError(
                    f"modality {name!r} has no token_id; `mmqwen build` or "
                    "mmqwen.modalities.assign_token_ids gives it one"
                )
        self.model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        std = getattr(text, "initializer_range", None) or 0.02
        self.projectors = nn.ModuleDict(
            {
                name: MultiModalProjector(
                    spec.dim, spec.hidden_dim or text.hidden_size, text.hidden_size, output_std=std
                )
                for name, spec in self.specs.items()
            }
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        std = vars(module).get("init_std")
        if std is not None and isinstance(module, nn.Linear):  # a projector's
            # transformers' own functions leave alone what a checkpoint has already filled.
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers does; also reads which projectors were ever trained."""
        path = pretrained_model_name_or_path
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if path is not None:
            model.projectors_trained = read_trained(
                path, model.config, revision=kwargs.get("revision"), cache=kwargs.get("cache_dir")
            )
        return loaded

    def projector(self, name: str) -> MultiModalProjector:
        """The projector of one modality."""
        return cast(MultiModalProjector, self.projectors[name])

    def fuse(self, input_ids: Tensor, embeddings: Mapping[str, Rows] | None) -> Tensor:
        """Token embeddings with projected rows at the placeholders of their modality.

        Args:
            input_ids: `[B, T]` int64.
            embeddings: for each modality, its `[R, d]` rows of the whole batch, or a list of items,
                in the order of batch row, then position. Any floating dtype; computed in the
                projector's, which is the model's unless it was cast for training.

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
        slots, packed = [], []
        for name, spec in self.specs.items():
            rows = self._read_rows(spec, embeddings.get(name))
            at = input_ids.reshape(-1).eq(spec.token_id or 0).nonzero().squeeze(1)
            if at.numel() != rows.shape[0]:
                raise ValueError(
                    f"modality {name!r}: got {rows.shape[0]} row(s), expected {at.numel()}, the "
                    f"number of {spec.token} placeholders (id {spec.token_id}) in input_ids"
                )
            slots.append(at)
            packed.append(rows)
        learns = self.training and torch.is_grad_enabled()
        if learns:
            self._note_training(slots)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        projected, kept = [], []
        for name, at, rows in zip(self.specs, slots, packed, strict=True):
            if at.numel() or learns:
                kept.append(at)
                projected.append(self.projector(name)(rows).to(inputs_embeds.dtype))
        if not kept:
            return inputs_embeds
        flat = inputs_embeds.reshape(-1, inputs_embeds.shape[-1])
        # Out of place: the lookup may be a leaf's view, and autograd needs its input.
        fused = flat.index_put((torch.cat(kept),), torch.cat(projected).to(flat.device))
        return fused.view_as(inputs_embeds)

    def _note_training(self, slots: Sequence[Tensor]) -> None:
        for name, at in zip(self.specs, slots, strict=True):
            if at.numel() and self.projector(name).linear_1.weight.requires_grad:
                self.projectors_trained[name] = True

    def _read_rows(self, spec: ModalitySpec, rows: Rows | None) -> Tensor:
        """`[R, d]` in the dtype of the projector, which may be trained in more than the model's."""
        like = self.projector(spec.name).linear_1.weight
        if rows is None:
            return like.new_zeros(0, spec.dim)
        if not isinstance(rows, Tensor):
            items = [torch.as_tensor(item) for item in rows]
            items = [item.unsqueeze(0) if item.ndim == 1 else item for item in items]
            for item in items:
                _check_width(spec, item)
            if not items:
                return like.new_zeros(0, spec.dim)
            rows = torch.cat([item.to(like.device, like.dtype) for item in items])
        _check_width(spec, rows)
        return rows.to(like.device, like.dtype)

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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Run the model on a batch.

        Args:
            input_ids: `[B, T]` int64, padded on either side.
            attention_mask: `[B, T]` (with a cache `[B, past + T]`), 1 at real tokens. Positions
                are counted along it, so a left-padded sequence equals the sequence alone.
            position_ids: `[B, T]`; derived from `attention_mask` unless given.
            past_key_values: a cache; placeholders are looked for only in `input_ids`.
            inputs_embeds: `[B, T, D]`, instead of `input_ids` and `embeddings`.
            labels: `[B, T]` int64; label `t` is predicted from the tokens before `t`; -100 is
                ignored.
            embeddings: rows for the placeholders; see `fuse`.
            use_cache: whether to return a cache.
            logits_to_keep: logits of the last so many positions only (0: all), or of these.
            **kwargs: passed on to the base model (`output_hidden_states`, ...) and to the loss
                (`num_items_in_batch`).

        Returns:
            `loss` (with labels), `logits` `[B, T, V]` in the model's dtype, `past_key_values`,
            `hidden_states`, `attentions`; for a mixture of experts whose `output_router_logits` is
            set, also `router_logits` and `aux_loss`, which the loss then includes.

        Raises:
            ValueError: see `fuse`; or not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if input_ids is not None:
            if past and embeddings is None:  # a decoding step: placeholders are never sampled
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.fuse(input_ids, embeddings)
        elif embeddings:
            raise ValueError("embeddings need input_ids, whose placeholders say where they go")
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp_(min=0)
            position_ids = positions[:, past : past + cast(Tensor, inputs_embeds).shape[1]]

        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])

        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels[:, keep],
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items,
            )
        elif not self.training:
            logits = self._mask_placeholders(logits)

        common = {
            "logits": logits,
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        router_logits = getattr(outputs, "router_logits", None)
        if router_logits is None:
            return CausalLMOutputWithPast(loss=loss, **common)
        aux_loss = self._router_loss(router_logits, attention_mask)
        if loss is not None:
            loss = loss + self.config.text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        extra = {"aux_loss": aux_loss, "router_logits": router_logits}
        return MoeCausalLMOutputWithPast(loss=loss, **common, **extra)

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
        ids = [spec.token_id for spec in self.specs.values()]
        if not ids:
            return logits
        index = torch.tensor(ids, device=logits.device)
        return logits.index_fill(-1, index, float("-inf"))

    def _router_loss(self, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        text = self.config.text_config
        loss = load_balancing_loss_func(
            router_logits, text.num_experts, text.num_experts_per_tok, attention_mask
        )
        return torch.as_tensor(loss)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        embeddings: Mapping[str, Rows] | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand `embeddings` to the prefill, and to every step when there is no cache."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            cast(Any, input_ids), *args, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["embeddings"] = embeddings
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Repeat each sequence's rows beside the sequence (beams, `num_return_sequences`)."""
        embeddings = model_kwargs.get("embeddings")
        if expand_size > 1 and embeddings and input_ids is not None:
            expanded = {}
            for name, rows in embeddings.items():
                if name not in self.specs:
                    raise ValueError(
                        f"unknown modality {name!r}; expected one of {sorted(self.specs)}"
                    )
                spec = self.specs[name]
                packed = self._read_rows(spec, rows)
                counts = input_ids.eq(spec.token_id or 0).sum(-1).tolist()
                if sum(counts) != packed.shape[0]:
                    raise ValueError(
                        f"modality {name!r}: got {packed.shape[0]} row(s), expected {sum(counts)}, "
                        f"the number of {spec.token} placeholders in input_ids"
                    )
                parts = packed.split(counts)
                expanded[name] = torch.cat([p for p in parts for _ in range(expand_size)])
            model_kwargs["embeddings"] = expanded
        return super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=cast(Any, input_ids),
            **model_kwargs,
        )


def _check_width(spec: ModalitySpec, rows: Tensor) -> None:
    if rows.ndim != 2 or rows.shape[1] != spec.dim:
        raise ValueError(
            f"modality {spec.name!r}: got rows of shape {tuple(rows.shape)}, expected "
            f"[rows, {spec.dim}]"
        )
