"""What one call of the served model's `embed_input_ids` sets off; run inside a worker."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch


def model_of(worker: Any) -> Any:
    """The model that a worker (or what wraps it) serves."""
    return getattr(worker, "worker", worker).get_model()


def make_step(model: Any, requests: int = 8) -> dict[str, Any]:
    """Arguments of `embed_input_ids`: requests of 24 tokens, 8 of them rows of two modalities."""
    from mmqwen.packs import directory, pack_rows

    device = next(model.parameters()).device
    dtype = next(iter(model.projectors.values())).weights().w2.dtype
    packs, length = [], 24
    mask = torch.zeros(requests * length, dtype=torch.bool)
    for at in range(requests):
        generator = torch.Generator().manual_seed(at)
        items = [
            (modality, torch.randn(2, width, generator=generator).to(dtype))
            for modality, width in [*enumerate(model._packs.widths[:2])] * 2
        ]
        packs.append(pack_rows(items))
        mask[at * length + 4 : at * length + 4 + 2 * len(items)] = True
    if device.type == "cuda":
        mask = mask.pin_memory()
    ids = torch.arange(requests * length, device=device, dtype=torch.int32) % 200
    return {
        "input_ids": ids,
        "multimodal_embeddings": [directory(pack) for pack in packs],
        "is_multimodal": mask,
    }


@torch.inference_mode()
def count_collectives(worker: Any) -> dict[str, Any]:
    """Collectives of a step with rows, by name. Empty on ranks that do not embed."""
    from vllm.distributed.parallel_state import GroupCoordinator, get_pp_group

    if not get_pp_group().is_first_rank:
        return {"collectives": {}}
    model = model_of(worker)
    step = make_step(model)
    seen: Counter[str] = Counter()
    names = ("all_reduce", "all_gather", "reduce_scatter", "gather", "broadcast", "send", "recv")
    originals = {name: getattr(GroupCoordinator, name) for name in names}

    def counting(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return originals[name](self, *args, **kwargs)

        return call

    # An engine's first step asks the text model how it embeds, where no profiling run has.
    model.embed_input_ids(**step)
    try:
        for name in names:
            setattr(GroupCoordinator, name, counting(name))
        model.embed_input_ids(**step)
    finally:
        for name, original in originals.items():
            setattr(GroupCoordinator, name, original)
    return {"collectives": dict(seen)}


@torch.inference_mode()
def count_kernels(worker: Any) -> dict[str, Any] | None:
    """Kernels and copies of a step on a GPU, and whether it waited for the GPU; None on a CPU."""
    from vllm.distributed.parallel_state import get_pp_group

    if not torch.cuda.is_available() or not get_pp_group().is_first_rank:
        return None
    from torch.profiler import ProfilerActivity, profile

    model = model_of(worker)
    steps = [make_step(model) for _ in range(4)]
    for step in steps[:3]:  # the first ones compile and fill allocators
        model.embed_input_ids(**step)
    torch.cuda.synchronize()
    synchronised = None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.embed_input_ids(**steps[3])
    except RuntimeError as error:
        synchronised = str(error)[:300]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        model.embed_input_ids(**steps[0])
        torch.cuda.synchronize()
    on_gpu = [
        event.name
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    copies = [name for name in on_gpu if name.startswith(("Memcpy", "Memset"))]
    return {
        "backend": model._choice.name if model._backend == "auto" else model._backend,
        "plain_table": model._token_table() is not None,
        "kernels": len(on_gpu) - len(copies),
        "copies": len(copies),
        "names": sorted({name[:60] for name in on_gpu}),
        "synchronised": synchronised,
    }
