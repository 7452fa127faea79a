"""Settings that every test needs before vLLM or torch is imported; the order of the tests."""

import os
import random
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; unset, vLLM takes most of the memory
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Test processes share out the cores: threads that wait for each other's cores spin, and a test of
# ten seconds took ninety.
_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _processes > 1:
    _cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (_cores or 1) // _processes)))

# How fast a machine draws examples is no property of the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _own_random_numbers() -> None:
    """What a test draws without a generator does not depend on the tests before it."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


LONG = (
    "server", "spelling", "readme", "hybrid", "vllm_references", "interpreter", "parity",
    "playground", "resume", "evaluation", "scoring", "examples", "demo",
)  # fmt: skip
"""Words in the names of the files that take minutes, the longest first: begun early, they do not
run alone at the end while another process has nothing left."""


def _place(path: Path) -> int:
    """Of a file among the long ones; of all others, behind them."""
    return next((at for at, word in enumerate(LONG) if word in path.stem), len(LONG))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; `MMQWEN_TEST_ORDER=SEED` shuffles the files, and the tests within each.

    Not the tests of all files at once: each file's engine would be started for every test.
    """
    items.sort(key=lambda item: _place(item.path))
    seed = os.environ.get("MMQWEN_TEST_ORDER")
    if seed:
        draw = random.Random(seed).random
        place = {path: draw() for path in dict.fromkeys(item.path for item in items)}
        items.sort(key=lambda item: (place[item.path], draw()))
