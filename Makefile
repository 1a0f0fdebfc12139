# Two commands do everything: `make demo` and `make test`. Both keep one environment, .venv, and
# install into it only when pyproject.toml or the constraints have changed.

PYTHON      ?= python3
CONSTRAINTS ?= .ci/constraints.txt
PYTEST_ARGS ?=

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CI),--quiet) \
        $(addprefix --constraint=,$(CONSTRAINTS))

# Stamps, one for each content of the files that say what to install.
KEY       := $(shell cat pyproject.toml $(CONSTRAINTS) | cksum | cut -d' ' -f1)
INSTALLED := $(VENV)/.installed-$(KEY)
DEV       := $(VENV)/.installed-dev-$(KEY)

# What tensors free is kept by the process, not given back to Linux and asked for again: small towers gain a sixth.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

.DEFAULT_GOAL := help
.PHONY: help venv demo paper docs test lint format typecheck house weights clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Options: PYTHON=python3.12 (>= 3.10), CONSTRAINTS= (newest versions), PYTEST_ARGS='-m \"not slow\"'"

demo: $(INSTALLED) ## audit the bundled backdoored models and say where the report lies
	$(BIN)/decompclip demo --out demo-report
	@echo
	@find "$(CURDIR)/demo-report" -name '*.html' -exec echo "The report: open {} in a browser" \;

paper: $(INSTALLED) ## write a page of every figure and table, from committed results; measures what is not there
	$(BIN)/python -m analyses --all --model-family shapes --formats ""

docs: $(DEV) ## write the documentation site: build/site/index.html opens in a browser
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# One process of one thread for each core; a file's tests stay together, as they share its fixtures. Slow files come first
# (tests/conftest.py), so that no process ends long after the others.
test: lint typecheck ## ruff, pyright and every test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --durations=15 $(PYTEST_ARGS)

lint: $(DEV) ## ruff: rules and formatting, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV) ## ruff: fix and reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(DEV) ## pyright
	$(BIN)/pyright

house: $(DEV) ## count the files, lines, circles and public names of the package
	$(BIN)/python -m tests.house

weights: $(INSTALLED) ## train the bundled clean model again (35 minutes); `decompclip zoo build` makes its twins
	$(BIN)/python -m analyses.train_shapes

clean: ## remove caches and the demo's report; .venv stays
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist demo-report
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

venv: $(INSTALLED) ## create .venv and install decompclip into it

$(INSTALLED): | $(BIN)/pip
	@echo "Installing decompclip into $(VENV); the first time this takes some minutes (PyTorch is large)"
	$(PIP) --editable .
	@rm -f $(VENV)/.installed-* && touch $@

$(DEV): | $(BIN)/pip
	@echo "Installing decompclip[dev] into $(VENV); the first time this takes some minutes (PyTorch is large)"
	$(PIP) --editable '.[dev]'
	@rm -f $(VENV)/.installed-* && touch $(INSTALLED) $@

# pip is the last thing that venv writes: where it stands, the environment is whole.
$(BIN)/pip:
	@command -v $(PYTHON) > /dev/null || \
	  { echo "No '$(PYTHON)' here: name a Python >= 3.10, as in: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "decompclip needs Python >= 3.10, '$(PYTHON)' is `$(PYTHON) -V 2>&1`: name another," \
	         "as in: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || \
	  { echo "'$(PYTHON)' cannot make virtual environments: install its venv module" \
	         "(Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
