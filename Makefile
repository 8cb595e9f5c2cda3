# make demo · make test · make bench · make lint: each sets up .venv first, once.
# A torch of your own:  make test VENV=/path/to/env CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(VENV)/.fused_adamw

.PHONY: demo test bench lint format clean

demo: $(READY)
	$(BIN)/python -m bench demo

test: $(READY)
	$(BIN)/python -m pytest

bench: $(READY)
	$(BIN)/python -m bench step

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

clean:
	rm -rf build *.egg-info fused_adamw/*.so

# torch first: the extension is built against the torch it will run beside.
$(READY): setup.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch numpy setuptools wheel ninja
	FUSED_ADAMW_CPU=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $(READY)
