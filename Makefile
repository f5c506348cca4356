# make demo: train the demo. make test: lint and test. Both install into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export AXOLOTL_DO_NOT_TRACK := 1
# Nothing is downloaded but packages.
export HF_HUB_OFFLINE := 1
# axolotl starts accelerate by its name.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test

# The demo's model is so small that a second thread gains little, and loses much where cores are shared.
demo: export OMP_NUM_THREADS := 1
demo: $(STAMP)
	$(BIN)/python -m demo.prepare
	$(BIN)/axolotl train example_configs/demo.yml
	$(BIN)/python -m demo.report

test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

$(STAMP): pyproject.toml | $(BIN)/python
# torch first: where the index has a CPU build, a machine without a GPU gets that one.
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
