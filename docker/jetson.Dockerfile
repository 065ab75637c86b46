# syntax=docker/dockerfile:1
# A Jetson: as device.Dockerfile, with the CUDA build of torch that its base image has: the vendor's PyTorch image, in NVIDIA's
# catalogue "pytorch", of a release with Python 3.12. JetPack 6 (L4T r36; its own Python 3.10 is too old for flwr): a tag that
# ends in -igpu. JetPack 7 on a Jetson Thor (L4T r38): one without. On the Jetson, from the repository's folder:
#   docker build --file docker/jetson.Dockerfile --tag fedara/jetson:0.2.0 --build-arg BASE=…/pytorch@sha256:… .
# It has no default: whoever builds names the digest that he has looked up (docs/containers.md).
ARG BASE
# hadolint ignore=DL3006 # there is no tag to pin
FROM ${BASE}

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# the vendor's own constraints are for its own image
ENV TORCH=installed PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=
WORKDIR /opt/fedara
# what changes seldom comes first: other code does not install the packages again
COPY constraints.txt ./
COPY docker/install.sh docker/environment.sh docker/install-device.sh docker/device* docker/
RUN --mount=type=secret,id=pip \
    STEP=packages PIP_CONFIG_FILE=/run/secrets/pip sh docker/install-device.sh
COPY --chmod=0755 docker/health.py /usr/local/bin/fedara-health
COPY pyproject.toml README.md LICENSE ./
COPY fedara_flwr fedara_flwr
RUN --mount=type=secret,id=pip \
    STEP=app PIP_CONFIG_FILE=/run/secrets/pip sh docker/install-device.sh

ARG VERSION=0.2.0
ARG REVISION=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="fedara jetson" \
    org.opencontainers.image.description="A device of fedara-flwr with the torch of NVIDIA's image for Jetson" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
# a number needs no entry in the base image's list of users
USER 1000:1000
WORKDIR /site
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["fedara-health", "http://127.0.0.1:9094/health"]
CMD ["sh", "/site/start.sh"]
