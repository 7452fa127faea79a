"""The demo's model trained with and without the kernels, from the same seeds.

    python benchmarks/bench_convergence.py                          # a GPU: bfloat16, the kernels
    python benchmarks/bench_convergence.py --device cpu --steps 20  # any machine: torch in both

Both paths train the whole model of `mmqwen demo` (3 layers of width 128 and two projectors, from
scratch, on 1437 digits) on the same batches in the same order: weights, activations and gradients
in bfloat16, the optimizer's own copy of the weights in float32, no autocast, so that table and
projectors have one dtype and "fused" runs the kernels forward and backward. How often they ran is
counted; on a GPU a run of "fused" without them fails. Accuracy is over the 360 held-out digits.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from bench_training import RESULTS, about

from mmqwen.demo import digits
from mmqwen.demo.train import (
    PEAK_LEARNING_RATE,
    Batcher,
    _learning_rate,
    answer,
    make_model,
)
from mmqwen_kernels import autograd

PATHS = ("torch", "fused")
LAST = 20
"""Steps at the end over which the final loss is averaged."""


class Count:
    """How often the kernels' forward and backward ran, from when it was made."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        ahead, launcher = autograd._forward_triton, autograd.backward_kernels

        def counted_forward(*args: Any) -> Any:
            self.forward += 1
            return ahead(*args)

        def counted_backward(*args: Any) -> Any:
            self.backward += 1
            return launcher(*args)

        autograd._forward_triton, autograd.backward_kernels = counted_forward, counted_backward
        self._own = ahead, launcher

    def stop(self) -> None:
        """Count no more."""
        autograd._forward_triton, autograd.backward_kernels = self._own


def on_device(batch: dict[str, Any], device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The batch's tensors moved, and its rows in the model's dtype."""
    moved = {name: value.to(device) for name, value in batch.items() if name != "embeddings"}
    rows = batch["embeddings"].items()
    return {**moved, "embeddings": {name: value.to(device, dtype) for name, value in rows}}


def run(path: str, seed: int, steps: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Train once; returns losses, accuracy and what ran."""
    train_samples, test_samples = digits.load(seed)
    tokenizer = digits.make_tokenizer()
    model = make_model(tokenizer, seed).to(device, dtype)
    model.training_path = path
    batcher = Batcher(train_samples, tokenizer, model.specs, seed)
    parameters = list(model.parameters())
    masters = [p.detach().float().clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.AdamW(
        masters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _learning_rate(at, steps))
    model.train()
    choice = model.training_choice()
    count = Count()
    losses = []
    begin = time.perf_counter()
    try:
        for step in range(steps):
            batch = on_device(batcher.draw(step), device, dtype)
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad = parameter.grad.float()
                parameter.grad = None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
            losses.append(loss.detach())
    finally:
        count.stop()
    curve = torch.stack(losses).float().cpu()
    seconds = time.perf_counter() - begin
    model.eval()
    if device == "cuda" and path == "fused" and (count.forward, count.backward) != (steps, steps):
        raise RuntimeError(
            f"the kernels ran {count.forward} times forward and {count.backward} times backward "
            f"in {steps} steps: {choice.reason}"
        )
    return {
        "path": path,
        "seed": seed,
        "choice": f"{choice.name}: {choice.reason}",
        "kernels_forward": count.forward,
        "kernels_backward": count.backward,
        "final_loss": round(float(curve[-LAST:].mean()), 5),
        "accuracy": round(answer(model, tokenizer, test_samples).accuracy, 5),
        "seconds": round(seconds, 2),
        "losses": [round(value, 5) for value in curve.tolist()],
    }


def main(argv: list[str] | None = None) -> Path:
    """Train, print and write; returns the file of results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=85, help="no seed begins after this")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    output = arguments.output or RESULTS / f"convergence-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**about(device, dtype), "steps": arguments.steps, "results": []}
    slowest = 0.0
    print(f"{'seed':>4} {'path':6} {'loss':>8} {'accuracy':>9} {'seconds':>8}  kernels  why")
    for seed in range(arguments.seeds):
        begin = time.perf_counter()
        if begin - start + slowest > arguments.seconds:
            print(f"seeds {seed} to {arguments.seeds - 1} are left out: {arguments.seconds} s")
            break
        for path in PATHS:
            result = run(path, seed, arguments.steps, device, dtype)
            report["results"].append(result)
            output.write_text(json.dumps(report, indent=1) + "\n")
            ran = f"{result['kernels_forward']}+{result['kernels_backward']}"
            print(
                f"{seed:4} {path:6} {result['final_loss']:8.4f} {result['accuracy']:9.1%} "
                f"{result['seconds']:8.1f}  {ran:>7}  {result['choice']}",
                flush=True,
            )
        slowest = max(slowest, time.perf_counter() - begin)
    for path in PATHS:
        own = [r for r in report["results"] if r["path"] == path]
        if own:
            loss = torch.tensor([r["final_loss"] for r in own])
            share = torch.tensor([r["accuracy"] for r in own])
            print(
                f"{path:6} over {len(own)} seed(s): loss {loss.mean():.4f} "
                f"({loss.min():.4f} to {loss.max():.4f}), accuracy {share.mean():.1%} "
                f"({share.min():.1%} to {share.max():.1%})"
            )
    return output


if __name__ == "__main__":
    print(main())
