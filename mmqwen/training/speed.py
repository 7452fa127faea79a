"""What makes a step fast: attention by variable length, Liger's kernels, compiled layers."""

from __future__ import annotations

import importlib.util
import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmqwen.hf.loss import PIECE
from mmqwen.training.attention import choose_attention
from mmqwen.training.config import TrainingError, TrainSettings

_LOG = logging.getLogger(__name__)

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s of tensor cores by part of the GPU's name, from NVIDIA's data sheets; the
first that fits."""

EAGER_SHARE = 0.1
"""Of the peak: what an uncompiled step of 0.6B's shape reaches on an H100."""
PAYS_AFTER = 60.0
"""Seconds of eager training that make up for the time that compiling takes."""
LEAN_BUDGET = 0.5
"""Of what the compiler would keep for backward: with 0.6B's shape and 32,768 tokens, 19.8 GB
on an H100 instead of 34.5, at 0.92 of the speed."""
MOST_TOKENS = 16_384
"""Of a pass by default: an H100 is as fast with it as with 32,768, in half the memory."""
LEAST_STEPS = 20
"""Of an epoch by default: on small data, passes are smaller than memory would let them be."""


@dataclass(frozen=True)
class Speedups:
    """What a run trains with.

    Attributes:
        attention: the name of the attention.
        compiled: whether the decoder layers are compiled.
        lean: whether they compute more again, to keep less.
        liger: which of Liger's kernels are used, or none.
    """

    attention: str
    compiled: bool
    lean: bool
    liger: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def memory(self) -> AbstractContextManager[Any]:
        """While it is open, compiled layers keep as much as they should."""
        if not self.lean:
            return nullcontext()
        import torch._functorch.config as functorch

        return functorch.patch(activation_memory_budget=LEAN_BUDGET)


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in bfloat16, FLOP/s, where it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(model: Any, stage: str) -> float:
    """FLOPs of the decoder layers' products for a token, forward and backward.

    Recomputation (gradient checkpointing), attention, the head and the projectors are left out, so
    that the share of the peak is that of the work which any way of training the model must do.
    """
    config = model.config.text_config
    count = 0.0
    for name, parameter in model.model.layers.named_parameters():
        if parameter.ndim >= 2 and "lora_" not in name:
            share = 1.0
            if "experts" in name and getattr(config, "num_experts_per_tok", None):
                experts = getattr(config, "num_experts", None) or config.num_local_experts
                share = config.num_experts_per_tok / experts
            count += share * parameter.numel()
    return (6.0 if stage == "full" else 4.0) * count


