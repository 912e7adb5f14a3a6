# syntax=docker/dockerfile:1
# docker build --target cpu -t skyrl:cpu .          docker build --target cuda -t skyrl:cuda .
# For drivers of CUDA 11: docker build --target cuda11 -t skyrl:cuda11 .
# A release: --build-arg VERSION=0.2.0 --build-arg REVISION="$(git rev-parse HEAD)"; without VERSION it is 0.0.0, since there is no git here.
# Behind an air gap: --build-arg BASE=registry.local/python:3.12-slim --build-arg PIP_INDEX_URL=https://pypi.local/simple
# What is tested is pinned by constraints.txt; torch's wheels bring their own CUDA libraries, so that all targets have one base.
ARG BASE=python:3.12-slim

# hadolint ignore=DL3006
FROM ${BASE} AS base
# g++: the sampler's CPU kernels and Triton's launchers are compiled at their first use. tini: reaps what ranks leave behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/skyrl/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_DISABLE_TELEMETRY=1

# skyrl itself, once for all targets. The version comes from the tag, and the context has no git.
FROM base AS wheel
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG VERSION=0.0.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY conf conf
COPY docs/metrics.md docs/metrics.md
COPY launch launch
COPY skyrl skyrl
RUN python3 -m venv /tmp/pip \
    && PIP_INDEX_URL=${PIP_INDEX_URL} SETUPTOOLS_SCM_PRETEND_VERSION=${VERSION} /tmp/pip/bin/pip wheel --no-cache-dir --no-deps -w /wheels .

FROM base AS packages
ARG PIP_INDEX_URL=https://pypi.org/simple
ENV PIP_INDEX_URL=${PIP_INDEX_URL} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/skyrl
COPY constraints.txt ./

FROM base AS final
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="skyrl" \
      org.opencontainers.image.description="Reinforcement learning for language models on your own GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN useradd --uid 1000 --create-home skyrl && mkdir /runs && chown skyrl:skyrl /runs
USER 1000:1000
WORKDIR /runs
# A server says where it is asked: -e SKYRL_HEALTH_URL=http://127.0.0.1:8000/api/v1/readyz. A training run has its own watchdog.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python", "-c", "import os, urllib.request as r; u = os.environ.get('SKYRL_HEALTH_URL'); u and r.urlopen(u, timeout=8)"]
ENTRYPOINT ["tini", "-g", "--"]
CMD ["skyrl-tx", "--help"]

# A target installs torch first and alone, so that a change of skyrl's own code does not load it again. Its index stands beside the other
# and not instead of it, since it lacks most pinned packages. 2.13.0+cpu counts as newer than 2.13.0: the builds without CUDA are 4 GB smaller.
FROM packages AS packages-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_EXTRA_INDEX_URL=${TORCH_CPU_INDEX}
RUN pip install -c constraints.txt torch
COPY --from=wheel /wheels /wheels
ARG EXTRAS=serve,dashboard
RUN pip install -c constraints.txt "$(echo /wheels/*.whl)[${EXTRAS}]"

FROM final AS cpu
COPY --from=packages-cpu /opt/skyrl /opt/skyrl

FROM final AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

# The last release of torch with wheels for CUDA 11; all else is pinned as elsewhere.
FROM packages AS packages-cuda11
ARG TORCH_CUDA11=2.7.1+cu118
ARG TORCH_CUDA11_INDEX=https://download.pytorch.org/whl/cu118
ENV PIP_EXTRA_INDEX_URL=${TORCH_CUDA11_INDEX}
RUN sed -i "s/^torch==.*/torch==${TORCH_CUDA11}/" constraints.txt && pip install -c constraints.txt torch
COPY --from=wheel /wheels /wheels
ARG CUDA_EXTRAS=serve,dashboard,deepspeed
RUN pip install -c constraints.txt "$(echo /wheels/*.whl)[${CUDA_EXTRAS}]"

FROM gpu AS cuda11
COPY --from=packages-cuda11 /opt/skyrl /opt/skyrl

FROM packages AS packages-cuda
RUN pip install -c constraints.txt torch
COPY --from=wheel /wheels /wheels
ARG CUDA_EXTRAS=serve,dashboard,deepspeed
RUN pip install -c constraints.txt "$(echo /wheels/*.whl)[${CUDA_EXTRAS}]"

FROM gpu AS cuda
COPY --from=packages-cuda /opt/skyrl /opt/skyrl
