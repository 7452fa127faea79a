# Each target works alone on a fresh clone: it makes .venv first, and only once.
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(shell command -v $(p) 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/installed
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
REQUIREMENTS := requirements/$(if $(GPU),gpu,cpu).txt

.PHONY: demo test test-gpu lint bench fuzz clean install
.DEFAULT_GOAL := test

install: $(STAMP)

$(STAMP): setup.py pyproject.toml requirements/cpu.txt requirements/gpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv
ifeq ($(GPU),yes)
	$(BIN)/pip install --quiet -r $(REQUIREMENTS)
else
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --no-deps -r $(REQUIREMENTS)
endif
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/mmqwen demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

fuzz: $(STAMP)
	$(BIN)/python -m pytest -m fuzz

clean:
	rm -rf .venv build dist *.egg-info
