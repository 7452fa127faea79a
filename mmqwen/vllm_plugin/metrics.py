"""Prometheus counters, shown on vLLM's own /metrics.

They live in prometheus_client's default registry, where vLLM's are; with several API server
processes prometheus_client writes them to PROMETHEUS_MULTIPROC_DIR and vLLM's page adds them up.
Latencies are vLLM's own: see `vllm:time_to_first_token_seconds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Counter


@cache
def _counters() -> dict[str, Counter]:
    """Made on first use: once a process, and after vLLM has set up its multi-process mode."""
    from prometheus_client import Counter

    return {
        "requests": Counter("mmqwen_requests", "Prompts with embeddings that were accepted."),
        "items": Counter("mmqwen_items", "Items of accepted prompts.", ["modality"]),
        "rows": Counter("mmqwen_rows", "Embedding rows of accepted prompts.", ["modality"]),
        "bytes": Counter(
            "mmqwen_bytes", "Bytes of the rows of accepted prompts, as they came.", ["modality"]
        ),
        "refusals": Counter("mmqwen_refusals", "Requests that were refused.", ["reason"]),
    }


def count_accepted(items: Mapping[str, Iterable[Any]]) -> None:
    """Count a prompt.

    Args:
        items: modality to tensors or arrays `[n, d]` or `[d]`. Items of other kinds (nested lists
            in `LLM.generate`) are counted as items only.
    """
    counters = _counters()
    counters["requests"].inc()
    for name, members in items.items():
        count = rows = nbytes = 0
        for item in members:
            count += 1
            shape = getattr(item, "shape", None)
            if shape is not None:
                rows += int(shape[0]) if len(shape) == 2 else 1
                nbytes += int(item.nbytes)
        counters["items"].labels(name).inc(count)
        counters["rows"].labels(name).inc(rows)
        counters["bytes"].labels(name).inc(nbytes)


def count_refusal(reason: str) -> None:
    """Count a refusal.

    Args:
        reason: one of a fixed set of short codes, never a caller's text.
    """
    _counters()["refusals"].labels(reason).inc()


def prepare(modalities: Iterable[str]) -> None:
    """Make the counters appear, at zero, before the first request."""
    counters = _counters()
    for name in modalities:
        for kind in ("items", "rows", "bytes"):
            counters[kind].labels(name)
