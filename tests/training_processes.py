"""Training in processes that may be killed, each forked from one that has imported what it needs.

An import of torch, transformers and peft takes as long as a whole run of a few steps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

IMPORTED = ("torch", "transformers.trainer", "peft", "accelerate", "mmqwen.training.run")
SECONDS = 300


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def apart(run: Callable[..., None], *arguments: Any, log: Path, ranks: int = 1) -> list[int]:
    """Call a function of a module in so many processes, which find each other as torchrun's do.

    Returns:
        The exit status of each; `log` has what they wrote.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    shared = {} if ranks == 1 else {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
        for rank in range(ranks):
            if ranks > 1:
                of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
                shared |= {name: str(value) for name, value in of_rank.items()}
                shared["LOCAL_WORLD_SIZE"] = str(ranks)
            process = context.Process(target=_begin, args=(run, arguments, log, dict(shared)))
            process.start()
            processes.append(process)
    try:
        for process in processes:
            process.join(SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in processes]


def _begin(run: Callable[..., None], arguments: Any, log: Path, variables: dict[str, str]) -> None:
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ.update(variables)
    run(*arguments)


def plainly(settings: Any) -> None:
    from mmqwen.training import train

    train(settings)


def killed_after_a_step(settings: Any) -> None:
    from mmqwen.training import train

    train(settings, callbacks=[_kill_at(5)])


def killed_while_saving(settings: Any) -> None:
    import torch

    from mmqwen.training import train

    real, calls = torch.save, []

    def save(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        real(*args, **kwargs)
        if len(calls) == 5:  # three files a checkpoint: in the middle of the second
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save
    train(settings)


def sharded(settings: Any, kill_at: int) -> None:
    """Each rank holds its share of every weight, and ends after so many steps.

    The head's loss is computed in several pieces, as it is from 2,048 tokens on.
    """
    from mmqwen.hf import loss
    from mmqwen.training import train
    from mmqwen.training.sharding import is_sharded

    loss.PIECE = 3

    def watch(model: Any) -> None:
        assert all(is_sharded(p) for p in model.parameters())
        local = sum(p.to_local().numel() for p in model.parameters())
        assert local < 0.6 * sum(p.numel() for p in model.parameters())

    train(settings, callbacks=[_kill_at(kill_at, watch)])


def _kill_at(step: int, watch: Callable[[Any], None] = lambda model: None) -> Any:
    from transformers import TrainerCallback

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
            watch(model)
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return Kill()
