# make demo      pretrain on generated scenes with and without guidance, and print the results
# make test      run the fast tests
# make slow      run the slow tests: kills, launches of several processes, the site, the wheel, long fuzz
# make check     lint and type check
# make docs      the documentation as a site that needs no network, in build/site
# make coverage  run all tests and list the lines of the packages that none of them reaches
# make gpu       all that only a GPU can show, in ten minutes: runs/gpu/report.html; DATA=photos takes your images
# make tables    the tables and charts of README.md and docs, from the files in tests/bench/results
# make pictures  the other pictures, from a run of four minutes, and the notebook's outputs
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
.PHONY: demo test slow check docs coverage gpu tables pictures clean

demo: $(VENV)/.installed
	$(BIN)/python -W ignore -m trainers demo runs/demo

# Idle workers take tests from busy ones. At most eight processes, because each holds PyTorch and, where there is a
# GPU, a context on it.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal -m "not slow"

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -W ignore -m sphinx -W --keep-going -q -E -d build/doctrees -c docs/site . build/site

coverage: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist worksteal --cov --cov-report term:skip-covered

gpu: $(VENV)/.installed
	$(BIN)/python -W ignore -m dali_views gpu-report runs/gpu $(DATA)

tables: $(VENV)/.installed
	$(BIN)/python -W ignore tests/bench/tables.py
	$(BIN)/python tests/bench/charts.py

pictures: $(VENV)/.installed
	$(BIN)/python -W ignore tests/bench/picture_run.py runs/pictures
	$(BIN)/python -W ignore tests/bench/pictures.py
	$(BIN)/python -W ignore tests/bench/notebook.py docs/tour.ipynb

# If the requirements have changed, the stamp is older than pyproject.toml and they are installed again.
$(VENV)/.installed: pyproject.toml
	@echo "Installing into $(VENV): PyTorch with CUDA makes it some 8 GB, so this takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
