# `make bench` and `make test` do everything on a fresh machine. By default they make a virtual environment in .venv;
# PYTHON=/path/to/python uses that interpreter as it is (nothing is fetched or installed into it; the package is built
# into .site).
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
# The torchvision of that torch, which timm needs. Its kernels may not load beside another build of torch, so it has a
# folder of its own, for the tests of timm alone.
VISION ?= torchvision==0.28.0 timm
BASE_PYTHON ?= python3
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
REPORT ?= bench-report
VERIFY_CASES ?= 60

SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

ifdef PYTHON
  SITE := $(CURDIR)/.site
  STAMP := $(SITE)/.stamp
  PY := PYTHONPATH="$(SITE)" PYTHONSAFEPATH=1 "$(PYTHON)"
  STAMP_SOURCES := $(SOURCES) $(shell find fastattn bench -name '*.py' -type f)
else
  STAMP := .venv/.stamp
  PY := .venv/bin/python
  STAMP_SOURCES := $(SOURCES)
endif
FASTATTN := $(PY) -m fastattn
# Idle workers take tests from busy ones: a few tests are processes of minutes.
PYTEST := $(PY) -m pytest -q -n $(JOBS) --dist worksteal
CMAKE_FLAGS := -G Ninja -DFASTATTN_TESTS=ON
# The CUDA kernels executed on the CPU, as a module for Python; torch carries pybind11's headers.
EMULATED_FLAGS = -DFASTATTN_MODULE=emulated -DFASTATTN_MODULE_DIR=$(CURDIR)/build/emulator -DFASTATTN_MODULE_FILE=_cuda.so \
  $(shell $(PY) -c 'import sysconfig, pathlib, torch; print("-DFASTATTN_PYTHON_INCLUDE=" + sysconfig.get_path("include"), \
  "-DFASTATTN_PYBIND11_INCLUDE=" + str(pathlib.Path(torch.__file__).parent / "include"))')

# The C++ tests link the CPU kernels that set-up compiled (none where set-up had no compiler or no ninja).
CPU_LIBRARY = $(wildcard build/native-$(shell $(PY) -c 'import sys; print(sys.implementation.cache_tag)')/libfastattn_cpu.a)
SHARED_FLAGS = -DFASTATTN_CPU_LIBRARY=$(abspath $(CPU_LIBRARY))

# cmake and ninja come with the interpreter's packages, or else from the system.
ifdef PYTHON
  export PATH := $(dir $(PYTHON)):$(PATH)
else
  export PATH := $(CURDIR)/.venv/bin:$(PATH)
endif

.PHONY: help setup test test-full test-triton cpp-test emulator sanitize race-check lint format bench demo clean

help:
	@echo "make bench      set up, build, verify, benchmark, train SimMIM on photographs; report in $(REPORT)/report.html"
	@echo "make test       set up, build, lint, C++ tests, Python tests"
	@echo "make test-full  the longer sweeps: random problems, sanitizers, slow tests"
	@echo "make test-triton  the long walks of the Triton kernels in Triton's interpreter"
	@echo "make emulator   the CUDA kernels for the CPU, as build/emulator/_cuda.so (FASTATTN_CUDA_LIBRARY)"
	@echo "make setup      only set up and build"
	@echo "make lint | format | clean"
	@echo "PYTHON=/path/to/python uses that interpreter as it is, for machines with no package index"

setup: $(STAMP)

ifdef PYTHON
$(STAMP): $(STAMP_SOURCES)
	rm -rf "$(SITE)"
	"$(PYTHON)" -m pip install --quiet --no-index --no-deps --no-build-isolation --target "$(SITE)" .
	touch $@
else
.venv/.torch:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fastattn needs Python >= 3.10; set BASE_PYTHON" >&2; exit 2; }
	@$(BASE_PYTHON) -m venv .venv || { echo "python3 -m venv failed: install your distribution's python3-venv package" >&2; exit 2; }
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet "$(TORCH)"
	touch $@

$(STAMP): .venv/.torch $(STAMP_SOURCES)
	.venv/bin/python -m pip install --quiet "$(TORCH)" --editable ".[test,bench,examples]"
	touch $@

.venv/.vision: .venv/.torch
	.venv/bin/python -m pip install --quiet --no-deps --target .venv/vision $(VISION)
	touch $@

test: .venv/.vision
endif

test: setup lint cpp-test
	$(PYTEST) tests

test-full: setup cpp-test sanitize race-check test-triton
	$(PYTEST) tests --full -m slow
	$(FASTATTN) verify --backend cpu --cases 400 --seed 1
	$(FASTATTN) verify --backend reference --cases 100 --seed 2

# The Triton kernels in Triton's interpreter, which is slow: their long walks, the contracts, random problems.
test-triton: setup
	TRITON_INTERPRET=1 $(PYTEST) tests/triton_kernels --full -m slow
	TRITON_INTERPRET=1 FASTATTN_TEST_BACKENDS=triton $(PYTEST) tests/test_contracts.py tests/test_varlen.py \
	  tests/test_additive.py tests/test_linear_loss.py
	$(FASTATTN) verify --backend triton --interpret --cases 10

# The C++ tests, and the CUDA kernels as a Python module that executes them on the CPU.
cpp-test: setup
	cmake -S . -B build/cpp-test $(CMAKE_FLAGS) $(EMULATED_FLAGS) $(SHARED_FLAGS)
	cmake --build build/cpp-test
	ctest --test-dir build/cpp-test --output-on-failure -j $(JOBS)

emulator: setup
	cmake -S . -B build/cpp-test $(CMAKE_FLAGS) $(EMULATED_FLAGS) $(SHARED_FLAGS)
	cmake --build build/cpp-test --target fastattn_module

sanitize: setup
	cmake -S . -B build/sanitize $(CMAKE_FLAGS) -DFASTATTN_MODULE=OFF -DFASTATTN_SANITIZE=ON
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure -j $(JOBS)

# The emulated CUDA kernels, with every access to memory watched for races.
race-check: setup
	cmake -S . -B build/race-check $(CMAKE_FLAGS) -DFASTATTN_MODULE=OFF -DFASTATTN_RACE_CHECK=ON
	cmake --build build/race-check --target cuda_tests
	ctest --test-dir build/race-check --output-on-failure -j $(JOBS) -L cuda

ifdef PYTHON
lint:
	@echo "lint: left out with PYTHON= (the interpreter is used as it is)"
else
lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy fastattn bench examples
endif

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup
	$(FASTATTN) info
	$(FASTATTN) verify --cases $(VERIFY_CASES)
	$(FASTATTN) bench all --quick --json $(REPORT)/results.jsonl --report $(REPORT)

demo: setup
	$(FASTATTN) demo

clean:
	rm -rf build dist .site .venv *.egg-info fastattn/*.so $(REPORT)
