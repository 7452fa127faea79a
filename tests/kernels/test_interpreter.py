"""Runs `interpreter_suite.py` under Triton's interpreter: the kernels' arithmetic, on any machine.

In a process of its own, because TRITON_INTERPRET is read when the kernels are defined.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
HERE = Path(__file__).parent


@pytest.mark.timeout(1800)  # a minute and a half of one CPU, which others may want too
def test_kernels_under_the_interpreter() -> None:
    env = os.environ | {
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(HERE), str(HERE.parents[1] / "kernels"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HERE / "interpreter_suite.py"),
            "-q",
            "-W",
            "ignore",
            "-p",
            "no:cacheprovider",
            "--durations=3",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=1740,
        check=False,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
