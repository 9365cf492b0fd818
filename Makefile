# `make train` and `make test` create .venv, install the package with all it needs, and run.
PYTHON ?= python3
VENV ?= .venv
DATASET ?= synthetic
SAVE_DIR ?= results
RUN ?= $(if $(filter synthetic,$(DATASET)),quickstart,$(DATASET))
ARGS ?=
# Test processes: one a core, at most eight. Each takes whole files, so that fixtures of a file are built once.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
BIN := $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: train test test-all lint install clean

install: $(INSTALLED)

# The tested versions; `make CONSTRAINTS= ...` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("error: this needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=--constraint %) --editable '.[dev]'
	@touch $@

# The recipe named after the data set (quickstart for synthetic), or the defaults where there is none.
RECIPE = effnet_fast/recipes/$(if $(filter synthetic,$(DATASET)),quickstart,$(DATASET)).yaml
SETTINGS = $(if $(wildcard $(RECIPE)),--config $(RECIPE),--dataset $(DATASET))

train: $(INSTALLED)
	$(BIN)/effnet-fast train $(SETTINGS) --save_dir $(SAVE_DIR) --run_name $(RUN) $(ARGS)
	$(BIN)/effnet-fast eval --checkpoint $(SAVE_DIR)/$(RUN)/last.pt

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info
