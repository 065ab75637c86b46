#!/bin/sh
# Installs what a device needs: this package, without Ray and without pages of runs.
#   sh docker/install-device.sh [VENV]      into this virtual environment; made if it is not there; none = python3's own
# TORCH: which torch, as pip names it, or "installed" where the vendor's build is there already (Jetson).
# pip's own variables (PIP_INDEX_URL, …) count.
set -eu
docker=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec sh "$docker/install.sh" "$docker/device-requirements.txt" "$@"
