# make demo   the main job on a sample model, from nothing but Python
# make test   every check: ruff, mypy, all tests
# make bench  the benchmarks, as ratios to what people use instead (BENCH="--short csr" for small sizes and one row)
# make help   the list

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: help demo test bench models fuzz clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     set up $(VENV) and run inspect, toeplitz, fuse and verify on a trained sample model"
	@echo "make test     set up $(VENV) and run every check: ruff, mypy, all tests"
	@echo "make bench    set up $(VENV) and measure convtool beside what people use instead (minutes; BENCH=--short: less)"
	@echo "make models   train the sample models again (a minute)"
	@echo "make fuzz     damage checkpoints for SECONDS=600, guided by coverage, and see that each is refused or true"
	@echo "make clean    remove $(VENV), caches and outputs"

$(VENV)/installed: pyproject.toml tests/constraints.txt
	@echo "Setting up $(VENV): convtool and what it depends on (torch is large; this takes a minute or more) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "convtool needs Python 3.11 or later")'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable '.[scipy]'
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	@echo "Adding what the tests need ..."
	@$(PIP) --editable '.[test]'
	@touch $@

demo: $(VENV)/installed
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash sample_models/demo.sh

test: $(VENV)/installed-for-tests
	@echo "ruff: style and common mistakes"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "mypy: types, strict"
	@$(BIN)/mypy
	@echo "pytest: all tests"
	@$(BIN)/python -m pytest --numprocesses 2

bench: $(VENV)/installed-for-tests
	@PYTHONPATH=tests:sample_models $(BIN)/python -m bench $(BENCH)

models: $(VENV)/installed
	@$(PIP) --editable '.[train]'
	@$(BIN)/python sample_models/train.py

fuzz: $(VENV)/installed-for-tests
	@$(BIN)/python tests/fuzz.py $(or $(SECONDS),600) $(or $(SEED),0)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build demo_output bench_output *.egg-info
