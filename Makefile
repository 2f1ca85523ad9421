PYTHON ?= python3
RECIPE ?= recipes/llama2-cpu.yaml
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test test-fast lint clean install
.DEFAULT_GOAL := run

install: $(INSTALLED)

# Once, and again only when the dependencies change. The CPU build of torch is taken where pip is offered one.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV); this takes a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

run: $(INSTALLED)
	$(BIN)/pipeline run $(RECIPE)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=25

test-fast: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist worksteal

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
