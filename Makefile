# Every target sets up what it needs: a virtual environment, pinned requirements, the compiled extension.
# TORCH=2.13.0 does the same beside the CPU-only build of that version, in an environment of its own.
TORCH ?= 2.14.1
PYTHON ?= python3
VENV := $(if $(filter 2.14.1,$(TORCH)),.venv,.venv-$(TORCH))
BIN := $(VENV)/bin
# The tests are of the extension: not to have it is a failure here.
export T2V_FAST_REQUIRE_EXT := 1
# Each torch gets its own build folder, or switching between them would recompile everything.
export T2V_FAST_BUILD_DIR := build/torch-$(TORCH)

REQUIREMENTS := requirements/torch-$(TORCH).txt requirements/common.txt
BUILD_FILES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: setup demo pictures test slow weekly test-version coverage lint format bench peers benchmarks wheel clean

setup: $(VENV)/.built

$(VENV)/.installed: $(REQUIREMENTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --progress-bar off $(foreach file,$(REQUIREMENTS),-r $(file))
	touch $@

$(VENV)/.built: $(VENV)/.installed $(BUILD_FILES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m t2v_fast.cli info
	touch $@

demo: setup
	$(BIN)/t2v-fast demo --output demo

pictures: demo
	cp demo/heatmap.png demo/tasks.png docs/

test: setup
	$(BIN)/python -m pytest -m "not slow and not weekly"

slow: setup $(VENV)/.coverage
	$(BIN)/python -m pytest -m slow

# What takes many minutes and depends on the sources of the GPU kernels only. Last run: 2026-11-29, 3 passed in 5:26.
weekly: setup
	$(BIN)/python -m pytest -m weekly

# For a second torch. Left out are files, processes, pages and distances, which reach torch through calls that the other
# tests make too, and the scripts of bench/, which measure beside the first torch only. What is not named here runs.
VERSION_INDEPENDENT := analysis bank bench ops/test_gpu_specs.py tasks/test_cache.py test_demo.py test_embedding.py \
	test_readme.py test_docs.py test_examples.py

test-version: setup
	$(BIN)/python -m pytest -m "not slow and not weekly" $(VERSION_INDEPENDENT:%=--ignore=tests/%)

$(VENV)/.coverage: $(VENV)/.installed requirements/coverage.txt
	$(BIN)/python -m pip install --quiet --progress-bar off --no-deps -r requirements/coverage.txt
	touch $@

# Hundreds of networks, for an hour; goes on where it was interrupted.
coverage: setup $(VENV)/.coverage
	$(BIN)/python -m bench.studies.coverage_study --resume --output docs/coverage.md

.PHONY: docs
docs: setup ## Build the documentation as a site in build/docs; every warning is an error
	$(BIN)/python -m pip install --quiet --progress-bar off -r requirements/docs.txt
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

RESULTS := build/bench
BENCH := mkdir -p $(RESULTS) && $(BIN)/python -m pytest --benchmark-quiet

# The table of the performance contract.
bench: setup
	$(BENCH) bench/suites/test_fisher.py -m contract -k "resnet18 or resnet50 or convnext" --benchmark-json $(RESULTS)/contract.json
	$(BIN)/python -m bench.report $(RESULTS)/contract.json

peers: setup
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/peers.txt

# Everything, for hours: a suite at a time, so that one's results outlive another's crash.
benchmarks: peers
	for suite in memory stream fisher; do \
		$(BENCH) bench/suites/test_$$suite.py -k "not toy" --benchmark-json $(RESULTS)/$$suite.json || exit 1; done
	$(BIN)/python -m bench.report $(RESULTS)/memory.json $(RESULTS)/stream.json $(RESULTS)/fisher.json --plots $(RESULTS)/plots > $(RESULTS)/report.md

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu')

wheel: setup
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist demo *.egg-info t2v_fast/*.so
