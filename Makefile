PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Work on the machine at hand only: no reports home, no Hub in tests.
export DO_NOT_TRACK := 1
# Some images set it. Each process of a run would compile torch and its like anew then: 23 s to the first step became 48.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-faults setup clean

quickstart: $(VENV)/.ready  ## set up and run the main job on three small real data sets
	$(BIN)/lorafleet train --config quickstart

setup: $(VENV)/.ready-dev  ## set up everything for development

test: $(VENV)/.ready-dev  ## every check but the long runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

test-faults: $(VENV)/.ready-dev  ## the long fault and soak runs
	$(BIN)/pytest -n 2 --dist loadfile -m faults --timeout 1800

# --no-compile: a module is compiled when it is first imported, and most never are.
$(VENV)/.ready: EXTRAS := quickstart
$(VENV)/.ready-dev: EXTRAS := quickstart,dev
$(VENV)/.ready $(VENV)/.ready-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV)
