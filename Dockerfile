# syntax=docker/dockerfile:1
# Two images: `cpu` (the default) answers at once with the embedded model; `cuda` takes a model as its argument.
#   docker build -t thinkserve .                        docker run -p 8000:8000 thinkserve
#   docker build -t thinkserve:cuda --target cuda .     docker run --gpus all -p 8000:8000 thinkserve:cuda serve Qwen/Qwen3-8B
# The CPU build of torch lies on PyTorch's own index: docker build --build-arg PIP_EXTRA_INDEX_URL=... (README, Install).
# Runs as uid 10001 with a read-only root: docker run --read-only --tmpfs /tmp -v cache:/cache ...
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS base
ENV PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PATH=/opt/venv/bin:$PATH

FROM base AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
WORKDIR /build
COPY requirements requirements

FROM builder AS cpu-builder
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-compile --no-deps --only-binary :all: -r requirements/cpu.txt \
    && pip install --no-compile --no-deps --only-binary :all: -r requirements/torch-cpu.txt
COPY . .
# Some files of torch are for newer Pythons and do not compile; those it does without.
RUN pip install --no-deps --no-build-isolation . && { python -m compileall -q -j 0 /opt/venv/lib || true; }

FROM builder AS cuda-builder
RUN pip install --no-compile --no-deps --only-binary :all: -r requirements/cuda.txt
COPY . .
# Some files of torch are for newer Pythons and do not compile; those it does without.
RUN pip install --no-deps --no-build-isolation . && { python -m compileall -q -j 0 /opt/venv/lib || true; }

FROM base AS runtime
RUN useradd --uid 10001 --create-home --home-dir /cache --shell /usr/sbin/nologin thinkserve
# The server listens inside the container only; what reaches it is decided by `docker run -p`.
ENV THINKSERVE_HOST=0.0.0.0 THINKSERVE_PORT=8000 \
    HOME=/cache XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"THINKSERVE_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["thinkserve"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles its launchers on first use. hadolint wants versions; the base image's release fixes them well enough.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=cuda-builder /opt/venv /opt/venv
USER 10001:10001

FROM runtime AS cpu
# vLLM's CPU kernels are linked against libnuma; ours are compiled for the processor at hand, at the first start.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 g++ && rm -rf /var/lib/apt/lists/*
COPY --from=cpu-builder /opt/venv /opt/venv
USER 10001:10001
