# Serves on CUDA through the torch wheels, which bring the CUDA libraries; the host needs only its driver.
FROM python:3.12-slim AS build
WORKDIR /src
# PyTorch's index of CPU wheels, for an image without CUDA.
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/lorarep
# Its own layer: gigabytes that change with the torch version alone.
RUN /opt/lorarep/bin/pip install --no-cache-dir torch==2.13.0
COPY pyproject.toml README.md ./
COPY proto proto
COPY lorarep_runtime lorarep_runtime
COPY server server
RUN /opt/lorarep/bin/pip install --no-cache-dir .

FROM python:3.12-slim
# triton compiles its launchers with the system's C compiler.
RUN apt-get update \
 && apt-get install --no-install-recommends --yes gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home lorarep \
 && install --directory --owner=lorarep /cache
COPY --from=build /opt/lorarep /opt/lorarep
USER 10001
ENV PATH=/opt/lorarep/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton
VOLUME /cache
EXPOSE 50051 9095
STOPSIGNAL SIGTERM
ENTRYPOINT ["lorarep"]
# Tokens come from a mounted folder, so that a file which takes another's place in it is seen.
CMD ["serve", "--listen", "0.0.0.0:50051", "--metrics-listen", "0.0.0.0:9095", \
     "--token-file", "/run/secrets/lorarep/tokens"]
