# make demo   pretrain on generated scenes with and without guidance, and print what came out
# make test   run the tests
# make check  lint and type check
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Without this, make's own variables would reach the Python it starts.
MAKEFLAGS += --no-print-directory

.PHONY: demo test check bench clean

demo: $(VENV)/.installed
	$(BIN)/python -W ignore -m trainers demo runs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp holds the requirements it was installed from, so a change of them installs again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
