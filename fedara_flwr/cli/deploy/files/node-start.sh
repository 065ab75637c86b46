#!/bin/sh
# Starts this node's SuperNode and keeps it running; Ctrl-C or SIGTERM ends it.
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/settings.env"
[ -z "${VENV:-}" ] || PATH="$VENV/bin:$PATH"
export FLWR_HOME="$here/home"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="$POLL_SECONDS" TOKENIZERS_PARALLELISM=false PATH
# the ClientApp reaches its SuperNode past any proxy
no_proxy=${no_proxy:-${NO_PROXY:-}}
no_proxy=${no_proxy:+$no_proxy,}localhost,127.0.0.1,::1
NO_PROXY=$no_proxy
export no_proxy NO_PROXY
mkdir -p "$FLWR_HOME"
if [ "${ADDRESS_SPACE_MB:-0}" -gt 0 ]; then
    if [ -e /dev/nvidiactl ] || [ -e /dev/nvmap ]; then
        echo "ADDRESS_SPACE_MB=$ADDRESS_SPACE_MB is not set: CUDA maps more than it uses" >&2
    else
        # shellcheck disable=SC3045 # dash and busybox have it
        ulimit -v $((ADDRESS_SPACE_MB * 1024))
    fi
fi

child=
trap 'trap - INT TERM; [ -z "$child" ] || kill "$child" 2>/dev/null || :; wait; exit 0' INT TERM
while :; do
    flower-supernode --superlink "$SUPERLINK" --root-certificates "$here/ca.crt" \
        --auth-supernode-private-key "$here/node.key" --node-config "$here/node.toml" \
        --host 127.0.0.1 --port "$RUNTIME_PORT" &
    child=$!
    status=0
    wait "$child" || status=$?
    # the SuperLink refuses a node that it still takes for alive, which is so for up to a minute after a hard end
    echo "$(date '+%F %T') the SuperNode ended with code $status; again in $RESTART_SECONDS s" >&2
    sleep "$RESTART_SECONDS" &
    child=$!
    wait "$child" || :
done
