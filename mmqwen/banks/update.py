"""`update_bank`: another version of a bank, without a restart."""

from __future__ import annotations

import os
from typing import Any, NamedTuple


class BankChange(NamedTuple):
    """What an update did.

    Attributes:
        bank: its name.
        old, new: versions, in hex.
        rows: of the new one.
        seconds: from the call until prompts name the new one.
    """

    bank: str
    old: str
    new: str
    rows: int
    seconds: float


def update_bank(llm: Any, name: str, file: str | os.PathLike[str]) -> BankChange:
    """Serve another file as a bank: for all prompts that are read after this.

    Prompts read before, running ones too, finish on the rows that they began with. The prefix cache
    of other versions stays, and is never met by this one.

    Args:
        llm: a `vllm.LLM` that serves one of our checkpoints, or a `MultimodalQwen3Pipeline`.
        name: the bank's.
        file: as for `open_bank`, of the bank's modality and width. Each process of the engine reads
            it. Write a new file; one that is changed in place is changed under who uses it.

    Raises:
        UnknownBankError: there is no such bank.
        BankBusyError: a bank is being updated.
        BankError: the file cannot be served in the bank's place; nothing has changed.
        TypeError: `llm` is neither.
    """
    renderer = getattr(getattr(llm, "llm_engine", None), "renderer", None)
    for update in (getattr(llm, "update_bank", None), getattr(renderer, "update_bank", None)):
        if update is not None:
            change: BankChange = update(name, file) if renderer is None else update(llm, name, file)
            return change
    raise TypeError(
        f"update_bank: got a {type(llm).__name__}, expected a vllm.LLM that serves a checkpoint of "
        "mmqwen, or a MultimodalQwen3Pipeline"
    )
