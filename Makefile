# Every target sets up what it needs: a .venv in the project, from the pins in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup check test cluster slow demo bench

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV) (once)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the packages that constraints.txt pins (once; minutes)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/pyright
	@$(BIN)/pytest tests/test_imports.py

test: $(READY)
	@$(BIN)/pytest -n 2

# Jobs on a Ray cluster of several nodes, which come and go.
cluster: $(READY)
	@$(BIN)/pytest -m cluster

# Every benchmark on a tiny size.
slow: $(READY)
	@$(BIN)/pytest -m slow

demo: $(READY)
	@$(BIN)/hbi demo $(ARGS)

bench: $(READY)
	@for bench in checkpointing decoders evaluation exchange films interaction loading memory scale search sharding similarity step tracking; do \
		echo "== $$bench"; $(BIN)/python -m benchmarks.$$bench || exit 1; done
