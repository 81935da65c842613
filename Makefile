# make demo, make test: each sets up .venv by itself, and both work again when run twice.
# make dev: build the native side into the source tree. PYTHON=python3.12 make ...: another interpreter.
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP = $(wildcard csrc/core/*.h csrc/core/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/ops/*.h csrc/ops/*.cpp csrc/module.cpp \
                 tests/cpp/*.h tests/cpp/*.cpp)

.PHONY: demo test setup dev lint format clean

# ---- what a user types ----
test: setup
	$(MAKE) lint
	$(BIN)/python -m pytest

setup: $(READY)
	@$(MAKE) --no-print-directory dev

# ---- set-up: the pinned torch and everything the tests and the demo use; again when what is asked for has changed ----
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or later" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools pybind11 cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# ---- work on the code ----
dev:
	$(BIN)/python setup.py -q build_ext --inplace

lint:
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format:
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf build dist *.egg-info bigmodel_fast/*.so
