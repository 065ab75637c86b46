#!/bin/sh
# Tells the SuperLink the public keys in nodes/: once for each node, while the SuperLink runs; waits a minute until it does.
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/environment.sh"

failed=0
tries=30
for key in "$here"/nodes/*.pub; do
    if [ ! -f "$key" ]; then
        echo "register.sh: no public key in $here/nodes" >&2
        exit 1
    fi
    name=$(basename -- "$key" .pub)
    while :; do
        # Flower's exit code says nothing here, its answer does
        answer=$(flwr supernode register "$key" site --name "$name" --format json 2>&1) || :
        case $answer in
            *'SuperLink is unavailable'*)
                if [ "$tries" = 0 ]; then
                    echo 'the SuperLink does not answer: is "sh start.sh" running on this server?' >&2
                    exit 1
                fi
                [ "$tries" -lt 30 ] || echo "the SuperLink does not answer yet; waiting for it" >&2
                tries=$((tries - 1))
                sleep 2
                ;;
            *) break ;;
        esac
    done
    case $answer in
        *'"success": true'*)
            id=$(echo "$answer" | sed -n 's/.*"node-id": *"\{0,1\}\([0-9]\{1,\}\).*/\1/p')
            # for `fedara deploy nodes`: id, name, key
            printf '%s %s %s\n' "$id" "$name" "$(cut -d ' ' -f 2 "$key")" >>"$FLWR_HOME/registered"
            echo "$name: registered"
            ;;
        *'Public key already in use'*) echo "$name: registered before" ;;
        *)
            echo "$name: $answer" >&2
            failed=1
            ;;
    esac
done
exit "$failed"
