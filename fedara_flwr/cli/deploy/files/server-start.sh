#!/bin/sh
# Starts this site's server and keeps it running; Ctrl-C or SIGTERM ends it.
#   sh start.sh          everything: SuperLink, SuperExec (runs the ServerApp), gateway (what nodes reach)
#   sh start.sh PART     one part alone: superlink, superexec or gateway
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/environment.sh"
if [ "${ADDRESS_SPACE_MB:-0}" -gt 0 ]; then
    if [ -e /dev/nvidiactl ] || [ -e /dev/nvmap ]; then
        echo "ADDRESS_SPACE_MB=$ADDRESS_SPACE_MB is not set: CUDA maps more than it uses" >&2
    else
        # shellcheck disable=SC3045 # dash and busybox have it
        ulimit -v $((ADDRESS_SPACE_MB * 1024))
    fi
fi

part() {
    case $1 in
        superlink)
            mkdir -p "$here/state"
            # --isolation process: the ServerApp is no child of the SuperLink, and outlives its restart
            set -- flower-superlink --host "$SUPERLINK_LISTEN" --port "$SUPERLINK_PORT" \
                --ssl-ca-certfile "$here/ca.crt" --ssl-certfile "$here/server.pem" --ssl-keyfile "$here/server.key" \
                --enable-supernode-auth --isolation process --database "$here/state/superlink.db" \
                --superexec-auth-secret-file "$here/superexec.secret" --disable-runtime-dependency-installation
            ;;
        superexec)
            set -- flower-superexec --runtime-api-address "$SUPERLINK_HOST:$SUPERLINK_PORT" \
                --root-certificates "$here/ca.crt" --superexec-auth-secret-file "$here/superexec.secret"
            ;;
        gateway)
            set -- fedara deploy gateway "$here" --superlink "$SUPERLINK_HOST:$SUPERLINK_PORT" \
                --listen "$LISTEN" --port "$PORT" --max-request-mb "$MAX_REQUEST_MB" \
                --max-connections "$MAX_CONNECTIONS" --max-per-address "$MAX_PER_ADDRESS" --body-seconds "$BODY_SECONDS"
            ;;
        *)
            echo "start.sh $1: allowed are superlink, superexec, gateway" >&2
            exit 2
            ;;
    esac
    exec "$@"
}

# keep PART: runs it in a process of its own and starts it again when it ends
keep() {
    child=
    trap 'trap - TERM; [ -z "$child" ] || kill "$child" 2>/dev/null || :; wait; exit 0' TERM
    while :; do
        (part "$1") &
        child=$!
        status=0
        wait "$child" || status=$?
        echo "$(date '+%F %T') $1 ended with code $status; again in $RESTART_SECONDS s" >&2
        sleep "$RESTART_SECONDS" &
        child=$!
        wait "$child" || :
    done
}

if [ $# -gt 0 ]; then
    part "$1"
fi
pids=
for name in superlink superexec gateway; do
    keep "$name" &
    pids="$pids $!"
done
# shellcheck disable=SC2086 # a list
trap 'trap - INT TERM; kill $pids 2>/dev/null || :; wait; exit 0' INT TERM
wait
