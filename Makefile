# Every target makes .venv by itself, from an empty clone.
#   make PYTHON=python3.12 ...                                                      another interpreter
#   make PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' ...     Linux without a GPU: a small PyTorch
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready
QUICK := not slow and not oracle and not weights and not gpu

.PHONY: help demo test test-all check bench numbers wheel
.DEFAULT_GOAL := help

help:
	@echo 'make demo       ask nano, the model in this repository, about the pictures in examples/images'
	@echo 'make test       the quick tests'
	@echo 'make test-all   all tests that can run here'
	@echo 'make check      format, lint and types'
	@echo 'make bench      time nano, and the 0.5B model with random weights, on this machine'
	@echo 'make numbers    measure nano on 1,000 new pictures a task'
	@echo 'make wheel      build the wheel into dist/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): expected Python 3.11 or newer, got $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12" >&2; exit 2; }
	@echo 'making .venv with the versions of constraints.txt; this takes a minute or more'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/predict.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadgroup -m '$(QUICK)'

test-all: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadgroup

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/latency.py

numbers: $(READY)
	$(BIN)/fastvlm data assets
	$(BIN)/fastvlm eval --tasks nano --output benchmarks/results/nano.json

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation
