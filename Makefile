# make quickstart    create .venv-quickstart, fine-tune on handwritten digits and predict
# make test          lint, type check and tests
# make test-heavy    tests that compile or export models, or start servers
# make test-thorough further models, for what `make test` shows on some
# make test-oldest   tests with the oldest supported torch, transformers, huggingface_hub and safetensors
# make test-timm     tests with timm, in .venv-timm: its torchvision may need another torch than the one of .venv
# make package       build the wheel and test it in a clean environment
# make docs          build the documentation, in build/site
# make clean         remove environments, builds and caches
# make format        apply the fixes and the formatting that `make test` checks
#
# Variables: PYTHON, the interpreter (3.10 or later); WORKERS, the number of parallel test processes.

PYTHON ?= python3
WORKERS ?= 2

VENV := .venv
OLDEST := .venv-oldest
TIMM := .venv-timm
QUICKSTART := .venv-quickstart
CLEAN := .venv-package
DOCS := .venv-docs

# One thread per worker: more are no faster for tiny models, and workers would compete for cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup quickstart test lint format types tests test-heavy test-oldest test-thorough test-timm package docs clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(VENV)/.installed

# One thread: for a tiny model more are no faster, and on a busy machine several times slower.
quickstart: export OMP_NUM_THREADS = 1
quickstart: $(QUICKSTART)/.installed
	$(QUICKSTART)/bin/vpt-peft train --output runs/quickstart --resume
	$(QUICKSTART)/bin/vpt-peft predict runs/quickstart 'runs/quickstart/data/test/*/100*.png'

test: lint types tests

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

types: setup
	$(VENV)/bin/mypy

tests: setup
	$(PYTEST) $(VENV)/bin/python -m pytest -n $(WORKERS)

test-heavy: setup
	$(PYTEST) $(VENV)/bin/python -m pytest -n $(WORKERS) -m "heavy and not thorough"

test-thorough: setup
	$(PYTEST) $(VENV)/bin/python -m pytest -n $(WORKERS) -m thorough

test-oldest: $(OLDEST)/.installed
	$(PYTEST) $(OLDEST)/bin/python -m pytest -n $(WORKERS)

test-timm: $(TIMM)/.installed
	$(PYTEST) $(TIMM)/bin/python -m pytest -n $(WORKERS) -k timm tests/backbones/test_families.py tests/backbones/test_timm.py

package: setup
	rm -rf build dist $(CLEAN)
	$(VENV)/bin/python -m build --quiet --outdir dist .
	$(PYTHON) -m venv $(CLEAN)
	$(CLEAN)/bin/python -m pip install -c constraints/current.txt dist/*.whl
	cd $(CLEAN) && bin/python -I ../.ci/check_wheel.py

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

clean:
	rm -rf $(VENV) $(OLDEST) $(TIMM) $(QUICKSTART) $(CLEAN) $(DOCS) build dist *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is updated when the requirements have changed.
$(VENV)/.installed: setup.cfg pyproject.toml constraints/current.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints/current.txt -e '.[dev,test]'
	touch $@

$(DOCS)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install -r docs/requirements.txt
	touch $@

# Only what the command needs.
$(QUICKSTART)/.installed: setup.cfg pyproject.toml constraints/current.txt
	$(PYTHON) -m venv $(QUICKSTART)
	$(QUICKSTART)/bin/python -m pip install -c constraints/current.txt -e '.[train]'
	touch $@

$(OLDEST)/.installed: setup.cfg pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints/oldest.txt -e '.[test]'
	touch $@

$(TIMM)/.installed: setup.cfg pyproject.toml constraints/current.txt
	$(PYTHON) -m venv $(TIMM)
	$(TIMM)/bin/python -m pip install -c constraints/current.txt -e '.[timm]' pytest pytest-xdist
	touch $@
