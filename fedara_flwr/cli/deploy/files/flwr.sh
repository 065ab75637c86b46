#!/bin/sh
# The flwr command with this site's settings: sh flwr.sh supernode list; sh flwr.sh list; sh flwr.sh stop ID
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
# shellcheck source=/dev/null
. "$here/environment.sh"
exec flwr "$@"
