#!/bin/sh
# Tells the SuperLink the public keys in nodes/: once for each node, while the SuperLink runs.
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/environment.sh"

failed=0
for key in "$here"/nodes/*.pub; do
    name=$(basename -- "$key" .pub)
    # Flower's exit code says nothing here, its answer does
    answer=$(flwr supernode register "$key" site --name "$name" --format json 2>&1) || :
    case $answer in
        *'"success": true'*) echo "$name: registered" ;;
        *'Public key already in use'*) echo "$name: registered before" ;;
        *)
            echo "$name: $answer" >&2
            failed=1
            ;;
    esac
done
exit "$failed"
