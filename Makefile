PYTHON ?= python3
# The exact pin keeps every machine on one build; a CPU-only machine may install its own CPU wheel of the same version.
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
# Python compiles what it imports, if it may keep that; pip would compile all there is.
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# uv resolves in a fraction of pip's time. It reads none of pip's settings but the index given here, so torch is pip's.
INDEX  := $(if $(PIP_INDEX_URL),--default-index $(PIP_INDEX_URL))
UV     := $(BIN)/uv pip install --quiet $(INDEX)
unexport PYTHONDONTWRITEBYTECODE
# Any builder of Dockerfiles with --mount; and the image, cuda or cpu. The latter also needs --build-arg
# PIP_EXTRA_INDEX_URL=... in BUILD, PyTorch's index of CPU wheels.
BUILD  ?= docker build
TARGET ?= cuda
# The image below it. A digest pins it: python:3.12-slim@sha256:...
BASE   ?= python:3.12-slim

# Tests that need processors to themselves, and are no part of CI.
RAY    := tests/deploy/test_ray.py
# Tests without servers, browsers, images, GPU kernels, or long comparisons with other libraries.
FAST   := $(addprefix tests/,text model device adapters engine test_architecture.py)
# Tests of what each library is used for: tokenizers, the Hub, weights of all kinds, every protocol of a server, traces.
USES   := $(addprefix tests/,text/test_tokenizer.py hub model/test_linear.py parity/test_mixes.py \
            server/test_tracing.py::test_requests_of_every_api_are_traced)
LOWEST := .venv/lowest

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-slow test-ray test-lowest coverage check format proto lock image

help: ## Lists the targets.
	@sed -En 's/^([a-z-]+):.*## (.*)/\1\t\2/p' Makefile | expand -t 12

demo: .venv/installed ## Serves a small base and adapters, and shows them stream.
	$(BIN)/lorarep demo

# Each test runs once. The fast ones are traced, for their coverage; tracing would slow those with deadlines.
test: coverage test-slow ## Runs all tests, but for those of Ray.

test-fast: .venv/installed ## Runs the tests that need no server, browser or image.
	$(BIN)/pytest $(FAST)

test-slow: .venv/installed tests/clients/node_modules tests/clients/.venv/installed ## Runs the tests that test-fast leaves out.
	$(BIN)/pytest $(addprefix --ignore=,$(FAST) $(RAY))

# By themselves: Ray gives its own processes half a minute to start, and takes a minute and a half.
test-ray: .venv/installed ## Runs the tests of Ray.
	$(BIN)/pytest -n 0 $(RAY)

# All but torch, whose builds are too large, and what only tests need: those are found in the other environment.
test-lowest: .venv/installed ## Runs some tests with the lowest versions that pyproject.toml admits.
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(LOWEST)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import site; print(*site.getsitepackages())")')" \
	  > $$(echo $(LOWEST)/lib/python3*/site-packages)/parent.pth
	echo "torch; sys_platform == 'never'" > $(LOWEST)/overrides.txt
	VIRTUAL_ENV=$(LOWEST) $(UV) --resolution lowest-direct --override $(LOWEST)/overrides.txt \
	  --requirement pyproject.toml --extra traces
	$(LOWEST)/bin/python -m pytest -n 0 $(USES)

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
	$(PIP) "$(TORCH)" uv
	VIRTUAL_ENV=.venv $(UV) --editable '.[dev]'
	touch $@

tests/clients/node_modules: tests/clients/package-lock.json .venv/installed
	$(BIN)/npm ci --prefix tests/clients --ignore-scripts --no-audit --no-fund --silent
	touch $@

# Clients in Python have an environment of their own. What it lacks, it finds in the other one.
tests/clients/.venv/installed: tests/clients/requirements.txt .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(@D)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import site; print(*site.getsitepackages())")')" \
	  > $$(echo $(@D)/lib/python3*/site-packages)/parent.pth
	printf "torch; sys_platform == 'never'\ntransformers; sys_platform == 'never'\n" > $(@D)/overrides.txt
	VIRTUAL_ENV=$(@D) $(UV) --override $(@D)/overrides.txt --requirement $<
	touch $@
