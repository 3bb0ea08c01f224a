# One command for everything; `.ci/run` calls the same targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/.run-installed
DEV_STAMP := $(VENV)/.dev-installed

.PHONY: help image dev check quick lint types layers test floors py310 constraints clean

help:  ## list the targets
	@grep -E '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

image: $(RUN_STAMP)  ## install what a device needs and make an image: image.png
	$(BIN)/sld-run "a red star at a party" --seed 9 --output image.png --force

check: lint types layers test py310  ## everything CI runs

quick: lint types layers  ## lint, types, and the tests that your change needs, within a minute
	$(BIN)/python tests/quick.py

dev: $(DEV_STAMP)  ## install what developers need

lint: $(DEV_STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# NumPy's types are for 3.12 and later: under 3.10 mypy takes many of its results as Any.
types: $(DEV_STAMP)  ## mypy, strict; and for Python 3.10
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --no-warn-return-any

layers: $(DEV_STAMP)  ## imports go one way
	$(BIN)/lint-imports

# Two processes of one thread each are faster than one process of two threads.
test: $(DEV_STAMP)  ## the tests
	OMP_NUM_THREADS=1 SLD_EDGE_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile

floors: $(DEV_STAMP)  ## the lowest versions that pyproject.toml states make the same picture
	rm -rf .venv-floors
	$(BIN)/python -m venv .venv-floors
	$(BIN)/python tests/lowest_versions.py > .venv-floors/floors.txt
	.venv-floors/bin/pip install --quiet --editable ".[cpu]" --constraint .venv-floors/floors.txt
	$(BIN)/python tests/lowest_versions.py .venv-floors/bin/python $(BIN)/python

py310: $(DEV_STAMP)  ## Python 3.10, of JetPack 6: the same picture, and the runtime's tests
	$(BIN)/pip install --quiet uv
	$(BIN)/python tests/python_310.py

constraints: $(DEV_STAMP)  ## pin and hash what a device installs: constraints/device-cpu.txt
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra cpu --python-version 3.11 --python-platform linux \
		--generate-hashes --upgrade --quiet --custom-compile-command "make constraints" \
		--output-file constraints/device-cpu.txt

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .venv-floors .venv-py310 .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or later is needed')"
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable ".[cpu]"
	@touch $@

# torch first and by version: a range would bring a CUDA build of several gigabytes.
$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@
