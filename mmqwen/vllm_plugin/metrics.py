"""Prometheus counters, shown on vLLM's own /metrics.

They live in prometheus_client's default registry, where vLLM's are; with several API server
processes prometheus_client writes them to PROMETHEUS_MULTIPROC_DIR and vLLM's page adds them up.
Latencies are vLLM's own: see `vllm:time_to_first_token_seconds`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge


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
        "references": Counter(
            "mmqwen_references", "Messages whose rows were given by reference.", ["result"]
        ),
        "bank_updates": Counter("mmqwen_bank_updates", "Updates of banks.", ["result"]),
    }


@cache
def _adders(modality: str) -> tuple[Callable[[float], None], ...]:
    """What adds to a modality's items, rows and bytes: labels() costs more than the increment."""
    return tuple(_counters()[kind].labels(modality).inc for kind in ("items", "rows", "bytes"))


def count_accepted(accepted: Iterable[tuple[str, int, int, int]]) -> None:
    """Count a prompt.

    Args:
        accepted: (modality, items, rows, bytes of the rows as they came) each.
    """
    _counters()["requests"].inc()
    for name, items, rows, nbytes in accepted:
        add_items, add_rows, add_bytes = _adders(name)
        add_items(items)
        add_rows(rows)
        add_bytes(nbytes)


def count_refusal(reason: str) -> None:
    """Count a refusal.

    Args:
        reason: one of a fixed set of short codes, never a caller's text.
    """
    _counters()["refusals"].labels(reason).inc()


def count_references(result: str, number: int) -> None:
    """Count messages whose rows were given by reference.

    Args:
        result: "hit" or "missing".
        number: of messages.
    """
    if number:
        _counters()["references"].labels(result).inc(number)


@cache
def _native_gauge() -> Gauge:
    from prometheus_client import Gauge

    return Gauge(
        "mmqwen_native_helper",
        "1 where rows are packed by the native helper, 0 where Python packs them.",
        multiprocess_mode="livemin",
    )


def prepare(modalities: Iterable[str], native: bool) -> None:
    """Make the counters appear, at zero, before the first request.

    Args:
        modalities: their names.
        native: whether the native helper is in use; of several processes, whether in all.
    """
    _native_gauge().set(int(native))
    counters = _counters()
    for name in modalities:
        for kind in ("items", "rows", "bytes"):
            counters[kind].labels(name)


def count_bank_update(result: str) -> None:
    """Count an update of a bank.

    Args:
        result: "done" or "refused".
    """
    _counters()["bank_updates"].labels(result).inc()
