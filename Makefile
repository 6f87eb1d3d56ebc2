# `make demo`, `make quick` and `make test` each set up everything they need on a fresh clone.
PYTHON ?= python3
JOBS ?= 2
MINUTES ?= 5
VENV := .venv
BACKEND := $(if $(filter Darwin,$(shell uname -s)),,cpu)
comma := ,
PYTEST := $(VENV)/bin/python -m pytest -q

.PHONY: demo test quick fuzz check fix clean

demo: $(VENV)/.runtime
	@echo "== asking the pocket model that ships inside the package =="
	$(VENV)/bin/mlx_kimi generate "What is Kimi Linear?"

test: check
	@echo "== running every test, $(JOBS) at a time =="
	$(PYTEST) -n $(JOBS) --dist worksteal --durations 20 -m "not alone"
	@echo "== running what load would disturb, one at a time =="
	$(PYTEST) -m alone

quick: check
	@echo "== running the tests that are quick, $(JOBS) at a time =="
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not alone and not slow"

fuzz: $(VENV)/.dev
	@echo "== reading damaged files for $(MINUTES) minutes =="
	$(VENV)/bin/python -m tests.fuzz --minutes $(MINUTES) --jobs $(JOBS)

check: $(VENV)/.dev
	@echo "== checking style and types =="
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

fix: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(VENV)/.made:
	@echo "== making the environment $(VENV) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.runtime: pyproject.toml | $(VENV)/.made
	@echo "== installing mlx_kimi and what it needs =="
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".$(if $(BACKEND),[$(BACKEND)])"
	@touch $@

$(VENV)/.dev: pyproject.toml tools/metal_emulator/pyproject.toml | $(VENV)/.made
	@$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The tests need Python 3.11 or later, since mlx-lm, a peer, does: make clean test PYTHON=python3.12")'
	@echo "== installing mlx_kimi, test tools and the peers that tests compare with =="
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev$(if $(BACKEND),$(comma)$(BACKEND))]" -e tools/metal_emulator
	@touch $@ $(VENV)/.runtime

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
