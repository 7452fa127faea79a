"""README's snippets run as printed, in a folder where the names that they use exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import make_base

pytest.importorskip("vllm")

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", README, flags=re.DOTALL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds a tiny model under the name of the real one."""
    path = tmp_path_factory.mktemp("readme")
    make_base(path / "Qwen" / "Qwen3-0.6B")
    return path


def run(arguments, folder, timeout=400, **variables):
    done = subprocess.run(
        arguments,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **variables},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def test_all_snippets_are_found():
    assert set(SNIPPETS) == {"pipeline", "offline", "data"}


def test_pipeline_snippet(folder):
    done = run([sys.executable, "-c", SNIPPETS["pipeline"]], folder)
    assert "UNTRAINED" in done.stderr
    assert done.stdout.strip()


@pytest.fixture(scope="module")
def built(folder):
    """The folder, with what the printed build command made."""
    command = re.search(r"^mmqwen build .*$", README, flags=re.MULTILINE)
    assert command is not None
    run([sys.executable, "-m", "mmqwen.cli", *shlex.split(command[0])[1:]], folder)
    return folder


def test_build_command_and_offline_snippet(built):
    folder = built
    # In a file: vLLM starts its engine in another process, which imports the main module.
    script = folder / "offline.py"
    body = "\n".join("    " + line for line in SNIPPETS["offline"].splitlines())
    script.write_text(f"if __name__ == '__main__':\n{body}\n")
    # As vLLM's own tests on a CPU: traced, but not compiled; the pipeline's snippet is compiled.
    done = run([sys.executable, str(script)], folder, VLLM_CPU_CI_ENV="1")
    assert done.stdout.strip()


def test_data_snippet_and_train_command(built):
    folder = built
    run([sys.executable, "-c", SNIPPETS["data"]], folder)
    command = re.search(r"^mmqwen train ([^#\n]*)", README, flags=re.MULTILINE)
    assert command is not None
    run([sys.executable, "-m", "mmqwen.cli", "train", *shlex.split(command[1])], folder)
    assert (folder / "trained" / "projectors.safetensors").is_file()


def test_basic_usage_example(folder):
    example = Path(__file__).resolve().parent.parent / "examples" / "basic_usage.py"
    run([sys.executable, str(example), "--engine", "transformers", "--max-tokens", "4"], folder)
