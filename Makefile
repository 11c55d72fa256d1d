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

.PHONY: demo test check proto lock image

demo: .venv/installed
	$(BIN)/lorarep demo

test: .venv/installed tests/clients/node_modules
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

proto: .venv/installed
	$(BIN)/python -m grpc_tools.protoc --plugin=$(BIN)/protoc-gen-mypy -I proto --python_out=proto \
	  --grpc_python_out=proto --mypy_out=proto proto/lorarep/v1/*.proto proto/fmaas/*.proto

# What images install. Keeps the versions that are in it, unless it is deleted before.
lock: .venv/installed
	echo "$(TORCH)" | $(BIN)/uv pip compile pyproject.toml - --extra traces --universal --python-version 3.11 --generate-hashes --quiet \
	  --custom-compile-command "make lock" --output-file requirements.lock

image:
	$(BUILD) --target $(TARGET) --label org.opencontainers.image.revision="$$(git rev-parse HEAD)" --tag lorarep .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) "$(TORCH)"
	$(PIP) --editable '.[dev]'
	touch $@

tests/clients/node_modules: tests/clients/package-lock.json .venv/installed
	$(BIN)/npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund --silent
	touch $@
