"""vLLM on a CUDA GPU: `run_gpu_engine.py`, all configurations in one run; `make test-gpu`."""

from __future__ import annotations

import pytest
import torch
from run_gpu_engine import CONFIGURATIONS, results_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

NAMES = [
    name
    for name, entry in CONFIGURATIONS.items()
    if torch.cuda.device_count() > 1 or not entry.options.get("distributed_executor_backend")
]


@pytest.fixture(scope="module")
def results():
    return results_of(*NAMES, "--jobs", "4", "--time-limit", "1500")


@pytest.mark.parametrize("configuration", NAMES)
def test_configuration(results, configuration):
    (result,) = (line for line in results if line.get("configuration") == configuration)
    assert result["ok"], result


def test_a_step_with_the_kernels_is_two_launches_and_one_copy(results):
    (result,) = (line for line in results if line.get("configuration") == "bf16-kernels")
    assert result["step"]["backend"] == "triton"
    assert result["step"]["kernels"] <= 2, result["step"]
    assert result["step"]["copies"] <= 1, result["step"]
    assert not result["step"]["synchronised"], result["step"]
