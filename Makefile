# make demo · make test · make quick · make test-integrations · make bench · make docs · make lint: each sets up .venv first, once.
# make sanitize: the tests that run csrc, under gcc's AddressSanitizer and UndefinedBehaviorSanitizer.
# make clang · make arm64: csrc built by clang, and for arm64, where an emulator runs it.
# make resolve · make test-versions · make wheel · make cuda-check: about installing it elsewhere.
# A torch of your own:  make test VENV=/path/to/env CONSTRAINTS=/dev/null
# The Python at hand, without an environment and without network (demo, test, quick, bench):  make test VENV= PYTHON=python3
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
READY := $(if $(VENV),$(VENV)/.fused_adamw,build/.ready)
RUN := $(if $(VENV),$(BIN)/python,$(PYTHON))

# Processes that share the CPUs, a file of tests each; threads that spin would wait for threads that cannot run.
XDIST = $(shell $(RUN) -c 'import xdist' 2> /dev/null && echo '-n auto --dist loadfile --no-loadscope-reorder')
PYTEST = OMP_WAIT_POLICY=passive $(RUN) -m pytest $(XDIST)

# With make sanitize: the flags, and the tests. Those that start compilers are not among them, nor most of the
# reference backend's, which reaches csrc through the watch alone.
SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS -g1
SANITIZED ?= $(addprefix tests/test_,checkpoints.py clipping.py formats.py launch.py plan.py state.py step_cpu.py \
    stateful.py step_parameter.py torch_inputs.py watch.py watch_threads.py)

# With make clang and make arm64.
ELSEWHERE := tests/test_step_cpu.py tests/test_formats.py

# With make cuda-check; any CUDA build of torch whose major version of CUDA is that of nvcc.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV ?= .venv-cuda
CUDA_BIN = $(abspath $(CUDA_VENV))/bin

# With make resolve and make test-versions: what pyproject.toml promises.
PYTHONS ?= 3.10 3.11 3.12 3.13
PLATFORMS ?= x86_64-manylinux_2_28 aarch64-manylinux_2_28
TORCHES ?= 2.8.0@3.10 2.9.1@3.11 2.10.0@3.12 2.11.0@3.12 2.12.1@3.13 2.13.0@3.10 2.14.1@3.13 2.15.0@3.13
INDEX_ALONE := env -u UV_INDEX -u UV_INDEX_URL -u UV_DEFAULT_INDEX -u UV_EXTRA_INDEX_URL -u UV_FIND_LINKS -u UV_CONSTRAINT

.PHONY: demo test quick sanitize clang arm64 test-integrations bench docs gpu lint format clean cuda-check resolve test-versions wheel

demo: $(READY)
	$(RUN) -m bench demo

test: $(READY)
	$(PYTEST)

# Without what takes more than two seconds a test, and without the emulator of PTX, where there is one.
quick: $(READY)
	$(PYTEST) -m "not slow and not emulator"

# In a copy of the tree, whose extension is built for it; needs gcc. Python itself is not: the sanitizers are loaded before it,
# and what it keeps to its end is no leak of ours. They write to the standard error, which pytest leaves alone here.
sanitize: RUN := $(if $(VENV),$(abspath $(BIN))/python,$(PYTHON))
sanitize: build/sanitize/.ready
	git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C build/sanitize
	cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(PYTEST) --capture=sys \
	    -k "not cpu-reference or test_stateful or test_watch" $(SANITIZED)

# In a copy of the tree; needs clang and libomp-dev. Where there is no AVX-512, the loops for it are compiled all the same.
clang: RUN := $(if $(VENV),$(abspath $(BIN))/python,$(PYTHON))
clang: $(READY)
	rm -rf build/clang
	mkdir -p build/clang
	git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C build/clang
	cd build/clang && CC=clang CXX=clang++ FUSED_ADAMW_CUDA=0 $(RUN) -m fused_adamw build --force
	cd build/clang && $(PYTEST) -m "not slow" $(ELSEWHERE)

# On Debian; needs g++-aarch64-linux-gnu and qemu-user. The environment is kept in ARM64.
ARM64 ?= build/arm64
arm64: $(READY)
	PYTHON=$(RUN) UV=$(BIN)/uv ARM64=$(ARM64) .ci/arm64 $(ELSEWHERE)

# What the frameworks themselves warn of is not an error of ours.
test-integrations: $(VENV)/.integrations
	$(BIN)/python -m pytest -W default tests/integrations docs/integrations

bench: $(READY)
	$(RUN) -m bench step

# The site, into build/site; needs Python 3.11.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# On a machine with a GPU, with the Python at hand: no environment, no network. ARGS="--minutes 5 --stages build parity"
gpu:
	$(PYTHON) -m bench gpu $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* bench/csrc/*
	$(BIN)/mypy

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
	cd build/cuda && $(CUDA_BIN)/python -m pytest -q -m "not slow" tests/test_backends.py tests/test_step_cpu.py

# Whether the package index alone, without wheels or indexes of this machine, has what the pins ask for. Installs nothing.
resolve: $(READY)
	@for platform in $(PLATFORMS); do for python in $(PYTHONS); do \
	    found=$$($(INDEX_ALONE) $(BIN)/uv --no-config pip compile --quiet --no-header --no-annotate --all-extras \
	        -c constraints.txt --python-version $$python --python-platform $$platform pyproject.toml) || exit 1; \
	    echo "Python $$python, $$platform: $$(echo "$$found" | wc -l) packages," $$(echo "$$found" | grep -E '^(torch|triton)=='); \
	done; done

# One after the other, each in an environment of its own (3 to 7 GB, removed after it); TESTS=tests runs the whole suite.
test-versions: $(READY)
	UV=$(BIN)/uv .ci/test-versions $(TORCHES)

# A wheel with the extension, for the torch in .venv, of which its version tells: fused_adamw-0.1.0+torch2.13-cp311-...
wheel: $(READY)
	rm -rf build/lib.* build/bdist.*
	FUSED_ADAMW_CPU=1 $(BIN)/python setup.py -q \
	    egg_info -b "+torch$$($(BIN)/python -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))')" bdist_wheel
	ls dist/*.whl

clean:
	rm -rf build dist *.egg-info fused_adamw/_C.*

build/.ready: fused_adamw/build.py $(wildcard csrc/*)
	FUSED_ADAMW_CPU=1 $(PYTHON) -m fused_adamw build
	mkdir -p build
	touch $@

build/sanitize/.ready: $(READY) fused_adamw/build.py $(wildcard csrc/*)
	rm -rf build/sanitize
	mkdir -p build/sanitize
	git ls-files -co --exclude-standard | tar -cf - -T - | tar -xf - -C build/sanitize
	cd build/sanitize && CC=gcc CXX=g++ CFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" FUSED_ADAMW_CUDA=0 \
	    $(RUN) -m fused_adamw build --force
	grep -q __asan_init build/sanitize/fused_adamw/_C.*.so
	touch $@

# torch first: the extension is built against the torch it will run beside.
$(VENV)/.fused_adamw: setup.py fused_adamw/build.py pyproject.toml $(CONSTRAINTS) $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch numpy setuptools ninja
	FUSED_ADAMW_CPU=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

$(VENV)/.integrations: $(READY)
	FUSED_ADAMW_CPU=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[integrations]'
	touch $@

$(VENV)/.docs: $(READY)
	FUSED_ADAMW_CPU=1 $(BIN)/pip install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[docs]'
	touch $@
