# syntax=docker/dockerfile:1
# A Jetson with JetPack 6 (L4T r36): as device.Dockerfile, with the CUDA build of torch that its base image has. JetPack's
# own Ubuntu 22.04 has Python 3.10, too old for flwr 1.41. The base is the vendor's PyTorch image for Jetson: in NVIDIA's
# catalogue "pytorch", a tag that ends in -igpu, of a release with Python 3.12. On the Jetson, from the repository's folder:
#   docker build --file docker/jetson.Dockerfile --tag fedara/jetson:0.2.0 --build-arg BASE=…/pytorch@sha256:… .
# It has no default: whoever builds names the digest that he has looked up (docs/deploy.md).
ARG BASE
# hadolint ignore=DL3006 # there is no tag to pin
FROM ${BASE}

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
# the vendor's own constraints are for its own image
ENV TORCH=installed PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=
WORKDIR /opt/fedara
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker docker
COPY fedara_flwr fedara_flwr
# the base image has a user 1000 already
RUN sh docker/install-device.sh \
    && install -m 0755 docker/health.py /usr/local/bin/fedara-health

USER 1000:1000
WORKDIR /site
HEALTHCHECK --interval=30s --timeout=10s --start-period=90s --retries=3 \
    CMD ["fedara-health", "http://127.0.0.1:9094/health"]
CMD ["sh", "/site/start.sh"]
