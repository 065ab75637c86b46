#!/bin/sh
# Runs the app on the nodes and shows its log; the exit code is the run's, which `flwr run --stream` does not give.
#   sh run.sh APP [options of flwr run]      for example: sh run.sh ~/fedara --run-config "method='fedlora'"
# Ctrl-C leaves the run going: `sh flwr.sh list` shows it, `sh flwr.sh stop ID` ends it.
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/environment.sh"

if [ $# -eq 0 ]; then
    echo "run.sh: name the app's folder: sh run.sh APP [options of flwr run]" >&2
    exit 2
fi
app=$1
shift
answer=$(flwr run "$app" site --format json "$@" 2>&1) || :
id=$(echo "$answer" | sed -n 's/.*"run-id": *"\{0,1\}\([0-9]\{1,\}\).*/\1/p')
if [ -z "$id" ]; then
    case $answer in
        *'SuperLink is unavailable'*) echo 'the SuperLink does not answer: is "sh start.sh" running on this server?' >&2 ;;
        *) echo "$answer" >&2 ;;
    esac
    exit 1
fi
echo "run $id; its folder comes to $FLWR_HOME/runs"
flwr log "$id" site --stream || :
# `flwr run --stream` and `flwr log` end with 0 whatever became of the run
away=
while :; do
    answer=$(flwr list site --run-id "$id" --format json 2>&1) || :
    case $answer in
        *'"finished:completed"'*) exit 0 ;;
        *'SuperLink is unavailable'*) # its restart loses no run
            [ -n "$away" ] || echo "the SuperLink does not answer; waiting for it" >&2
            away=yes
            sleep 4
            ;;
        *'"finished:'* | *'"success": false'*)
            echo "$answer" >&2
            exit 1
            ;;
        *)
            [ -z "$away" ] || flwr log "$id" site --stream || :
            away=
            ;;
    esac
    sleep 1
done
