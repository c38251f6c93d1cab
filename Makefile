# Every target makes .venv by itself, from an empty clone.
#   make PYTHON=python3.12 ...                                                      another interpreter
#   make PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu' ...     Linux without a GPU: a small PyTorch
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := .venv/.extras
# make RIVAL_PYTHON=/path/to/python bench      also beside others: an interpreter with torch, transformers 5 and timm
RIVAL_PYTHON ?=
BENCH := $(BIN)/fastvlm bench
KEEP := --output benchmarks/results
QUICK := not slow and not oracle and not weights and not gpu

.PHONY: help demo test test-all check bench numbers wheel
.DEFAULT_GOAL := help

help:
	@echo 'make demo       ask nano, the model in this repository, about the pictures in examples/images'
	@echo 'make test       the quick tests'
	@echo 'make test-all   all tests that can run here'
	@echo 'make check      format, lint and types'
	@echo 'make bench      time nano, and the 0.5B model with random weights, on this machine (docs/benchmarks.md)'
	@echo 'make numbers    measure nano on 2,000 new pictures a task; write the tables of docs/benchmarks.md'
	@echo 'make wheel      build the wheel into dist/'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON): expected Python 3.11 or newer, got $$($(PYTHON) -V 2>&1); try make PYTHON=python3.12" >&2; exit 2; }
	@echo 'making .venv with the versions of constraints.txt; this takes a minute or more'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

# What the extras need, so that their tests run, too.
$(EXTRAS): $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt \
		-e '.[dev,train,onnx,openvino,coreml,gguf]'
	@touch $@

demo: $(READY)
	@$(BIN)/python examples/predict.py

# A worker process for each core, so each computes with one thread.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m '$(QUICK)'

test-all: $(EXTRAS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BENCH) roofline --model 0.5b $(KEEP)
	$(BENCH) latency --rounds 3 $(KEEP)
	$(BENCH) latency --model 0.5b --rounds 3 $(KEEP)
	$(BENCH) throughput --model 0.5b --rounds 1 $(KEEP)
ifneq ($(RIVAL_PYTHON),)
	$(BENCH) peers --rival-python $(RIVAL_PYTHON) --rival-compile --rounds 3 --llava-rounds 1 $(KEEP)
	$(BENCH) paper --rival-python $(RIVAL_PYTHON) --rounds 2 $(KEEP)
	$(BENCH) plot "$$(ls -t benchmarks/results/paper-*.json | head -n 1)" --out docs/accuracy-against-ttft
endif
	$(BIN)/python benchmarks/tables.py

numbers: $(READY)
	$(BIN)/fastvlm data assets
	$(BIN)/fastvlm eval --tasks nano --num-samples 2000 --output benchmarks/results/nano.json
	$(BIN)/python benchmarks/tables.py

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation
