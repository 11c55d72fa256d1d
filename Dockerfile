# Two images: `cuda`, which is built where nothing is said, and with --target cpu one of a fraction of its size.
#
# What is installed is what requirements.lock says, by hash (`make lock`). PyTorch's wheel for the CPU alone is not in
# it: it comes from an index of its own, under other hashes, and is pinned by its version.
#
# BASE is a Debian with Python 3.11 or newer and its venv. A tag moves; a digest behind it does not:
# --build-arg BASE=python:3.12-slim@sha256:...
ARG BASE=python:3.12-slim

FROM ${BASE} AS common
RUN useradd --uid 10001 --create-home lorarep \
 && install --directory --owner=lorarep /cache \
 && python -m venv /opt/lorarep
ENV PATH=/opt/lorarep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton
# All but torch and what it brings, of which each image has its own: a layer for both.
COPY requirements.lock /opt/lorarep/
RUN --mount=type=cache,target=/root/.cache/pip \
    awk '/^[^ ]/ {torch = /^(torch|triton|cuda-toolkit|nvidia-[^=]*)==/} !torch' /opt/lorarep/requirements.lock \
      > /tmp/common.lock \
 && pip install --require-hashes --no-deps --requirement /tmp/common.lock \
 && rm /tmp/common.lock
VOLUME /cache
EXPOSE 50051 8000 9095
STOPSIGNAL SIGTERM
# Readiness; half an hour for a first download. With TLS, LORAREP_HEALTH_TLS_CA and its like say how to ask.
HEALTHCHECK --start-period=30m --interval=10s --timeout=10s CMD ["lorarep", "health"]
ENTRYPOINT ["lorarep"]
# Tokens come from a mounted folder, so that a file which takes another's place in it is seen.
CMD ["serve", "--listen", "0.0.0.0:50051", "--openai-listen", "0.0.0.0:8000", "--metrics-listen", "0.0.0.0:9095", \
     "--token-file", "/run/secrets/lorarep/tokens"]
LABEL org.opencontainers.image.title="lorarep" \
      org.opencontainers.image.description="A gRPC server for language models whose PEFT adapters use layer_replication" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

FROM common AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY proto proto
COPY lorarep_runtime lorarep_runtime
COPY server server
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels .

FROM common AS cpu
# PyTorch's index of CPU wheels.
ARG PIP_EXTRA_INDEX_URL
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps torch==2.13.0 \
 && python -c "import torch; assert torch.version.cuda is None, 'not a wheel for the CPU alone'"
# The code is the last layer, and the only one that changes with it.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
 && pip check \
 && ln -s /opt/lorarep/lib/python3.*/site-packages/lorarep_server/demo/models /opt/lorarep/demo
USER 10001

FROM common AS cuda
# triton compiles its launchers with the system's C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
# The wheels bring the CUDA libraries; the host needs only its driver.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --requirement /opt/lorarep/requirements.lock
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
 && pip check \
 && ln -s /opt/lorarep/lib/python3.*/site-packages/lorarep_server/demo/models /opt/lorarep/demo
USER 10001
