# What the scripts of this folder have in common; read by them, nothing to change here (settings: settings.env).
# shellcheck shell=sh disable=SC2154,SC2153,SC2034 # `here` is set by the script that reads this, the rest is used there
# shellcheck source=/dev/null
. "$here/settings.env"
# compose.yml sets these two: there, each part is a host of its own
: "${SUPERLINK_HOST:=127.0.0.1}" "${SUPERLINK_LISTEN:=127.0.0.1}"
[ -z "${VENV:-}" ] || PATH="$VENV/bin:$PATH"
export FLWR_HOME="$here/home"
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="$POLL_SECONDS" TOKENIZERS_PARALLELISM=false PATH
# the parts of a site reach each other past any proxy
no_proxy=${no_proxy:-${NO_PROXY:-}}
no_proxy=${no_proxy:+$no_proxy,}localhost,127.0.0.1,::1,$SUPERLINK_HOST
NO_PROXY=$no_proxy
export no_proxy NO_PROXY
if [ "${1:-}" != gateway ]; then # whose container has files to read alone
    mkdir -p "$FLWR_HOME"
    # for the flwr command; Flower wants an absolute path, so it is written where the folder is, as a string of TOML
    folder=$(printf %s "$here" | sed 's/["\\]/\\&/g')
    cat >"$FLWR_HOME/config.toml.$$" <<END
[superlink]
default = "site"

[superlink.site]
address = "$SUPERLINK_HOST:$SUPERLINK_PORT"
root-certificates = "$folder/ca.crt"
END
    mv "$FLWR_HOME/config.toml.$$" "$FLWR_HOME/config.toml"
fi
