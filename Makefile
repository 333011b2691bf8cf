# make demo    trains by three methods on drawn scenes, prints a table, draws demo/demo.png (a few minutes)
# make test    runs the tests
# make lint    formatting, types, layers
# make docs    builds the documentation into site/
# make release-check    installs wheel and sdist with the lowest and the newest dependencies (half an hour, 6 GB for a while)
# Each creates the environment in .venv first, where there is none (Python 3.10 to 3.13; PYTHON=... chooses one).

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help demo test lint docs release-check clean
help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(READY)
	$(BIN)/python examples/quickstart.py --out demo

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict --quiet

release-check: $(READY)
	$(BIN)/python tools/check_release.py

clean:
	rm -rf .venv demo site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# The stamp comes last: an installation that was cut short is taken up again.
$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' || \
		{ echo "stseg needs Python 3.10 or later: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Creating the environment in .venv: a few minutes, about 6 GB."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,docs,report]"
	@touch $@
