"""Attention among samples that stand end to end, each to itself: which of transformers' ways.

`varlen` is torch's own attention by variable length (`torch.nn.attention.varlen`: FlashAttention's
kernels, forward and backward). transformers' own ways do as well: its FlashAttention packages take
the samples' bounds; `sdpa` and `eager` see from the positions where one begins.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mmqwen.training.config import TrainingError

VARLEN = "mmqwen_varlen"
MOST_HEAD_DIM = 256
"""Of FlashAttention's kernels."""
_BESIDES = ("attn_logit_softcapping", "attn_logit_softcap", "sliding_window_pattern")
"""What a text model's config says where attention is more than a softmax over dot products."""


def choose_attention(wanted: str, text_config: Any, device: torch.device, *, bf16: bool) -> str:
    """The name under which transformers knows the attention to train with.

    Raises:
        TrainingError: what was asked for cannot be had here.
    """
    reason = _no_varlen(text_config, device, bf16=bf16)
    if wanted == "varlen" and reason is not None:
        raise TrainingError(f"attention 'varlen' {reason}; take 'sdpa' or leave it to 'auto'")
    if wanted == "varlen" or (wanted == "auto" and reason is None):
        register()
        return VARLEN
    if wanted == "auto":  # eager where the model has a cap or sinks that sdpa leaves out
        return "eager" if _is_special(text_config) else "sdpa"
    return wanted


def _is_special(text_config: Any) -> bool:
    if any(getattr(text_config, name, None) for name in _BESIDES):
        return True
    return getattr(text_config, "model_type", "") == "gpt_oss"  # its sinks are weights


def _no_varlen(text_config: Any, device: torch.device, *, bf16: bool) -> str | None:
    """Why torch's attention by variable length cannot be taken, or None."""
    if device.type != "cuda":
        return "needs a CUDA GPU"
    if not bf16:
        return "computes in bfloat16: add --bf16"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or later"
    heads = getattr(text_config, "num_attention_heads", None) or 1
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    if head_dim > MOST_HEAD_DIM or head_dim % 8:
        return f"does not know head_dim {head_dim}"
    if _is_special(text_config):
        return f"does not compute the attention of {text_config.model_type}"
    try:
        causal_only = "is_causal" in _options(False)
    except ImportError:
        return f"is not in torch {torch.__version__}"
    if causal_only and getattr(text_config, "sliding_window", None):
        return f"knows no sliding window in torch {torch.__version__}"
    return None


_grouped = False
"""Whether heads need not be repeated; like the options, found out when the attention is registered,
since a compiled layer cannot ask."""
_plain_options: dict[str, Any] = {}
_grouped_options: dict[str, Any] = {}


@cache
def register() -> None:
    """Make transformers know the attention; needs a CUDA GPU."""
    global _grouped, _plain_options, _grouped_options
    _plain_options, _grouped_options = _options(False), _options(True)
    _grouped = _groups_heads()
    AttentionInterface.register(VARLEN, _varlen)
    AttentionMaskInterface.register(VARLEN, lambda *_, **__: None)


def _options(grouped: bool) -> dict[str, Any]:
    """How this torch's `varlen_attn` is told of causality and of grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {} if "window_size" in known else {"is_causal": True}
    if grouped and "enable_gqa" in known:
        options["enable_gqa"] = True
    return options


def _groups_heads() -> bool:
    """Whether key and value may have fewer heads than the query, in both directions.

    torch before 2.12 has no option for it; its kernels know it all the same, which saves the
    memory of repeated heads.
    """
    draw = torch.Generator("cuda").manual_seed(0)
    shape: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "generator": draw}
    bounds = torch.tensor([0, 3, 8], device="cuda", dtype=torch.int32)
    query: Any = torch.randn(8, 4, 64, **shape)
    grads: list[Any] = []
    for repeat in (True, False):
        key: Any = torch.full((8, 2, 64), 0.25, device="cuda", dtype=torch.bfloat16)
        key.requires_grad_()
        value: Any = torch.arange(8 * 2 * 64, device="cuda").reshape(8, 2, 64) / 1024
        value = value.bfloat16().requires_grad_()
        keys, values = (_repeat(t, 2) if repeat else t for t in (key, value))
        try:
            out = _attend(query, keys, values, bounds, 5, None, None)
            out.float().square().sum().backward()
        except RuntimeError:
            return False
        grads.append(torch.stack([key.grad, value.grad]))
    return torch.allclose(grads[0], grads[1], rtol=0.05, atol=0.05)


def _repeat(heads: torch.Tensor, groups: int) -> torch.Tensor:
    return heads.repeat_interleave(groups, dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options = dict(_grouped_options if query.shape[1] != key.shape[1] else _plain_options)
    if "is_causal" not in options:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    attend: Any = varlen_attn
    return attend(query, key, value, bounds, bounds, longest, longest, scale=scale, **options)


def _varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sample: `[1, H, T, d]` in, `[1, T, H, d]` out, transformers' way."""
    query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
    if query.dtype == torch.float32:  # of norms with float32 weights, under autocast
        query, key, value = (t.to(torch.get_autocast_dtype("cuda")) for t in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _grouped:
        key, value = _repeat(key, groups), _repeat(value, groups)
    out = _attend(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window)
    return out[None], None
