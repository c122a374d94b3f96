# make demo          sets everything up and distills a first student (RECIPE=smoke for a short one)
# make test          the fast tests                  make test-full     all of them
# make test-wheel    the wheel as users install it: an environment of its own, core dependencies alone, each verb tried
# make test-oldest   the core tests with the oldest transformers that pyproject.toml allows
# make test-triton   flash-linear-attention's kernels beside ours, on a CPU in Triton's interpreter
# make lint          ruff, codespell, mypy           make docs          tests of the documents, and make site
# make site          the documents as a site, in site/
# make reference     the parts of docs/reference that come from the code
# PYTHON=python3.12 picks another interpreter; PIP_ARGS=... goes to every pip install.

PYTHON ?= python3
RECIPE ?= limbeck
PIP_ARGS ?=
BIN := .venv/bin
DONE := .venv/.installed
# the oldest transformers that is supported, and what it needs older than constraints.txt has it
OLDEST := transformers==5.5.0 huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9
TRITON := triton==3.9.0
# a file's tests stay in one process as long as both have work, so what they share is made once
IN_PARALLEL := -n auto --dist worksteal
DOCUMENTS := tests/docs/test_links.py tests/docs/test_tables.py tests/docs/test_documents.py tests/docs/test_site.py
CORE := tests/models/test_student.py tests/models/test_saving.py tests/mixers/test_hybrids.py tests/mixers/test_contract.py

.PHONY: setup demo test test-full test-oldest test-triton test-wheel docs site reference lint assets clean

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
	@$(BIN)/limbeck assets --pack benchmarks

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL)

test-full: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) --full

docs: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) --full $(DOCUMENTS)
	@$(MAKE) --no-print-directory site

site: .venv/.installed-docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site: open site/index.html; for search and a preview while you write: $(BIN)/mkdocs serve"

.venv/.installed-docs: $(DONE)
	@echo "setup: what builds the site (half a minute)"
	@$(BIN)/python -m pip install -q -q $(PIP_ARGS) -c constraints.txt -e '.[docs]'
	@touch $@

reference: setup
	@$(BIN)/python docs/generate.py

.venv/oldest/.installed: WANTED := $(OLDEST)
.venv/triton/.installed: WANTED := $(TRITON)
.venv/oldest/.installed .venv/triton/.installed: .venv/%/.installed: $(DONE) Makefile
	@echo "setup: $(firstword $(WANTED)) in .venv/$*"
	@rm -rf .venv/$*
	@$(BIN)/python -m pip install -q -q $(PIP_ARGS) --no-deps --target .venv/$* $(WANTED)
	@touch $@

test-oldest: .venv/oldest/.installed
	@PYTHONPATH=.venv/oldest $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	@PYTHONPATH=$(CURDIR)/.venv/oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) --full $(CORE) -k 'not test_contract or gated_deltanet-full'

test-triton: .venv/triton/.installed
	@PYTHONPATH=$(CURDIR)/.venv/triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) --full tests/ops/test_triton.py

test-wheel:
	@$(PYTHON) tests/check_wheel.py --pip-args="$(PIP_ARGS)"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/mypy

clean:
	rm -rf .venv build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
