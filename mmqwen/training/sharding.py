"""FSDP: shards gathered to whole tensors for checkpoints, and whole tensors put back into shards.

A checkpoint of a sharded run holds what any other's holds: the trained weights and the optimizer's
state, whole, so that a run may go on with another number of processes, or with none. Every process
calls these functions; each gathers one tensor at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is one process's part of a tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be sharded, on the CPU."""
    full: Any = tensor.detach()
    if is_sharded(full):
        full = full.full_tensor()
    return full.cpu().contiguous()


@torch.no_grad()
def put(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole tensor, the same in every process, into a parameter that may be sharded."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = parameter
        value = value.to(sharded.device, sharded.dtype)
        parameter.copy_(distribute_tensor(value, sharded.device_mesh, sharded.placements))
    else:
        parameter.copy_(value)


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """The whole state of an optimizer of sharded weights, on the CPU of the first process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    inner = getattr(optimizer, "optimizer", optimizer)
    return get_optimizer_state_dict(model, inner, options=options)


def load_optimizer_state(model: nn.Module, optimizer: Any, state: dict[str, Any]) -> None:
    """Shard a whole state, read by every process, into an optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True)
    inner = getattr(optimizer, "optimizer", optimizer)
    set_optimizer_state_dict(model, inner, state, options=options)


def shard_on_cpu(accelerator: Any, plugin: Any) -> None:
    """Make accelerate shard between CPU processes, which it does between GPUs only.

    `AcceleratorState` looks for FSDP where the kind of process group is one of accelerators'; on
    the CPU it drops the plugin without a word and trains by DistributedDataParallel (accelerate
    1.15, `state.py`). torch shards over gloo as well.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = accelerator.state
    if state.distributed_type != DistributedType.MULTI_CPU:
        return
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_losses_whole(plugin: Any) -> None:
    """Leave what modules return in the dtype that they computed it in.

    accelerate has FSDP cast it to the weights' dtype: of a loss of 11.91, bfloat16 keeps 11.9.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)
