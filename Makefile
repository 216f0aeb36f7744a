# Every target makes .venv first if it is missing or the pins changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# All but the modules that the benchmarks share.
SHARED_BY_BENCHMARKS := $(addprefix benchmarks/,fault_injection.py line_charts.py pairs.py real_path_rows.py served_streams.py)
BENCHMARKS := $(sort $(filter-out $(SHARED_BY_BENCHMARKS),$(wildcard benchmarks/*.py)))
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export DS_BUILD_OPS = 0

.PHONY: setup check test test-long demo bench format

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) infra/preflight.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt setuptools wheel
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --allow-untyped-calls benchmarks
	$(BIN)/lint-imports

test: setup
	$(BIN)/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-long: setup
	$(BIN)/python -m pytest -m slow --timeout 1200

demo: setup
	$(BIN)/cotrain demo

bench: setup
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev,bench]"
	@status=0; for file in $(BENCHMARKS); do $(BIN)/python $$file || status=1; done; exit $$status

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
