# `make demo` and `make test` set up what they need on a fresh clone.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

# Processes of tests without vLLM; those inside vLLM are three always.
JOBS ?= 2
PARALLEL := -n $(JOBS) --dist worksteal

.PHONY: demo test check lint unit inside coverage clean

demo: $(VENV)/.done
	$(BIN)/kvortex demo

test: lint unit inside

check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

lint: $(VENV)/.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.done
	$(BIN)/python -m pytest $(PARALLEL) -m "not vllm and not gpu"

# What has its own processes, or shares a device.
inside: $(VENV)/.done
	$(BIN)/python -m pytest -m "vllm or gpu"

coverage: $(VENV)/.done
	$(BIN)/python -m pytest $(PARALLEL) -m "not vllm and not gpu" --cov --cov-report=term:skip-covered

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
