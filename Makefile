# make demo   the main job on a sample model, from nothing but Python
# make check  ruff, mypy and a cross-section of the tests, under a minute: while working
# make test   every check: ruff, mypy, all tests
# make bench  the benchmarks, as ratios to what people use instead (BENCH="--short csr" for small sizes and one row)
# make spectra  both ends of the spectra of 24 layers, beside scipy's solvers and a dense SVD
# make zoo    networks of other libraries, as far as these are installed: what stays, what is wrong, what is dearer, and why
# make help   the list

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PART   := 20
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

.PHONY: help demo check test bench spectra faults mutants models fuzz clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     set up $(VENV) and run inspect, toeplitz, fuse and verify on a trained sample model"
	@echo "make check    set up $(VENV) and run ruff, mypy and a cross-section of the tests: under a minute, while working"
	@echo "make test     set up $(VENV) and run every check: ruff, mypy, all tests (6 to 7 minutes on 2 cores)"
	@echo "make bench    set up $(VENV) and measure convtool beside what people use instead (minutes; BENCH=--short: less)"
	@echo "make spectra  both ends of the spectra of 24 layers, beside scipy's solvers (an hour; WORDS=blur: only those)"
	@echo "make faults   fail, kill and change sources at each step of each command, and see what is left (half an hour)"
	@echo "make mutants  change COUNT=150 places of PATHS=convtool at random (SEED=0), and see which no test notices (half an hour)"
	@echo "make models   train the sample models again (a minute)"
	@echo "make fuzz     damage checkpoints for SECONDS=600, guided by coverage, and see that each is refused or true"
	@echo "make zoo      plan and fuse networks of timm, torchvision and others, as far as installed (WORDS=resnet: only those)"
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

# mypy has a core for itself, and pytest the other one.
check: $(VENV)/installed-for-tests
	@echo "ruff, mypy and one in $(PART) tests of every room (about 40 seconds on 2 cores)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --no-error-summary & types=$$!; \
	$(BIN)/python -m pytest --part $(PART); tests=$$?; wait $$types && exit $$tests

test: $(VENV)/installed-for-tests
	@echo "Every check: 6 to 7 minutes on 2 cores, half a minute of it before the first test"
	@echo "ruff: style and common mistakes"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "mypy: types, strict"
	@$(BIN)/mypy
	@echo "pytest: all tests"
	@$(BIN)/python -m pytest --numprocesses 2

bench: $(VENV)/installed-for-tests
	@PYTHONPATH=tests:sample_models $(BIN)/python -m bench $(BENCH)

spectra: $(VENV)/installed-for-tests
	@PYTHONPATH=tests $(BIN)/python -m bench.spectra $(WORDS)

faults: $(VENV)/installed-for-tests
	@$(BIN)/python tests/faults.py $(FAULTS)
	@$(BIN)/python tests/launched.py

mutants: $(VENV)/installed-for-tests
	@$(BIN)/python tests/mutants.py --count $(or $(COUNT),150) --seed $(or $(SEED),0) $(PATHS)

models: $(VENV)/installed
	@$(PIP) --editable '.[train]'
	@$(BIN)/python sample_models/train.py

fuzz: $(VENV)/installed-for-tests
	@$(BIN)/python tests/fuzz.py $(or $(SECONDS),600) $(or $(SEED),0)

zoo: $(VENV)/installed-for-tests
	@$(BIN)/python tests/zoo.py --why $(WORDS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build demo_output bench_output *.egg-info
