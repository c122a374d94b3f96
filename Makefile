# make demo   sets everything up and runs the main job        make test   sets up and passes the tests
# PYTHON=python3.12 picks another interpreter, RECIPE=smoke another recipe, PIP_ARGS=... goes to every pip install.

PYTHON ?= python3
RECIPE ?= quickstart
PIP_ARGS ?=
BIN := .venv/bin
DONE := .venv/.installed

.PHONY: setup demo test lint assets clean

setup: $(DONE)

$(DONE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python {v[0]}.{v[1]} found, 3.11 or newer needed: make PYTHON=python3.11 ...")'
	@echo "setup: virtual environment in .venv"
	@$(PYTHON) -m venv .venv
	@echo "setup: torch (a minute)"
	@$(BIN)/python -m pip install -q -q $(PIP_ARGS) -c constraints.txt torch
	@echo "setup: limbeck and its other dependencies (a minute)"
	@$(BIN)/python -m pip install -q -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $(DONE)

demo: setup
	@$(BIN)/limbeck distill $(RECIPE)

assets: setup
	@$(BIN)/limbeck assets

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
