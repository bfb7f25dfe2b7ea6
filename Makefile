# Everything sets itself up: a virtual environment in .venv with the package and what the target needs.
PYTHON ?= python3
DATA ?= digits
OUT ?= demo_output
RESULTS ?= examples/benchmarks/results
ARTEFACTS ?= demo_output
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
THREADS ?= 2

.PHONY: help demo test check docs slow gpu-evidence clean
help: ## say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'error: Python 3.10 or newer is needed; say which: make PYTHON=python3.11'; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo 'error: cannot make a virtual environment; install the venv module of $(PYTHON)'; exit 2; }
	$(INSTALL) --editable '.[test,docs]'
	touch $@

demo: $(VENV)/installed ## train, prune with every method, export, check, measure (DATA=digits|cifar10:ROOT|imagefolder:PATH)
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python examples/demo.py --data '$(DATA)' --out '$(OUT)'

check: $(VENV)/installed ## lint, types, layer contracts: fast
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check docs ## everything that must hold before a change lands
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

slow: $(VENV)/installed ## the long suites
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow

docs: $(VENV)/installed ## build the documentation; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

gpu-evidence: ## on a GPU machine: dense and pruned on torch and ONNX Runtime CUDA/TensorRT, resumable
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) examples/benchmarks/gpu_evidence.py --artefacts '$(ARTEFACTS)' --results '$(RESULTS)'
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) examples/benchmarks/macs_and_latency.py '$(RESULTS)/macs_and_latency_gpu.jsonl' \
		--on onnxruntime-cuda --on onnxruntime-tensorrt --batch 1 --batch 8 --batch 32 --batch 128 --precision fp32 --precision fp16
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) examples/benchmarks/latency_targets.py '$(RESULTS)/latency_targets_gpu.jsonl' \
		--on onnxruntime-cuda --batch 32

clean: ## remove everything that the targets made
	rm -rf $(VENV) $(OUT) docs/_build build dist *.egg-info
