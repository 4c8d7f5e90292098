# `make` alone lists what there is. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3
WORKERS ?= auto
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := harness models tasks baselines
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
DEMO := --name demo --existing replace-stale --limit 16 --batch-size 8 --budgets 0.3 0.2 0.1 \
	--tasks tiny_docvqa_val tiny_chartqa tiny_textvqa_val tiny_pope tiny_mme tiny_scienceqa_img \
	tiny_mvbench_moving_direction \
	--methods visionselector visionzip divprune random uniform downsample

.DEFAULT_GOAL := help
.PHONY: help install demo test test-lowest test-newest lint types docs bundle lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 20
	@echo "PYTHON=python3.12 chooses the Python that $(VENV) is made with (3.11 or newer)."

install: $(STAMP)  ## make .venv from requirements.lock, with this package editable (instant when up to date)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is not: give one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: install  ## sweep 7 compressors x 3 budgets over the embedded benchmarks and print the leaderboard
	$(BIN)/python run_eval.py sweep $(DEMO)

test: install lint  ## lint, then all tests, on all cores (WORKERS=2 for two of them)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

test-lowest: install  ## the tests marked `versions` with the oldest dependencies admitted, on the oldest Python here
	$(BIN)/python .ci/versions.py lowest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

test-newest: install  ## the same with the newest dependencies admitted, on the newest Python here
	$(BIN)/python .ci/versions.py newest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal

lint: types  ## style (ruff) and types (mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/types $(BIN)/mypy $(PACKAGES:%=-p visionselector_eval.%)

# The package's import names differ from its folders' names, so types are checked on a tree of links that has them.
types: install
	@mkdir -p build/types/visionselector_eval
	@for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/visionselector_eval/$$package; done

# Pins that are in the file stay unless a range excludes them; `make lock UPGRADE=--upgrade` moves them all on.
# Resolved for 3.11, then checked to be a complete solution for the newer ones. TORCH holds the lock to one release of
# torch, several GB for each newer one.
TORCH := torch==2.11.0 torchvision==0.26.0
RESOLVE = $(BIN)/uv pip compile pyproject.toml --extra dev --constraint build/pins.txt --python-platform x86_64-manylinux_2_28 \
	--no-annotate --no-header --no-emit-index-url --no-emit-find-links --no-emit-build-options --quiet

docs: install  ## write the parts of docs/ that come from the code (fields, settings, methods, benchmarks)
	$(BIN)/python docs/build.py

bundle: install  ## wheels for a GPU machine without network, in build/bundle (BUNDLE='--python 3.11')
	$(BIN)/python -m visionselector_eval.harness.microbenchmarks.bundle $(BUNDLE)

lock: | $(BIN)/uv  ## resolve requirements.lock anew from pyproject.toml
	mkdir -p build && touch requirements.lock && cp requirements.lock build/lock.txt
	printf '%s\n' $(TORCH) > build/pins.txt
	$(RESOLVE) --python-version 3.11 $(UPGRADE) --output-file build/lock.txt
	for version in 3.12 3.13; do \
		$(RESOLVE) --python-version $$version --constraint build/lock.txt --output-file build/lock-$$version.txt && \
		cmp build/lock.txt build/lock-$$version.txt || exit 1; \
	done
	{ echo "# The run-time and development environment (extra: dev), for Linux and Python 3.11 to 3.13."; \
	  echo "# Written by 'make lock' from pyproject.toml; do not edit."; \
	  grep -v '^#' build/lock.txt; } > build/lock.new && mv build/lock.new requirements.lock

$(BIN)/uv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'uv>=0.8,<1'

clean:  ## remove .venv, build output and caches (runs/ stays)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +
