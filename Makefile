# make demo: the whole main job on an embedded data set. make test: every check. Both create .venv first.
PYTHON := .venv/bin/python
STAMP := .venv/.finetune101-installed
.DEFAULT_GOAL := help
.PHONY: help env demo test fast lint stress claims clean

help:
	@echo "make demo    fine-tune, train from scratch and compare, on an embedded data set (about two minutes, installation not counted)"
	@echo "make test    lint, types and all tests"
	@echo "make fast    the quick tests only"
	@echo "make lint    lint and types only"
	@echo "make stress  kills, full disks, hostile files: counts what is lost (about an hour); results/stress.json"
	@echo "make claims  recompute every accuracy in results/claims.json, find every other number in its evidence"
	@echo "make env     create .venv and install everything into it (the others do this first)"
	@echo "make clean   remove .venv, caches and the demo's output; runs/ and data/ stay"

env: $(STAMP)

# a python3.x on the PATH may be a shim that fails or lack the venv module, so each one is tried
$(STAMP): requirements.lock pyproject.toml
	@fits='import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; \
	if ! $(PYTHON) -c "$$fits" 2>/dev/null; then \
	  for python in python3.11 python3.12 python3.13 python3 none; do \
	    $$python -c "$$fits" 2>/dev/null && break; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "No Python 3.11, 3.12 or 3.13 (with venv) found: install one and run make again." >&2; exit 1; \
	  fi; \
	  $$python -m venv --clear .venv; \
	fi
	@echo "Installing PyTorch and the other packages into .venv; this takes a few minutes, once."
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: env
	@$(PYTHON) -m finetune101 demo

lint: env
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

# a process for each core, each with one thread: two threads that compute wait for each other on a full machine
test: lint
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

fast: env
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not caltech101"

stress: env
	$(PYTHON) benchmarks/stress.py

claims: env
	@$(PYTHON) evidence/claims.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist demo *.egg-info
	find finetune101 tests evidence -name __pycache__ -prune -exec rm -rf {} +
