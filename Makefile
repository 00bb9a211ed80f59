# Everything a fresh machine with Python 3.11 and make needs: each target makes .venv and fills it.
PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test lint format gpu-driver clean

# QUICK=1: few steps of the smallest model, which shows that everything works and no more.
demo: $(VENV)/.demo
	$(RUN) -m launch.demo $(if $(QUICK),--quick)

# Without a driver the tests that need one say so and are skipped; under CI=true they fail.
# Parity is that of code as XLA optimises it; most of the rest is compiled fast (tests/conftest.py).
test: lint
	@$(RUN) -m convert.vulkan || true
	$(PYTEST) --ignore=tests/parity -m "not (parity or optimised)"
	XLA_FLAGS= $(PYTEST) -m "parity or optimised"

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# A Vulkan driver that runs on the CPU, for LiteRT's GPU accelerator: build/vulkan, nothing installed.
gpu-driver: $(VENV)/.dev
	$(RUN) -m convert.vulkan

format: $(VENV)/.dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/.base: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable .
	touch $@

$(VENV)/.demo: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable ".[convert]"
	touch $@ $(VENV)/.base

$(VENV)/.dev: $(VENV)/bin/python setup.cfg pyproject.toml
	$(RUN) -m pip install --quiet --editable ".[dev,parity,convert]"
	touch $@ $(VENV)/.base $(VENV)/.demo
