# Every word sets up what it needs: on a bare clone `make demo` or `make test` is the only command to type.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
DEMO_CONFIG ?= examples/demo.yaml
DEMO_ARGS ?=
RECIPE_CONFIG ?= examples/recipe.yaml
RECIPE_ARGS ?=
BENCH_ARGS ?=
NVFP4_ARGS ?=
LOCK_ARGS ?=

.DEFAULT_GOAL := help
# The tools of the ablations take settings; which stages are run anew, or not yet, is said to `make recipe`.
ifneq (,$(filter recipe-ablations,$(MAKECMDGOALS)))
ifneq (,$(filter --from% --until%,$(RECIPE_ARGS)))
$(error recipe-ablations takes settings alone in RECIPE_ARGS = $(RECIPE_ARGS); run "make recipe" with --from or --until first)
endif
endif
.PHONY: help install lint test test-slow controls demo recipe recipe-ablations bench bench-kernels nvfp4-training lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## .venv with the locked packages and this one; does nothing when that is done

$(STAMP): requirements.lock setup.py pyproject.toml .python-version
	@if [ ! -x $(BIN)/python ]; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || { \
	    echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>&1); megatron-core 0.19 and requirements.lock need Python 3.12." >&2; \
	    echo "Install it ('pyenv install 3.12', 'uv python install 3.12') or name it: PYTHON=/path/to/python3.12" >&2; \
	    exit 1; }; \
	  $(PYTHON) -m venv $(VENV); fi
	@echo "installing the locked packages into $(VENV) (minutes, once)"
	$(PIP) --quiet --require-hashes -r requirements.lock
	$(PIP) --quiet --no-deps --no-build-isolation -e .
	@touch $@

lint: $(STAMP) ## ruff, pyright and codespell
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell --toml pyproject.toml $$(git ls-files)

test: $(STAMP) ## the tests of a machine without a GPU
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP) ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu"

controls: demo ## the demo, then its controls: rotated teachers, learning rate 0, shuffled advantages
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 tools/demo_controls.py $(DEMO_CONFIG) $(DEMO_ARGS)

demo: $(STAMP) ## three specialists merged into one student on 2 CPU cores; DEMO_ARGS="parallel.tensor=2" changes settings
	$(BIN)/python -m megatron_mopd.recipe $(DEMO_CONFIG) $(DEMO_ARGS)

recipe: $(STAMP) ## SFT, warm-up, two MOPD iterations, MTP boosting, NVFP4, report: 2 CPU cores; RECIPE_ARGS="--from mopd2"
	$(BIN)/python -m megatron_mopd.recipe $(RECIPE_CONFIG) $(RECIPE_ARGS)

recipe-ablations: recipe ## what its warm-up, its boosting (3 seeds) and old rollouts change; then its report again
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 tools/recipe_ablations.py $(RECIPE_CONFIG) $(RECIPE_ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python tools/staleness.py $(RECIPE_CONFIG) $(RECIPE_ARGS)
	$(BIN)/python -m megatron_mopd.recipe $(RECIPE_CONFIG) $(RECIPE_ARGS)

nvfp4-training: $(STAMP) ## does training towards a quantized student pay: 3 seeds with and without, on 2 CPU cores
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=2 tools/nvfp4_training.py examples/nvfp4_training.yaml $(NVFP4_ARGS)

bench: $(STAMP) ## one MOPD step against the same step on Hugging Face NemotronH, as ratios
	OMP_NUM_THREADS=1 $(BIN)/python tools/bench_step.py

bench-kernels: $(STAMP) ## the kernels against their peers on a GPU; BENCH_ARGS="--device cpu" for ratios without one
	$(BIN)/python tools/bench_kernels.py $(BENCH_ARGS)

# No index address, host or path may get into the lock, so this machine's pip settings are left out.
lock: ## solve requirements.lock; versions that still fit are kept, LOCK_ARGS=--upgrade moves all
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet pip-tools==7.6.2
	env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL -u PIP_INDEX_URL PIP_CONFIG_FILE=/dev/null build/lock/bin/pip-compile \
	  --quiet --generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate --no-emit-options \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --constraint constraints.txt --extra train --extra dev --output-file requirements.lock $(LOCK_ARGS) setup.py
	sed -i '/^#/d; /^$$/d' requirements.lock
	rm -rf build/lock

clean: ## remove caches and build output; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
