# syntax=docker/dockerfile:1
# A device, amd64 or arm64: the SuperNode and what its ClientApp needs, no Ray. From the repository's folder:
#   docker build --file docker/device.Dockerfile --tag fedara/device:0.2.0 .
# pip's settings and TORCH as build arguments, see install-device.sh.
# A tag can be given to another image, a digest cannot (docs/deploy.md): --build-arg BASE=python@sha256:…
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

ARG TORCH=""
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/fedara
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker docker
COPY fedara_flwr fedara_flwr
RUN sh docker/install-device.sh \
    && install -m 0755 docker/health.py /usr/local/bin/fedara-health \
    && useradd --uid 1000 --create-home fedara

USER 1000:1000
WORKDIR /site
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["fedara-health", "http://127.0.0.1:9094/health"]
CMD ["sh", "/site/start.sh"]
