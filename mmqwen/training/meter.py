"""What a user sees while training goes on: speed, memory, padding, and how far projectors moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging


class Meter(TrainerCallback):
    """Counts tokens between log entries, and watches what projectors give out.

    The first step is left out, since it may compile, and so is the time of evaluations and
    checkpoints.

    Args:
        device: that is trained on.
        world: processes; each is taken to do as much as this one.
        flops: of a token, or None where the share of the peak is not told.
        peak: FLOP/s of the device, or None.
    """

    def __init__(
        self, device: torch.device, *, world: int, flops: float | None, peak: float | None
    ) -> None:
        self.device, self.world = device, world
        self.flops, self.peak = flops, peak
        self.begin: float | None = None
        self.tokens = self.real = self.learnt = 0
        self.rows: dict[str, _Rows] = {}
        self._total = (0, 0.0)  # tokens and seconds of what was measured

    def count(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Passes that a step is about to take."""
        for batch in batches:
            self.tokens += batch["input_ids"].numel()
            self.real += batch["input_ids"].numel() - batch["padding"]
            self.learnt += len(batch["shift_labels"])

    def watch(self, projectors: nn.ModuleDict) -> None:
        """Follow the rows that each projector gives out in training."""
        for name, module in projectors.items():
            rows = self.rows[name] = _Rows()
            module.register_forward_hook(rows.see)

    def read(self) -> dict[str, float]:
        """What was measured since the last time.

        Returns:
            `tokens_per_second` (samples' own, over all processes), `learnt_per_second`, `padding`
            (share of the tokens), `share_of_peak` and `memory_gb` (the most so far) where they are
            known, and for each modality `rows/<name>/norm` (the mean of its projected rows'),
            `norm_change` (since the start, as a share) and `mean_shift` (1 less the cosine between
            the mean row and that of the start).
        """
        found: dict[str, float] = {}
        seconds = 0.0 if self.begin is None else time.perf_counter() - self.begin
        if seconds > 0 and self.real:
            found["tokens_per_second"] = round(self.world * self.real / seconds, 1)
            found["learnt_per_second"] = round(self.world * self.learnt / seconds, 1)
            found["padding"] = round(1 - self.real / self.tokens, 4)
            if self.flops and self.peak:
                share = self.flops * self.real / seconds / self.peak
                found["share_of_peak"] = round(share, 4)
            tokens, before = self._total
            self._total = (tokens + self.world * self.real, before + seconds)
        if self.device.type == "cuda":
            found["memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 2)
        for name, rows in self.rows.items():
            found |= {f"rows/{name}/{key}": value for key, value in rows.read().items()}
        self._restart()
        return found

    def mean_speed(self) -> float | None:
        """Tokens a second over all that was measured, or None where that is nothing."""
        tokens, seconds = self._total
        return round(tokens / seconds, 1) if seconds else None

    def _restart(self) -> None:
        self.begin = time.perf_counter()
        self.tokens = self.real = self.learnt = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to measure after the first step."""
        if self.begin is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._restart()

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out the time of an evaluation."""
        self._restart()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave out the time of a checkpoint."""
        self._restart()


class _Rows:
    """Norms and the mean of what one projector gives out, summed on its device."""

    def __init__(self) -> None:
        self.sums: list[torch.Tensor] | None = None  # of norms, of rows; and how many
        self.count = 0
        self.start: tuple[float, torch.Tensor] | None = None

    @torch.no_grad()
    def see(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """A forward hook."""
        if not module.training or not len(output):
            return
        rows = output.detach().float()
        now = [rows.norm(dim=-1).sum(), rows.sum(dim=0)]
        self.sums = (
            now if self.sums is None else [a + b for a, b in zip(self.sums, now, strict=True)]
        )
        self.count += len(output)

    def read(self) -> dict[str, float]:
        """Means since the last time, against those of the first."""
        if self.sums is None:
            return {}
        norm, mean = self.sums[0].item() / self.count, self.sums[1].cpu() / self.count
        self.sums, self.count = None, 0
        if self.start is None:
            self.start = norm, mean
        cosine = torch.cosine_similarity(mean, self.start[1], dim=0, eps=1e-12).item()
        change = norm / self.start[0] - 1 if self.start[0] else 0.0
        return {
            "norm": round(norm, 5),
            "norm_change": round(change, 5),
            "mean_shift": round(1 - cosine, 5),
        }


@contextmanager
def without_file_bars() -> Iterator[None]:
    """Keep transformers from showing bars of its own for the files that it reads and writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Bar(ProgressCallback):
    """transformers' progress bar, with the last log entry beside it instead of above it."""

    def __init__(self, *, compiles: bool = False) -> None:
        super().__init__()
        self.compiles = compiles

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say why the first step takes its time."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("first step (compiling)" if self.compiles else "")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("training", refresh=False)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show loss, speed and memory; evaluations stay above the bar."""
        if self.training_bar is None or not logs:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: eval_loss {logs['eval_loss']:.4g}")
        shown = [f"loss {logs['loss']:.4g}"] if "loss" in logs else []
        if "tokens_per_second" in logs:
            shown.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if "share_of_peak" in logs:
            shown.append(f"{logs['share_of_peak']:.0%} of peak")
        if "padding" in logs:
            shown.append(f"{logs['padding']:.1%} padding")
        if "memory_gb" in logs:
            shown.append(f"{logs['memory_gb']:.1f} GB")
        if shown:
            self.training_bar.set_postfix_str(", ".join(shown))
