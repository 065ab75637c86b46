# syntax=docker/dockerfile:1
# A device, amd64 or arm64: the SuperNode and what its ClientApp needs, no Ray. From the repository's folder:
#   docker build --file docker/device.Dockerfile --tag fedara/device:0.2.0 .
# pip's settings: --secret id=pip,src=PIP.CONF, which no layer keeps, or build arguments, which the image's history shows.
# TORCH as build argument: see install-device.sh.
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
COPY docker/install.sh docker/environment.sh docker/install-device.sh docker/device* docker/
RUN --mount=type=secret,id=pip \
    STEP=packages PIP_CONFIG_FILE=/run/secrets/pip sh docker/install-device.sh \
    && useradd --uid 1000 --create-home fedara
COPY --chmod=0755 docker/health.py /usr/local/bin/fedara-health
COPY pyproject.toml README.md LICENSE ./
COPY fedara_flwr fedara_flwr
RUN --mount=type=secret,id=pip \
    STEP=app PIP_CONFIG_FILE=/run/secrets/pip sh docker/install-device.sh

ARG VERSION=0.2.0
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="fedara device" \
    org.opencontainers.image.description="A device of fedara-flwr: Flower's SuperNode and what the ClientApp needs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
USER 1000:1000
WORKDIR /site
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["fedara-health", "http://127.0.0.1:9094/health"]
CMD ["sh", "/site/start.sh"]
