"""What an API client needs, and nothing heavier than numpy: embeddings as chat message parts.

from openai import OpenAI
from mmqwen.client import embeds_part

content = [embeds_part("m1", rows), {"type": "text", "text": "What is this?"}]
client.chat.completions.create(model=..., messages=[{"role": "user", "content": content}])
"""

from __future__ import annotations

from typing import Any

from mmqwen.transport import encode_rows

__all__ = ["embeds_part"]


def embeds_part(modality: str, rows: Any, dtype: str | None = None) -> dict[str, Any]:
    """One item of a modality as a part of a chat message's content.

    Args:
        modality: the modality's name, e.g. `"m1"`.
        rows: a `[d]` vector or `[n, d]` matrix: numpy, torch, or nested lists.
        dtype: `"float32"`, `"float16"` or `"bfloat16"` on the wire; left out, the rows' own
            (float32 for float64 and for lists). A half-width dtype halves the request.

    Returns:
        `{"type": "m1_embeds", "m1_embeds": {"data": ..., "dtype": ..., "shape": [n, d]}}`.

    Raises:
        mmqwen.transport.EmbeddingError: the rows are not dense, floating and finite.
    """
    kind = f"{modality}_embeds"
    return {"type": kind, kind: encode_rows(rows, dtype, modality=modality)}
