# make demo   a search on digits, from nothing to an exported network
# make test   every check: ruff, mypy, pytest
# make clean  removes the virtual environment and caches
#
# Needs Python 3.11 or newer (with venv), git and make. Another Python: make demo PYTHON=python3.13

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-one-half test-other-half clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m paretoprune.experiments.demo

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory -j2 test-one-half test-other-half

# Side by side, because one process of pytest uses one core; of about the same length.
HALF = tests/contracts tests/device tests/faults tests/integration tests/unit/criteria tests/unit/surgery

test-one-half:
	$(BIN)/pytest -q $(HALF)

test-other-half:
	$(BIN)/pytest -q tests $(HALF:%=--ignore=%)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "No virtual environment; on Debian: apt install python3-venv"; exit 1; }

# The stamps are older than pyproject.toml only when dependencies may have changed; the install is
# editable, so that changes of code need none.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV), a few minutes and several GB the first time"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "Installing into $(VENV), a few minutes and several GB the first time"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed
