# `make simulate`, `make demo` and `make test` each make what they need.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

.PHONY: simulate demo install test check clean

simulate: .venv/installed
	$(BIN)/python simulate.py $(ARGS)

demo: .venv/installed
	$(BIN)/python -m server demo $(ARGS)

install: .venv/installed

test: .venv/tested
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# One by one: a script has the name of a package.
	for script in benchmarks/*.py; do MYPYPATH=benchmarks $(BIN)/mypy $$script || exit 1; done
	$(BIN)/lint-imports

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[simulation,site,dev]'
	touch $@

clean:
	rm -rf .venv
