# The two commands: `make train` and `make test`. Both create .venv and install everything they need.
PYTHON ?= python3
VENV ?= .venv
DATASET ?= synthetic
SAVE_DIR ?= results
RUN ?= $(if $(filter synthetic,$(DATASET)),quickstart,$(DATASET))
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test test-all lint install clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The synthetic data has a recipe made for minutes on a CPU; other data sets get the defaults of `effnet-fast train`.
RECIPE = $(if $(filter synthetic,$(DATASET)),--config effnet_fast/recipes/quickstart.yaml,--dataset $(DATASET))

train: $(INSTALLED)
	$(BIN)/effnet-fast train $(RECIPE) --save_dir $(SAVE_DIR) --run_name $(RUN) $(ARGS)
	$(BIN)/effnet-fast eval --checkpoint $(SAVE_DIR)/$(RUN)/last.pt

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info
