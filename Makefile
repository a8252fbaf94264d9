# Everything that a fresh machine needs is made here, in .venv. Needs Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEEDS ?= 3  # of make report
FLOOR := 65  # percent of orchestrator and jobs that the unit tests cover

.PHONY: help install demo report test test-quick test-long lint wheel cluster-up cluster-down chaos crashes fuzz three-days bench clean

help:
	@echo "make demo          train handwritten digits with 2 local workers, and test the best models"
	@echo "make report        the report's three attempts in small, on drawings made here (up to 10 minutes; SEEDS=3)"
	@echo "make test          style, types and all tests but the long ones; COVERAGE=1: with a floor for the unit tests"
	@echo "make test-quick    the unit tests and one run from launch to export, for the everyday loop (about a minute)"
	@echo "make test-long     the tests that wait for minutes, and more cases of those in make test"
	@echo "make lint          style and types"
	@echo "make install       the virtual environment only"
	@echo "make wheel         build the wheel and try it in an environment of its own"
	@echo "make cluster-up    start a real Slurm cluster on this machine; make cluster-down ends it"
	@echo "make chaos         minutes of faults against a run on such a cluster"
	@echo "make crashes       every fault at every file operation of a job (minutes)"
	@echo "make fuzz          random input of every kind (minutes)"
	@echo "make three-days    864 jobs in 8 chains on such a cluster"
	@echo "make bench         the benchmarks; each writes JSON"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "orch needs Python 3.11 or newer; this is $$($(PYTHON) --version). Say: make PYTHON=python3.12 install"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -c 'import torch, torchvision; torch.ops.torchvision.nms'  # a matching pair, both compiled
	touch $@

demo: install
	rm -rf runs/demo
	$(BIN)/orch launch settings/digits.json --set name=demo --executor local --workers 2 --wait
	$(BIN)/orch evaluate demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

report: install
	$(BIN)/python benchmarks/report.py --seeds $(SEEDS) --out build/report.json

# CI sets COVERAGE=1: the floor holds for the unit tests, whose code runs in one process.
test: lint
ifdef COVERAGE
	$(BIN)/python -m pytest -n 2 tests/unit --cov --cov-report=term --cov-fail-under=$(FLOOR)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long" tests/integration tests/slurm
else
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long"
endif

test-quick: install
	$(BIN)/python -m pytest -q -n 2 -m quick

test-long: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m long

wheel: install
	rm -rf dist build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel dist/*.whl
	cd build && PYTHONPATH=wheel ../$(BIN)/python -c 'import orchestrator.cli.main, jobs.digits; \
		assert orchestrator.__file__.startswith("$(CURDIR)/build"), orchestrator.__file__'

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,bench]'
	$(BIN)/python benchmarks/chain_gap.py
	$(BIN)/python benchmarks/bookkeeping.py --seconds 2 --rounds 1

cluster-up:
	$(PYTHON) slurm/devcluster up

cluster-down:
	$(PYTHON) slurm/devcluster down

chaos: install
	ORCH_CHAOS_FAULTS=40 ORCH_CHAOS_SEED=$${SEED:-7} $(BIN)/python -m pytest tests/slurm/test_chaos.py -s

crashes: install
	ORCH_CRASHES=every $(BIN)/python -m pytest tests/integration/test_crashes.py -n 2 -rP

fuzz: install
	ORCH_FUZZ_EXAMPLES=$${TIMES:-20} $(BIN)/python -m pytest tests/unit/test_fuzz_*.py -n 2 --timeout 1800

three-days: install
	ORCH_LINKS=108 $(BIN)/python -m pytest tests/slurm/test_three_days.py -s

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
