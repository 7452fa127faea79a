"""`generation_config.json`: where a checkpoint's generation stops. Standard library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GENERATION_FILE = "generation_config.json"


def read_generation_config(folder: str | Path) -> dict[str, Any]:
    """The fields of a checkpoint's `generation_config.json`; {} where it has none.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: it is no JSON object, or its `eos_token_id` is neither a token id, a list of
            them, nor null.
    """
    file = Path(folder) / GENERATION_FILE
    remedy = "write it anew, or remove it: the config's eos_token_id is taken then"
    try:
        fields = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8
        raise ValueError(f"{file}: cannot be read: {error}; {remedy}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{file}: got a {type(fields).__name__}, expected an object; {remedy}")
    stops = fields.get("eos_token_id")
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in listed):
        raise ValueError(
            f"{file}: eos_token_id is {stops!r:.60}, expected a token id, a list of them or null; "
            f"{remedy}"
        )
    return fields
