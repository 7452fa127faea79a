"""vLLM on a CUDA GPU against transformers there; `make test-gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize(
    "configuration",
    ["bf16-graphs", "bf16-chunked", "bf16-preempted", "fp32-eager", "fp32-qwen2"],
)
def test_parity_with_transformers(configuration):
    script = Path(__file__).with_name("run_gpu_engine.py")
    done = subprocess.run(
        [sys.executable, str(script), configuration],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(lines[-1].removeprefix("RESULT "))
    assert result["ok"], result
