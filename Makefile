# The words of CI: `make test` from nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install test check format demo soak fuzz audit clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# at least twenty random kills of each method, for an hour; not part of the tests
soak: install
	$(BIN)/python benchmarks/soak.py --kills 20 --minutes 60

fuzz: install
	FUZZ_INPUTS=4000 $(BIN)/python -m pytest tests/test_fuzz.py

audit: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable

demo: install
	$(BIN)/nnssl_ext demo --output demo --open

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
