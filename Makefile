# Everything runs from .venv in this checkout; `make env` makes it, and every other target makes it first.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

BIN := .venv/bin
STAMP := .venv/.installed
# The first of these that is Python 3.11 or later; `make env PYTHON=/path/to/python` overrides.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help env demo test check bench chaos clean lint

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

env: $(STAMP) ## make .venv with holdfast, CPU torch and the tools

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "holdfast needs Python 3.11 or later with venv: put one on PATH, or make env PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "installing holdfast and its tools into .venv (torch is a download of some 200 MB the first time)"
	@$(PIP) -e '.[dev]' 2>.venv/pip.log || { cat .venv/pip.log >&2; exit 1; }
	@touch $@

demo: $(STAMP) ## train two workers, kill one, resume from memory, compare with stock torchrun
	@$(BIN)/python examples/demo.py

.PHONY: demo-nodes
demo-nodes: $(STAMP) ## four nodes, two lose power together with the storage, one is replaced; needs root (namespaces)
	@$(BIN)/python examples/demo_nodes.py

test: $(STAMP) ## the tests
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(STAMP) ## ruff, its formatter and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: $(STAMP) ## what CI runs: lint, types, tests, build
	.ci/run

bench: $(STAMP) ## benchmarks against memcpy and rivals; rivals that do not install are left out
	@for rival in torchsnapshot torch_checkpointing zfec "--no-deps dlrover grpcio protobuf deprecated wrapt requests urllib3 idna certifi charset-normalizer"; do \
		$(PIP) $$rival 2>/dev/null || echo "$$rival does not install here and is left out"; done
	$(BIN)/python benchmarks/stall.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/erasure.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/exchange.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/checkpoint.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/planning.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/let.py $(BENCH_ARGS)

chaos: $(STAMP) ## the whole kill matrix and the long campaigns
	$(BIN)/python -m pytest -m campaign

clean: ## remove .venv and everything built
	rm -rf .venv .rivals build dist runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf src/holdfast.egg-info

.PHONY: test-dcp
test-dcp: $(STAMP) ## DCP's own tests with our writer and reader; from GitHub, or FROM=checkout of pytorch
	@$(PIP) expecttest
	$(BIN)/python tests/external/dcp_tests.py $(if $(FROM),--from $(FROM))

.PHONY: bench-recovery
bench-recovery: $(STAMP) ## seconds from a killed worker to the next step, against torchrun, NVRx and torchft
	@$(PIP) --upgrade --target .rivals --no-deps nvidia-resiliency-ext torchft defusedxml nvidia-ml-py pynvml pyyaml 2>/dev/null \
		&& $(PIP) --upgrade --target .rivals opentelemetry-sdk opentelemetry-exporter-otlp-proto-http 2>/dev/null \
		|| echo "NVRx or torchft does not install here and is left out"
	$(BIN)/python benchmarks/recovery.py --rivals .rivals $(BENCH_ARGS)

.PHONY: bench-node-loss
bench-node-loss: $(STAMP) ## seconds from a node without power to the next step; six minutes, needs root (namespaces)
	$(BIN)/python benchmarks/node_loss.py $(BENCH_ARGS)

.PHONY: soak
soak: $(STAMP) ## half an hour of random faults on four nodes in namespaces; HOLDFAST_SOAK_S=seconds, needs root
	$(BIN)/python -m pytest -m campaign -v tests/chaos/test_soak.py

.PHONY: bench-goodput
bench-goodput: $(STAMP) ## steps that count while nodes fail, against torchrun; an hour, needs root (namespaces)
	$(BIN)/python benchmarks/goodput.py $(BENCH_ARGS)

.PHONY: test-torch-launcher
test-torch-launcher: $(STAMP) ## torch's own launcher tests with holdfast run; from GitHub, or FROM=checkout of pytorch
	@$(PIP) expecttest
	$(BIN)/python tests/external/launcher_tests.py $(if $(FROM),--from $(FROM))

.PHONY: test-slurm
test-slurm: $(STAMP) ## a job on a real Slurm of two nodes on this host: killed, requeued, resumed (root, Debian)
	BIN=$(BIN) tests/external/slurm.sh
