# Everything runs from a plain Python 3.11+, make and git: each target makes the
# virtual environment it needs and installs into it only when pyproject.toml changed.
#
#   make demo                watch tasks survive what kills them
#   make test                the whole test suite, on the newest Celery we support
#   make test CELERY=5.6     the same on an older Celery, in an environment of its own
#   make test ARGS="-k once" hand arguments to pytest
#   make bench-table         see who has a key, in every lifetime, way of ending and pool
#   make chaos               break workers, Redis and connections for a minute, and count

PYTHON ?= python3
CELERY ?=
ARGS   ?=
# Real workers mostly wait: ten test processes do two cores no harm. Each process has
# servers of its own, and tests that share workers run in one of them.
WORKERS ?= -n 10 --dist loadgroup

VENV := .venv$(if $(CELERY),-$(CELERY))
BIN  := $(VENV)/bin
PIN  := $(if $(CELERY),"celery==$(CELERY).*")

.PHONY: demo test lint docs bench bench-table chaos clean
.DELETE_ON_ERROR:
# Installed once and kept: make would delete stamps that only a pattern rule names.
.SECONDARY:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]" $(PIN)
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/reliable-tasks demo $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs docs/_build/html

bench: $(VENV)/.installed-test
	@test -d benchmarks || { echo "there are no benchmarks yet" >&2; exit 1; }
	$(BIN)/python -m benchmarks $(ARGS)

bench-table: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.table $(ARGS)

chaos: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks.chaos kills --quick --systems ours
	$(BIN)/python -m benchmarks.chaos outages --quick --systems ours
	$(BIN)/python -m benchmarks.chaos zombie --quick --systems ours

clean:
	rm -rf .venv .venv-* .nox build dist docs/_build htmlcov
	rm -rf .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
