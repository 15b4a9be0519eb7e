# One command each, from a fresh clone: `make demo`, `make test`, `make lint`, `make bench`.
# Each makes the environment first if it is missing or older than pyproject.toml or constraints.txt.
#
# PYTHON    the interpreter that makes the environment, 3.11 or newer (default: python3)
# PIP_ARGS  more arguments for pip, such as another package index
# WORKERS   test processes (default: one a core, at most 4)
# ARGS      more arguments for the script, pytest or the benchmark

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= logical
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## show this list
	@grep -E '^[.a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) \
		| awk -F ':.*## ' '{printf "  make %-6s  %s\n", $$1, $$2}'
	@echo "On a machine without a GPU, this fetches the smaller CPU build of torch:"
	@echo "  make .venv PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'"

.venv: $(READY) ## make the environment of all commands below (2 to 6 GB, some minutes)

# The marker is written last: an environment whose making was cut short is made again.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON): no such program. Install Python 3.11 or newer, or say which one:" \
			"make .venv PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$($(PYTHON) -V); moeroute needs Python 3.11 or newer. Say which one:" \
			"make .venv PYTHON=python3.12" >&2; exit 1; }
	@echo "== $(VENV): $$($(PYTHON) -V), the versions of constraints.txt"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) \
		--constraint constraints.txt torch --editable '.[dev]'
	@$(BIN)/python -c 'import torch; print("== torch", torch.__version__, "| CUDA device:", torch.cuda.is_available())'
	@touch $(READY)

demo: .venv ## make a small checkpoint, fine-tune it with a mixture of LoRA experts, show the figures
	$(BIN)/python examples/finetune_mixlora.py $(ARGS)

test: .venv ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

lint: .venv ## ruff, pyright and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: .venv ## measure the kernels and layers side by side with their baselines
	$(BIN)/python -m benchmarks.run $(ARGS)

clean: ## remove the environment, caches and built files
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src kernels tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
