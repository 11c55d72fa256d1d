PYTHON ?= python3
# The exact pin keeps every machine on one build; a CPU-only machine may install its own CPU wheel of the same version.
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
# Python compiles what it imports, if it may keep that; pip would compile all there is.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
# Any builder of Dockerfiles with --mount; and the image, cuda or cpu. The latter also needs --build-arg
# PIP_EXTRA_INDEX_URL=... in BUILD, PyTorch's index of CPU wheels.
BUILD  ?= docker build
TARGET ?= cuda
# The image below it. A digest pins it: python:3.12-slim@sha256:...
BASE   ?= python:3.12-slim

# Tests without servers, browsers, images, GPU kernels, or long comparisons with other libraries.
FAST   := $(addprefix tests/,text model device adapters engine test_architecture.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast coverage check format proto lock image

help: ## Lists the targets.
	@sed -En 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 12

demo: .venv/installed ## Serves a small base and adapters, and shows them stream.
	$(BIN)/lorarep demo

test: .venv/installed tests/clients/node_modules ## Runs all tests.
	$(BIN)/pytest

test-fast: .venv/installed ## Runs the tests that need no server, browser or image.
	$(BIN)/pytest $(FAST)

coverage: .venv/installed ## Runs the fast tests, and checks how much of the runtime they run.
	$(BIN)/pytest $(FAST) --cov --cov-report=term

check: .venv/installed ## Checks style, types, imports between folders and the Dockerfile.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/hadolint Dockerfile

format: .venv/installed ## Formats the code and repairs what the linter can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/installed ## Generates Python from the protos.
	$(BIN)/python -m grpc_tools.protoc --plugin=$(BIN)/protoc-gen-mypy -I proto --python_out=proto \
	  --grpc_python_out=proto --mypy_out=proto proto/lorarep/v1/*.proto proto/fmaas/*.proto

# Images install the versions in requirements.lock. They stay as they are, unless the file is deleted before.
lock: .venv/installed ## Resolves the versions that images install.
	echo "$(TORCH)" | $(BIN)/uv pip compile pyproject.toml - --extra traces --universal --python-version 3.11 --generate-hashes --quiet \
	  --custom-compile-command "make lock" --output-file requirements.lock

image: ## Builds the image; TARGET is cuda or cpu.
	$(BUILD) --target $(TARGET) --build-arg BASE=$(BASE) --label org.opencontainers.image.revision="$$(git rev-parse HEAD)" --tag lorarep .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) --editable '.[dev]'
	touch $@

tests/clients/node_modules: tests/clients/package-lock.json .venv/installed
	$(BIN)/npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund --silent
	touch $@
