# What people and CI both call. VENV and PYTHON may be set: make test VENV=/tmp/venv PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := bash

.PHONY: help demo test check suite docs bench clean

help:
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*##/\t/' | expand -t 8

# A stamp file per environment: nothing is installed again until pyproject.toml changes.
define install
@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "error: minillm needs Python 3.11 or newer, \`$(PYTHON)\` is $$($(PYTHON) --version 2>&1)"; \
    echo "hint: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 4; }
@echo "setting up $(VENV) (2 to 10 minutes the first time: PyTorch is large) …"
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
  -e '.$(1)' | { grep --line-buffered -oE '^ *Downloading .*[MG]B\)|^Installing' || true; }
endef

$(VENV)/.base: pyproject.toml
	$(call install,)
	@touch $@

$(VENV)/.dev: pyproject.toml
	$(call install,[dev])
	@touch $(VENV)/.base $@

demo: $(VENV)/.base  ## the whole pipeline on the bundled text, ending in a chat model
	$(BIN)/minillm demo $(ARGS)

test: $(VENV)/.dev  ## the default test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile $(ARGS)

check: $(VENV)/.dev  ## format, lint, types, spelling
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

suite: $(VENV)/.dev  ## transformers' own model tests, and TRL, PEFT, Trainer, lm-eval (downloads)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,eco]'
	$(BIN)/python tools/transformers_suite/run.py $(ARGS)
	$(BIN)/python -m pytest -m eco

docs: $(VENV)/.dev  ## write docs/cli.md anew from every --help
	$(BIN)/python tools/make_cli_docs.py

bench: $(VENV)/.dev  ## training speed against transformers, a Markdown row (some minutes)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/throughput.py

clean:  ## remove the environment and caches; data/, runs/ and demo/ stay
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
