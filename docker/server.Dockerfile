# syntax=docker/dockerfile:1
# The server: SuperLink, SuperExec with the ServerApp, gateway. From the repository's folder:
#   docker build --file docker/server.Dockerfile --tag fedara/server:0.2.0 .
# pip's settings: --secret id=pip,src=PIP.CONF, which no layer keeps, or build arguments, which the image's history shows.
# TORCH as build argument: see install-server.sh.
# A tag can be given to another image, a digest cannot (docs/containers.md): --build-arg BASE=python@sha256:…
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

ARG TORCH=""
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/fedara
# what changes seldom comes first: other code does not install the packages again
COPY constraints.txt ./
COPY docker/install.sh docker/environment.sh docker/install-server.sh docker/server* docker/
RUN --mount=type=secret,id=pip \
    STEP=packages PIP_CONFIG_FILE=/run/secrets/pip sh docker/install-server.sh \
    && useradd --uid 1000 --create-home fedara
COPY --chmod=0755 docker/health.py /usr/local/bin/fedara-health
COPY pyproject.toml README.md LICENSE ./
COPY fedara_flwr fedara_flwr
RUN --mount=type=secret,id=pip \
    STEP=app PIP_CONFIG_FILE=/run/secrets/pip sh docker/install-server.sh

ARG VERSION=0.2.0
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="fedara server" \
    org.opencontainers.image.description="The server of fedara-flwr: Flower's SuperLink, SuperExec with the ServerApp, gateway" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
WORKDIR /site
# the gateway; compose.yml has a check for each part
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["fedara-health", "https://localhost:8000/health", "/site/ca.crt"]
CMD ["sh", "/site/start.sh"]
