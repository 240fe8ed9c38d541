# Every target sets up what it needs: a virtual environment, pinned requirements, the compiled extension.
# TORCH=2.11.0 does the same with that version, in a separate environment. The extension is compiled once for all.
TORCH ?= 2.14.1
PYTHON ?= python3
VENV := $(if $(filter 2.14.1,$(TORCH)),.venv,.venv-$(TORCH))
BIN := $(VENV)/bin
# The tests need the extension, so that a build without it must fail.
export T2V_FAST_REQUIRE_EXT := 1
# The tests refuse to run beside another torch: a package that wants a newer one would replace it without a word.
export T2V_FAST_REQUIRE_TORCH := $(TORCH)
# Each torch gets its own build folder, or switching between them would recompile everything.
export T2V_FAST_BUILD_DIR := build/torch-$(TORCH)

REQUIREMENTS := requirements/torch-$(TORCH).txt requirements/common.txt
# Tests run in as many processes as there are cores, eight at most, with one thread each (tests/conftest.py).
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -p no:benchmark

BUILD_FILES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: help setup demo pictures docs-data test slow apart weekly test-version coverage lint format bench peers \
	benchmarks wheels audit test-matrix clean
.DEFAULT_GOAL := help

help: ## Print the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1 | \2/p' $(MAKEFILE_LIST) | awk -F' [|] ' '{ printf "%-14s %s\n", $$1, $$2 }'

setup: $(VENV)/.built ## Install everything into .venv and compile the extension

