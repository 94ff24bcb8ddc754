# The words of CI: `make test` from nothing but Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# LOCKED=1: the very versions that the package was developed with
LOCK := requirements/locked.txt
CONSTRAINTS := $(if $(LOCKED),-c $(LOCK))
INSTALLED := $(VENV)/.installed$(if $(LOCKED),-locked)
# the lowest Python that is supported, for test-minimum
MINIMUM_PYTHON ?= python3.10
MINIMUM := .venv-minimum

.PHONY: install lock test test-minimum dist check format tables demo docs figures soak fuzz fuzz-atheris audit clean test-fast

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(if $(LOCKED),$(LOCK))
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed*
	$(PIP) $(CONSTRAINTS) -e '.[dev]'
	touch $@

# the newest that the bounds allow, and a list of it
lock: install
	$(PIP) --upgrade --upgrade-strategy eager -e '.[dev]'
	$(BIN)/python requirements/freeze.py > $(LOCK).new
	mv $(LOCK).new $(LOCK)

test: install
	$(BIN)/python -m pytest -n 2 --dist worksteal

# without those that go through an nnU-Net environment, start processes or take long
test-fast: install
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not integration"

# the lower bounds of pyproject.toml, in an environment of their own
test-minimum: $(MINIMUM)/.installed
	$(MINIMUM)/bin/python -m pytest -n 2 --dist worksteal

$(MINIMUM)/.installed: pyproject.toml requirements/minimum.py
	$(MINIMUM_PYTHON) -m venv --clear $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check packaging tomli
	$(MINIMUM)/bin/python requirements/minimum.py > $(MINIMUM)/minimum.txt
	$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check -c $(MINIMUM)/minimum.txt -e '.[dev]'
	touch $@

# wheel and sdist, built and looked at
dist: install
	rm -rf dist
	$(BIN)/python -m build
	$(PIP) twine
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_packaging.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# the tables of all settings in docs/reference/settings.md, and the recipes that hold every default
tables: install
	$(BIN)/python docs/settings_table.py
	$(BIN)/python docs/default_recipes.py

# the documentation as a site, with every link checked
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

# the README's pictures, from committed numbers
figures: install
	$(BIN)/python docs/figures.py

# at least twenty kills of each method and the fine-tuner, for an hour, and ten of a study; not part of the tests
soak: install
	$(BIN)/python -m benchmarks soak --kills 20 --minutes 60 --jobs 2
	STUDY_KILLS=10 $(BIN)/python -m pytest tests/study/test_study.py -k killed
	INDUCTOR=1 $(BIN)/python -m pytest tests/training/test_compiled.py -k inductor

fuzz: install
	FUZZ_INPUTS=4000 $(BIN)/python -m pytest tests/test_fuzz.py

# the same readers, guided by coverage: a minute each
fuzz-atheris: install
	$(PIP) atheris
	$(BIN)/python -m benchmarks fuzz_atheris --seconds 60

audit: install
	$(PIP) pip-audit
	$(BIN)/pip-audit --skip-editable

demo: install
	$(BIN)/nnssl_ext demo --output demo --open

clean:
	rm -rf $(VENV) $(MINIMUM) build site dist .pytest_cache .mypy_cache .ruff_cache
