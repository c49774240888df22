# make train    environment, build, then MobileNet on the built-in images; ARGS="--data DIR ..." for your own
# make test     environment, build, then the tests; ARGS="-k depthwise" for some, TEST_JOBS=0 in one process
# make test-avx512    the AVX-512 kernels, emulated, on any x86-64 CPU (Debian; root for apt, the first time)
# make test-arm    cross-compiles for aarch64 and tests that under emulation (x86-64 Debian; root for apt, the first time)
# make lint     what CI of a pull request would complain about;  make format mends what a tool can mend
# make test-gpu    on a machine with a GPU, a PyTorch of its own and nvcc, no network: builds in place, tests ops on the GPU
# make bench-gpu    there, too: the GPU's benchmark, resumable; rows in benchmarks/results; ARGS="--seconds 500"
# make bench-guard    has anything become slower than the committed rows say?
# make clean    removes the environment and what was built
#
# PYTHON=python3.12 chooses the interpreter, TORCH=2.10.0 the PyTorch, PIP_ARGS="--extra-index-url ..." where it is from.
PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
PIP_ARGS ?=
ARGS ?=
# A file's tests stay in one process, so that what they share is made once; tests/conftest.py says which files come first.
TEST_JOBS ?= auto
PYTEST := -m pytest -q -rs -n $(TEST_JOBS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
ENVIRONMENT := $(VENV)/torch-$(TORCH).stamp
BUILD := $(VENV)/build-$(TORCH).stamp
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)


.PHONY: train test test-avx512 test-arm test-gpu bench-gpu build-gpu bench-guard build lint format clean

train: build
	$(BIN)/python -m mnops train --overwrite $(ARGS)

test: build
	$(BIN)/python $(PYTEST) tests $(ARGS)

test-avx512: build
	VENV=$(VENV) tools/avx512/test.sh $(ARGS)

test-arm:
	PIP_ARGS="$(PIP_ARGS)" tools/arm/test.sh $(ARGS)

# The PyTorch that $(PYTHON) has, and nothing downloaded.
build-gpu:
	@$(PYTHON) tools/gpu/here.py
	PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin" MNOPS_CUDA=ON $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m mnops info

test-gpu: build-gpu
	PYTHON=$(PYTHON) tools/gpu/test.sh $(ARGS)

bench-gpu: build-gpu
	$(PYTHON) -m mnops bench all --device cuda $(ARGS)

bench-guard: build
	$(PIP) install $(PIP_ARGS) -r requirements-bench.txt
	$(BIN)/python -m mnops bench guard $(ARGS)

build: $(BUILD)

# Only the stamps of the PyTorch that is installed are kept, so that going back to another one installs it again.
$(ENVIRONMENT): requirements.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/*.stamp
	$(PIP) install $(PIP_ARGS) torch==$(TORCH) -r requirements.txt
	$(PIP) install $(PIP_ARGS) --no-deps -r requirements-models.txt
	touch $@

$(BUILD): $(ENVIRONMENT) $(NATIVE)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

$(BIN)/ruff: requirements-lint.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_ARGS) -r requirements-lint.txt
	touch $@

CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

lint: $(BIN)/ruff
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/typos

format: $(BIN)/ruff
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info
	find mnops -name '*.so' -delete
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