def default_tokens(
    lengths: Any, device: torch.device, model_bytes: float, token_bytes: float
) -> int:
    """Tokens of a pass: what memory holds, and no more than leaves an epoch some steps.

    Args:
        lengths: tokens of each sample.
        device: that is trained on.
        model_bytes: of the weights, gradients and the optimizer.
        token_bytes: of the activations of a token.
    """
    most = MOST_TOKENS
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        most = min(most, int(max(0.0, 0.8 * free - model_bytes) / token_bytes))
    else:
        most = min(most, 2_048)  # sdpa's mask is a square of it
    wanted = min(most, sum(lengths) // LEAST_STEPS)
    step = 256 if wanted >= 1_024 else 32
    return max(-(-max(wanted, 1) // step) * step, -(-int(max(lengths)) // 32) * 32)


def token_bytes(
    text_config: Any, *, gradient_checkpointing: bool, half: bool, compiled: bool = False
) -> float:
    """Estimated bytes of activations for a token of a pass, in training.

    A layer keeps what enters attention and leaves it and the two halves of its gated unit, about
    34 values a hidden unit at Qwen3-0.6B's shape where nothing is compiled (59 GB at 32,768 tokens
    on an H100), half of that where it is (33 GB; at 8B's shape 33 GB at 8,192 tokens); with
    checkpointing only its input.
    """
    layers, hidden = text_config.num_hidden_layers, text_config.hidden_size
    inner = getattr(text_config, "intermediate_size", 4 * hidden)
    values = hidden * 2 if gradient_checkpointing else 16 * hidden + 6 * inner
    one_layer = 16 * hidden + 6 * inner
    share = 0.5 if compiled else 1.0
    return float(share * (layers * values + one_layer) * (2 if half else 4))


def weight_bytes(model: Path, *, stage: str, half: bool) -> float:
    """Bytes of a checkpoint's weights in training, with gradients and the optimizer's state."""
    from mmqwen.checkpoint.index import read_weight_map

    stored = sum((model / file).stat().st_size for file in set(read_weight_map(model).values()))
    if stage == "full":
        return 8.0 * stored  # float32 weights, gradients and two moments, of bfloat16 files
    return 1.2 * stored if half else 2.4 * stored


def speed_up(
    model: Any, settings: TrainSettings, device: torch.device, tokens: float, *, a_pass: int
) -> Speedups:
    """Give the model its attention, Liger's kernels and compiled layers.

    Args:
        model: the composite model, on any device.
        settings: of the run.
        device: that is trained on.
        tokens: of the whole run, on this device.
        a_pass: tokens of a pass.

    Raises:
        TrainingError: what was asked for cannot be had here.
    """
    config = model.config.text_config
    attention = choose_attention(settings.attention, config, device, bf16=settings.bf16)
    model.set_attn_implementation(attention)
    compiled = settings.compile
    if compiled is None:
        # Layers that are computed twice gain nothing: 12,600 tokens/s at 8B's shape on an H100, and
        # 13,000 with Liger's parts of layers in their place.
        plain = settings.fsdp is None and not settings.gradient_checkpointing
        compiled = device.type == "cuda" and plain and _pays(model, device, tokens)
    liger = _apply_liger(model, settings.liger, device, layers=not compiled)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    lean = settings.lean
    if lean is None and compiled and not settings.gradient_checkpointing:
        half = settings.bf16
        needed = a_pass * token_bytes(
            config, gradient_checkpointing=False, half=half, compiled=True
        )
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        lean = needed > 0.8 * (torch.cuda.mem_get_info(device)[0] - weights)
    return Speedups(attention, compiled, bool(lean and compiled), liger)


def _pays(model: Any, device: torch.device, tokens: float) -> bool:
    peak = peak_flops(device) or 300e12
    seconds = tokens * flops_per_token(model, "projector") / (EAGER_SHARE * peak)
    return seconds > PAYS_AFTER


def _apply_liger(
    model: Any, wanted: bool | None, device: torch.device, *, layers: bool
) -> tuple[str, ...]:
    """Use Liger's kernels: the loss without logits, and the layers' parts where not compiled."""
    if wanted is False or (wanted is None and device.type != "cuda"):
        return ()
    if importlib.util.find_spec("liger_kernel") is None:
        if wanted:
            raise TrainingError("liger needs liger-kernel: pip install 'mmqwen[train-gpu]'")
        _LOG.info("without liger-kernel (mmqwen[train-gpu]), logits are computed in pieces")
        return ()
    if device.type != "cuda":
        raise TrainingError("liger needs a CUDA GPU")
    from liger_kernel.transformers import monkey_patch
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def fused(hidden: Any, weight: Any, targets: Any, bias: Any) -> Any:
        # By itself it takes pieces whose logits are no larger than `hidden`: of 32 tokens at 1,024
        # hidden units and 151,936 words, each of which reads the whole head.
        pieces = -(-len(targets) // PIECE)
        size = -(-weight.shape[0] // (weight.shape[1] * pieces))
        return liger_fused_linear_cross_entropy(
            hidden.to(weight.dtype), weight, targets, bias, reduction="sum", chunk_mem_const=size
        )

    model.fused_loss = fused
    text = model._text_model()
    if not layers or text.config.model_type not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return ("loss",)
    # It also puts its classes into transformers' module, where they would meet models that other
    # code of this process makes, on a CPU perhaps.
    module = vars(sys.modules[type(text).__module__])
    before = dict(module)
    options = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    monkey_patch._apply_liger_kernel_to_instance(text, **options)
    module.update(before)
    return ("loss", "layers")
