"""What reaches vLLM's processes through the environment: byte limits, the folder for updates."""

from __future__ import annotations

import os
from pathlib import Path

from mmqwen.messages import WireLimits

ITEM_BYTES_VARIABLE = "MMQWEN_MAX_ITEM_BYTES"
REQUEST_BYTES_VARIABLE = "MMQWEN_MAX_REQUEST_BYTES"

BANK_FOLDER_VARIABLE = "MMQWEN_BANK_UPDATES"

TEXT_BYTES = 16 * 2**20
"""What a request's body may hold beside base64: text, JSON, tool definitions."""


def wire_limits() -> WireLimits:
    """Limits of the wire format: the defaults, or what the environment says.

    Raises:
        ValueError: a variable does not hold a positive integer.
    """
    found: dict[str, int] = {}
    for field, variable in (
        ("item_bytes", ITEM_BYTES_VARIABLE),
        ("request_bytes", REQUEST_BYTES_VARIABLE),
    ):
        text = os.environ.get(variable)
        if text is None:
            continue
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{variable} is {text!r}, expected a positive number of bytes")
        found[field] = int(text)
    return WireLimits(**found)


def body_limit() -> int:
    """Most bytes of a request's body: base64 of the rows, and `TEXT_BYTES` for the rest."""
    return 4 * (wire_limits().request_bytes + 2) // 3 + TEXT_BYTES


def bank_folder() -> Path | None:
    """The folder whose files a client with the server's key may have served as banks, or None.

    Raises:
        ValueError: there is no such folder.
    """
    text = os.environ.get(BANK_FOLDER_VARIABLE)
    if not text:
        return None
    folder = Path(text).expanduser()
    if not folder.is_dir():
        raise ValueError(f"updates of banks: {text!r} is no folder; make it, or name another")
    return folder.resolve()
