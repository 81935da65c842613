# make help lists the targets. `make demo` and `make test` set everything up by themselves, and work again when run twice.
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_NO_WARN_SCRIPT_LOCATION = 1
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPP_BUILD := build/cpp-tests
CPP = $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cu csrc/cuda/*.cuh csrc/*.h csrc/*.cpp tests/cpp/*.h tests/cpp/*.cpp)
DEMO := runs/demo

.PHONY: help demo test setup dev lint format test-cpp test-python clean

help:  ## this list
	@echo 'usage: make TARGET   (PYTHON=python3.12 make TARGET: another interpreter)'
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-14s%s\n", $$1, $$2 }'

# ---- what a user types ----
demo: setup  ## train a small GPT for three minutes, let it write, and show this machine's speed
	@rm -rf $(DEMO)
	$(BIN)/bigmodel-fast pretrain --minutes 3 --out $(DEMO)
	$(BIN)/bigmodel-fast generate --path $(DEMO) --prompt 'def main(' --max-new-tokens 120
	$(BIN)/bigmodel-fast bench gpt --quick --providers bigmodel_fast,eager,compile --out $(DEMO)/bench

test: setup  ## lint, C++ kernel tests under sanitizers, pytest
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-cpp
	@$(MAKE) --no-print-directory test-python

setup: $(READY)  ## .venv with the pinned torch and all tools, and the native side built into the source tree
	@$(MAKE) --no-print-directory dev

# Made again when what is asked for has changed.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.10 or later" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv: apt install python3-venv" >&2; exit 1; }
	@echo 'set-up 1/3: torch and the build tools into $(VENV); one to three minutes, by the network'
	@$(BIN)/python -m pip install -q -c constraints.txt torch setuptools pybind11 cmake ninja
	@echo 'set-up 2/3: building the operators; about two minutes on two cores'
	@started=$$(date +%s); $(BIN)/python setup.py -q build_ext --inplace && \
	  echo "built in $$(($$(date +%s) - started)) s"
	@echo 'set-up 3/3: what commands and tests use; about a minute'
	@$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# ---- work on the code ----
dev:  ## build the native side again, as far as it has changed
	@$(BIN)/python setup.py -q build_ext --inplace

lint:  ## ruff, mypy, clang-format
	$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check . && $(BIN)/mypy
	@echo $(BIN)/clang-format --dry-run -Werror '<C++ sources>' && $(BIN)/clang-format --dry-run -Werror $(CPP)

format:  ## rewrite what ruff and clang-format can
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(CPP)

test-cpp:  ## the kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer
	@echo 'C++ kernel tests; their first build takes about two minutes'
	@$(BIN)/cmake -S . -B $(CPP_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DBMF_BUILD_TESTS=ON \
	  -DBMF_SANITIZE=address,undefined --log-level=WARNING
	@$(BIN)/cmake --build $(CPP_BUILD) -- --quiet
	@$(BIN)/ctest --test-dir $(CPP_BUILD) --output-on-failure

test-python:  ## pytest
	$(BIN)/python -m pytest

clean:  ## remove what was built, but not .venv
	rm -rf build dist *.egg-info bigmodel_fast/*.so
