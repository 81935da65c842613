# make demo, make test: each sets up .venv by itself. make dev: build the native side into the source tree.
.DELETE_ON_ERROR:
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := csrc/core/*.h csrc/core/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/ops/*.h csrc/ops/*.cpp csrc/module.cpp tests/cpp/*.cpp

.PHONY: dev lint format
dev:
	$(BIN)/python setup.py -q build_ext --inplace

lint:
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(wildcard $(CPP))

format:
	$(BIN)/ruff check --fix -q . ; $(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(wildcard $(CPP))
