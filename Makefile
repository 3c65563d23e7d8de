# make help lists the targets. The first one that needs Python creates .venv and installs everything into it.
PYTHON := .venv/bin/python
STAMP := .venv/.finetune101-installed
.DEFAULT_GOAL := help
.PHONY: help env demo test fast lint audit docs stress mutate claims release clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## create .venv and install everything into it (the others do this first)

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

demo: env ## fine-tune, train from scratch and compare, on an embedded data set (two minutes and more, installation not counted)
	@$(PYTHON) -m finetune101 demo

# not benchmarks/, which attack the program on purpose
lint: env ## lint and types only
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(PYTHON) -m bandit --quiet -c pyproject.toml -r finetune101 evidence train.py test.py search.py utils.py

docs: env ## the documentation as a site in build/site, its generated parts and numbers written anew; a warning is an error
	$(PYTHON) evidence/references.py
	$(PYTHON) evidence/texts.py
	$(PYTHON) evidence/docs_site.py

# a process for each core, each with one thread: two threads that compute wait for each other on a full machine
test: lint ## lint, types and all tests (about a quarter of an hour on two cores)
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

fast: env ## the quick tests only
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow and not caltech101"

# pip-audit asks PyPI for known faults; without --strict it passes what it could not ask about
audit: env ## known faults of the packages in requirements.lock (needs PyPI itself: a mirror does not know them)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(PYTHON) -m pip_audit --strict --no-deps --disable-pip -r requirements.lock

stress: env ## kills, full disks, hostile files: count what is lost (about an hour); results/stress.json
	$(PYTHON) benchmarks/stress.py

mutate: env ## try a fifth of 1,700 changes of splits, metrics and comparisons; 85 % must fail a test (half an hour)
	OMP_NUM_THREADS=1 $(PYTHON) evidence/mutation.py --ending 3 8

claims: env ## recompute every accuracy in results/claims.json, find every other number in its evidence
	@$(PYTHON) evidence/claims.py

# the wheel is made of the source distribution, which so holds all that it needs
release: env ## build wheel and source distribution, check both, and try the wheel in a fresh environment (10 minutes)
	rm -rf dist
	$(PYTHON) -m build --no-isolation
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) -m check_wheel_contents dist/*.whl
	$(PYTHON) evidence/try_wheel.py dist

clean: ## remove .venv, caches and the demo's output; runs/ and data/ stay
	rm -rf .venv mutants .mypy_cache .pytest_cache .ruff_cache build dist demo *.egg-info
	find finetune101 tests evidence -name __pycache__ -prune -exec rm -rf {} +
