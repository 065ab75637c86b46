#!/bin/sh
# Installs what a server needs: this package with pages of runs, without Ray (that is for simulations).
#   sh docker/install-server.sh [VENV]      into this virtual environment; made if it is not there; none = python3's own
# TORCH: which torch, as pip names it; else the one of constraints.txt, on aarch64 the last CPU build. pip's own variables (PIP_INDEX_URL, …) count.
set -eu
docker=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec sh "$docker/install.sh" "$docker/server-requirements.txt" "$@"
