# The two commands: `make train` and `make test`. Both create .venv and install everything they need.
PYTHON ?= python3
VENV ?= .venv
DATASET ?= synthetic
SAVE_DIR ?= results
RUN ?= $(if $(filter synthetic,$(DATASET)),quickstart,$(DATASET))
ARGS ?=
# Tests run side by side, a file to a process, with a core each.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
BIN := $(VENV)/bin
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile
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
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info
