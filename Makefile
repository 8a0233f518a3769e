# Everything here needs a Python from 3.11 on with its venv module, and make; the rest is installed into $(VENV).

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
# Of `make test`, `make test-training` and `make test-docs`; 0: one process, which a debugger or `-s` needs.
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Tests start hundreds of processes, and each would compile all that it imports of ditmoe anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv demo slurm-demo test test-training test-parallel test-service test-page test-slurm test-crew test-bench test-drawing test-metrics test-memory test-compile test-layouts test-gpu test-docs test-all bench bench-gpu lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## install the pinned versions into .venv, or VENV=…, with python3, or PYTHON=…

$(INSTALLED): constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python " + v + ", expected 3.11 or later: make venv PYTHON=python3.12")'
	@echo "installing into $(VENV): minutes, the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: venv ## digits → shards → train on 2 processes → sample → evaluate, in minutes on 2 CPU cores
	@PATH="$(abspath $(BIN)):$$PATH" bash demo.sh

slurm-demo: venv ## a Slurm of two virtual nodes on this machine: train, requeue, resume, evaluate; needs root
	@PATH="$(abspath $(BIN)):$$PATH" bash slurm_demo.sh

test: venv ## the tests, on the CPU, by TEST_PROCESSES=2
	@$(BIN)/python -m pytest -m "not slow and not gpu" -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-training: venv ## training killed, stopped, moved to other layouts, swept, watched, out of disk, by TEST_PROCESSES=2
	@$(BIN)/python -m pytest -m slow tests/launcher/training/test_train.py tests/launcher/sweep tests/launcher/watch tests/data/stream -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-parallel: venv ## twenty steps of the layouts, DeepSpeed's keys, the planner's figures, pretended GPUs, on real processes
	@$(BIN)/python -m pytest -m slow tests/parallel tests/launcher/training/test_running_ahead.py --ignore tests/parallel/test_layout_matrix.py \
		--ignore tests/parallel/planner/test_start_memory.py --ignore tests/parallel/engine/test_compiled.py $(PYTEST_ARGS)

test-service: venv ## the service under load, and its processes killed again and again (DITMOE_KILLS=25)
	@$(BIN)/python -m pytest -m slow tests/sampling/service --ignore tests/sampling/service/page $(PYTEST_ARGS)

test-page: venv ## the page of the service and the gallery in headless Chromium; needs Debian's chromium
	@$(BIN)/python -m pytest -m slow tests/sampling/service/page $(PYTEST_ARGS)

test-slurm: venv ## jobs on a Slurm of two virtual nodes on this machine; needs root and Debian's Slurm
	@$(BIN)/python -m pytest -m slow tests/slurm $(PYTEST_ARGS)

test-crew: venv ## random kills and stops of the workers of a crew, of who leads and who keeps them
	@$(BIN)/python -m pytest -m slow tests/data/crew tests/sampling/evaluation/test_evaluate_crew.py \
		tests/sampling/evaluation/test_evaluate_kills.py tests/launcher/watch tests/launcher/commands/test_work_of_crews.py $(PYTEST_ARGS)

test-metrics: venv ## distances of 2,048 features against 70 digits, figures on 1 to 4 threads, killed trainings
	@$(BIN)/python -m pytest -m slow tests/sampling/metrics tests/sampling/evaluation/test_evaluate_threads.py $(PYTEST_ARGS)

test-drawing: venv ## groups that share out experts, the benchmark of evaluations, small; DiT's and SiT's own code if named
	@$(BIN)/python -m pytest -m slow tests/sampling/drawing tests/sampling/exchange \
		tests/sampling/evaluation/test_evaluation_benchmark.py $(PYTEST_ARGS)

test-memory: venv ## real starts of S and B sizes on 2 and 4 processes hold what the planner says; needs 8 GiB
	@$(BIN)/python -m pytest -m slow tests/parallel/planner/test_start_memory.py $(PYTEST_ARGS)

test-compile: venv ## blocks compiled on this machine against the same blocks without a compiler; needs g++
	@$(BIN)/python -m pytest -m slow tests/model/compiling tests/parallel/engine/test_compiled.py \
		tests/sampling/network/test_compiled.py tests/launcher/training/test_compiled.py $(PYTEST_ARGS)

test-layouts: venv ## every layout against one process over 50 steps: prints the table
	@$(BIN)/python -m pytest -m slow tests/parallel/test_layout_matrix.py $(PYTEST_ARGS)

test-bench: venv ## the whole suite of benchmarks, small; a minute
	@$(BIN)/python -m pytest -m slow tests/benchmarks $(PYTEST_ARGS)

test-docs: venv ## every page's commands, in their order, as a reader would, with fewer steps and images
	@$(BIN)/python -m pytest -m slow tests/docs -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-gpu: venv ## what needs a GPU, and on two of them NCCL and every layout; eight minutes, prints a table of figures
	@$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-all: venv ## also the long matrices, and the tests that need a GPU where there is one
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: venv ## every figure beside a plain baseline and the CPU's limit: a table, and JSON in benchmarks/results
	@$(BIN)/python -m benchmarks.run

bench-gpu: venv ## the same on a GPU: the mixture layer, training, sampling, DeepSpeed's share
	@$(BIN)/python -m benchmarks.run --device cuda

lint: venv ## ruff (rules and layout) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean: ## remove caches and builds; shards, runs and the virtual environment stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
