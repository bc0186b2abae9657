# What people and CI both call. VENV and PYTHON may be set: make test VENV=/tmp/venv PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: minillm needs Python 3.11 or newer, $(PYTHON) is older"; \
	    echo "hint: make demo PYTHON=python3.12"; exit 4; }
	@echo "setting up $(VENV) (some minutes the first time: PyTorch is large) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml
	@echo "setting up $(VENV) for development (some minutes the first time) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.base $@

demo: $(VENV)/.base  ## the whole pipeline on the bundled text, ending in a chat model
	$(BIN)/minillm demo

test: $(VENV)/.dev  ## the default test suite
	$(BIN)/python -m pytest

check: $(VENV)/.dev  ## format, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

bench: $(VENV)/.dev  ## every claim of speed, one Markdown row each
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
