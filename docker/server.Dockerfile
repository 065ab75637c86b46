# syntax=docker/dockerfile:1
# The server: SuperLink, SuperExec with the ServerApp, gateway. From the repository's folder:
#   docker build --file docker/server.Dockerfile --tag fedara/server:0.2.0 .
# pip's settings and TORCH as build arguments, see install-server.sh.
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
RUN sh docker/install-server.sh \
    && install -m 0755 docker/health.py /usr/local/bin/fedara-health \
    && useradd --uid 1000 --create-home fedara

USER 1000:1000
WORKDIR /site
# the gateway; compose.yml has a check for each part
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["fedara-health", "https://localhost:8000/health", "/site/ca.crt"]
CMD ["sh", "/site/start.sh"]
