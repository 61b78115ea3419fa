# Each target makes the virtual environment it needs, once, and uses it again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Ray switches token authentication on by itself; both sides of a cluster must agree, so it is said here.
export RAY_AUTH_MODE ?= token
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-system check bench demo-seeds pretrain clean

demo: $(VENV)/installed
	rm -rf runs/demo
	$(BIN)/ddpo train deploy/recipes/demo.toml
	$(BIN)/ddpo report runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not system" tests

test-system: $(VENV)/installed
	$(BIN)/python -m pytest -m system tests

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest tests/test_import_rules.py

bench: $(VENV)/installed
	$(BIN)/python -m tests.benchmarks.embedded_model

demo-seeds: $(VENV)/installed
	rm -rf runs/demo-seed*
	$(BIN)/python -m tests.benchmarks.demo_seeds

pretrain: $(VENV)/installed
	$(BIN)/python -m learner.pretrain --output common/tiny_animals

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
