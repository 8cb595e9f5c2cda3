# make demo · make test · make test-integrations · make bench · make lint: each sets up .venv first, once.
# A torch of your own:  make test VENV=/path/to/env CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.fused_adamw

# With make cuda-check; any CUDA build of torch whose major version of CUDA is that of nvcc.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_BIN = $(abspath $(CUDA_VENV))/bin

.PHONY: demo test test-integrations bench lint format clean cuda-check

demo: $(READY)
	$(BIN)/python -m bench demo

test: $(READY)
	$(BIN)/python -m pytest

# What the frameworks themselves warn of is not an error of ours.
test-integrations: $(VENV)/.integrations
	$(BIN)/python -m pytest -W default tests/integrations

bench: $(READY)
	$(BIN)/python -m bench step

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* bench/csrc/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/* bench/csrc/*

# Builds the extension with its CUDA part, from a copy of the tree, in an environment of its own; needs nvcc, no GPU.
cuda-check:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/pip install --quiet $(CUDA_TORCH) numpy setuptools wheel ninja pytest
	mkdir -p build/cuda
	git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C build/cuda
	cd build/cuda && FUSED_ADAMW_CPU=1 FUSED_ADAMW_CUDA=1 $(CUDA_BIN)/pip install --no-build-isolation --no-deps -v -e . \
	    > build.log 2>&1 || { tail -40 build.log; exit 1; }
	grep '  fused_adamw: ' build/cuda/build.log
	cd build/cuda && $(CUDA_BIN)/python -m fused_adamw
	cd build/cuda && $(CUDA_BIN)/python -m pytest -q tests/test_backends.py tests/test_step_cpu.py

clean:
	rm -rf build *.egg-info fused_adamw/*.so

# torch first: the extension is built against the torch it will run beside.
$(READY): setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch numpy setuptools wheel ninja
	FUSED_ADAMW_CPU=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $(READY)

$(VENV)/.integrations: $(READY)
	FUSED_ADAMW_CPU=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[integrations]'
	touch $@