$(VENV)/.installed: $(REQUIREMENTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off $(REQUIREMENTS:%=-r %)
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_FILES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m t2v_fast.cli info
	touch $@

ifneq ($(VENV),.venv)
export T2V_FAST_REUSE := 1
$(VENV)/.built: .venv/.built

.venv/.built: $(BUILD_FILES)
	$(MAKE) setup TORCH=2.14.1 T2V_FAST_REUSE=0 T2V_FAST_BUILD_DIR=build/torch-2.14.1
endif

demo: setup ## Embed the demo's tasks and draw their distances into demo/
	$(BIN)/t2v-fast demo --output demo

pictures: demo ## Copy the demo's pictures into docs/
	cp demo/heatmap.png demo/tasks.png docs/

# Each command replaces its own table or picture. Tests write none of them.
docs-data: pictures coverage ## Regenerate the tables and pictures in docs/ that commands write (hours)
	$(BIN)/python tests/helpers/resources.py
	$(BIN)/python -m bench.studies.roofline --write docs/gpu.md
	$(BIN)/python -m bench.gpu.page --write docs/gpu.md
	$(BIN)/python -m bench.studies.host_work --write docs/gpu.md
	$(BIN)/python -m bench.studies.gpu_model --write docs/gpu.md
	$(BIN)/python -m bench.studies.adapters --write docs/adapters.md
	$(BIN)/python -m bench.studies.merging --write docs/adapters.md
	$(BIN)/python -m bench.studies.accuracy --tasks 4 --size 64 --plot docs/accuracy.png
	$(BIN)/python -m bench.studies.selection --write docs/selection.md
	$(BIN)/python -m bench.studies.claims --write docs/selection.md
	$(BIN)/python -m bench.studies.baseline --write docs/selection.md
	npm install --prefix build/emoji emoji-datasource-apple@16.0.0 emoji-datasource-facebook@16.0.0 \
		emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
	$(BIN)/python -m bench.studies.similarity --write docs/selection.md --guide docs/guide/distances.md --readme README.md
	$(BIN)/python -m bench.studies.label_only --write docs/selection.md --picture docs/labels.png

test: setup ## Run the tests that end within minutes, and the examples in docstrings
	$(PYTEST) -m "not slow and not weekly"

slow: setup $(VENV)/.coverage $(VENV)/.frontends ## Run the tests that are too long for `make test`
	$(PYTEST) -m slow

# mml-core brings a plugin for pytest, and axolotl pins other packages, so each is in a folder of its own. To install both
# may take some minutes. Last run: 2026-11-29, passed.
apart: setup $(VENV)/.frontends $(VENV)/apart/mml $(VENV)/apart/axolotl ## Run the tests against mml-similarity and axolotl
	PYTHONPATH=$(VENV)/apart/mml $(BIN)/python -m pytest -p no:benchmark -p no:mml-test-utils -m slow \
		tests/adapters/test_mml_package.py
	PYTHONPATH=$(VENV)/apart/axolotl $(BIN)/python -m pytest -p no:benchmark -m slow tests/adapters/test_peft.py -k axolotl

# These tests take many minutes, and depend on few sources: the GPU kernels, and the files of a bank. A change of those
# needs them at once. Last run: 2026-11-29. That the CUDA library is built and loaded and a bank's crash after any operation
# passed. So did the sanitizers and the machine code of the CUDA sources, before the last changes there. Triton's two were
# not finished on a busy machine. The geometries and dtypes of the emulated CUDA sources and of the Triton kernels in the
# interpreter, which became weekly tests then, passed on 2026-11-30. The bank's crashes passed again on 2026-12-01.
weekly: setup ## Run the GPU kernels on every geometry and under sanitizers, compile them, and crash a bank at any operation
	$(PYTEST) -m weekly

# The tests that a second torch need not run. Files, processes, pages, distances, settings, commands and the adapters of
# other packages reach torch only through calls that the tests of ops, gradients and estimation make too. The scripts of
# bench/ measure with the first torch only, and the mutation tests break the library to try the tests. Every order of the
# emulated CUDA sources needs no second torch either: test_ops.py runs them with it. Not named here, and so run, is also what
# follows from torch itself: heads, probes, pipelines, processes and the cut of a network.
VERSION_INDEPENDENT := adapters analysis bank bench cli gradients/test_mutations.py gradients/test_ownership_mutations.py \
	ops/test_cuda.py ops/test_gpu_specs.py tasks/test_cache.py tasks/test_data.py tasks/test_settings.py test_demo.py \
	test_docs.py test_embedding.py test_examples.py test_public_names.py test_readme.py test_recipe.py test_zoo.py

test-version: setup ## Run the tests that depend on torch; TORCH=2.11.0 takes that version
	$(PYTEST) -m "not slow and not weekly" $(VERSION_INDEPENDENT:%=--ignore=tests/%)

$(VENV)/.coverage $(VENV)/.frontends: $(VENV)/.%: $(VENV)/.installed requirements/%.txt
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps -r requirements/$*.txt
	touch $@

$(VENV)/apart/%: requirements/%.txt $(VENV)/.installed
	rm -rf $@
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps --target $@ -r $<

# Hundreds of networks take an hour. After an interruption, the same command continues.
coverage: setup $(VENV)/.coverage ## Check hundreds of networks against plain autograd into docs/coverage.md
	$(BIN)/python -m bench.studies.coverage_study --resume --output docs/coverage.md

.PHONY: docs
docs: setup ## Build the documentation as a site in build/docs; every warning is an error
	$(BIN)/python -m pip install --quiet --progress-bar off -r requirements/docs.txt
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

RESULTS := build/bench
BENCH := mkdir -p $(RESULTS) && $(BIN)/python -m pytest --benchmark-quiet

bench: setup ## Measure the table of the performance contract
	$(BENCH) bench/suites/test_fisher.py -m contract -k "resnet18 or resnet50 or convnext" --benchmark-json $(RESULTS)/contract.json
	$(BIN)/python -m bench.report $(RESULTS)/contract.json

peers: setup ## Install the libraries that bench/ compares with
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/peers.txt

# Each suite runs alone, so that its results are kept if another one crashes.
benchmarks: peers ## Measure everything, next to other libraries (hours)
	for suite in memory stream fisher; do \
		$(BENCH) bench/suites/test_$$suite.py -k "not toy" --benchmark-json $(RESULTS)/$$suite.json || exit 1; done
	$(BIN)/python -m bench.report $(RESULTS)/memory.json $(RESULTS)/stream.json $(RESULTS)/fisher.json --plots $(RESULTS)/plots > $(RESULTS)/report.md

CPP_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

lint: $(VENV)/.installed ## Check style, imports between sub-packages, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	PYTHONPATH=. $(BIN)/lint-imports
	$(BIN)/mypy

format: $(VENV)/.installed ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

$(VENV)/.wheels: $(VENV)/.installed requirements/wheels.txt
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps -r requirements/wheels.txt
	touch $@

audit: setup $(VENV)/.wheels ## Check that the compiled libraries use only the stable interface of LibTorch
	$(BIN)/torch-abi-audit --check torch t2v_fast/libt2v_*.so

# One wheel for every Python and torch from 2.10 on. CUDA=1 adds the CUDA library, which needs nvcc. For another
# processor, as with ARCH=aarch64, the build needs the cross-compiler aarch64-linux-gnu-g++.
ARCH ?= $(shell uname -m)
ifneq ($(ARCH),$(shell uname -m))
CROSS := T2V_FAST_BUILD_DIR=build/$(ARCH) _PYTHON_HOST_PLATFORM=linux-$(ARCH) CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux \
	-DCMAKE_SYSTEM_PROCESSOR=$(ARCH) -DCMAKE_CXX_COMPILER=$(ARCH)-linux-gnu-g++"
PLATFORM := auto  # auditwheel knows other names only for this machine's processor
else
PLATFORM := manylinux_2_28_$(ARCH)
endif
CUDA := 0
ifeq ($(CUDA),1)
ifdef CROSS
$(error CUDA=1 builds for the processor of this machine, $(shell uname -m), and not for ARCH=$(ARCH))
endif
DIST := dist/cuda
PLATFORM := auto  # the static CUDA runtime takes what it needs from this machine's glibc
else
DIST := dist
endif
wheels: $(DIST)/.$(ARCH) ## Build the manylinux wheel and the source distribution into dist/; also for ARCH=aarch64, or with CUDA=1

$(DIST)/.$(ARCH): $(BUILD_FILES) $(shell find t2v_fast kernels -name '*.py') | setup $(VENV)/.wheels
	rm -rf build/wheel build/lib* build/bdist*  # what an earlier build left there would get into the wheel
	rm -f $(DIST)/*_$(ARCH).whl $(DIST)/*.tar.gz
	$(CROSS) T2V_FAST_CUDA=$(CUDA) $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --plat $(PLATFORM) --exclude 'libtorch*.so' \
		--exclude 'libc10*.so' --wheel-dir $(DIST) build/wheel/*.whl
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('$(DIST)')" > /dev/null
	ls -l $(DIST)
	touch $@

# A new wheel is made only where a source has changed, so that an interrupted run continues with the one that it began with.
test-matrix: wheels ## Test the wheel with five releases of Python, and write the table of versions
	$(BIN)/python tests/helpers/install_matrix.py dist/*_$(ARCH).whl --discard --table

clean: ## Remove what was built
	rm -rf build dist demo *.egg-info t2v_fast/*.so
