#!/bin/sh
# A phone as a node, in Termux (docs/phone.md): Debian by proot-distro, in it this package, and the node's processes.
#   sh docker/phone.sh [FOLDER [start | check]]
# FOLDER: this phone's folder of a site (node-NAME), in Termux's home; none = install only; check: `fedara deploy check`.
# To be run for every start: what is there is not installed again, what was stopped half-way is finished, another version of
# this repository is installed over the old one. TORCH, MODEL and pip's own variables count as for install-device.sh.
# DEBIAN: the name that proot-distro knows the userland by.
set -eu
venv=/opt/fedara # in Debian

fail() {
    echo "error: $*" >&2
    exit 1
}

# -- in Debian ---------------------------------------------------------------------------------------------------------------
install_inside() {
    export DEBIAN_FRONTEND=noninteractive
    if ! python3 -c 'import ensurepip' 2>/dev/null; then
        dpkg --configure -a
        apt-get update
        apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates
    fi
    state=$({ echo "${TORCH:-}"; find /fedara/fedara_flwr /fedara/docker /fedara/constraints.txt /fedara/pyproject.toml \
        -type f ! -name '*.pyc' -exec cksum {} + | sort; } | cksum)
    [ "$state" != "$(cat "$venv/.installed" 2>/dev/null)" ] || return 0
    [ -x "$venv/bin/pip" ] || rm -rf "$venv"
    # pip takes a package for installed by its .dist-info, whose INSTALLER it writes after the package's own files
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [ -e "$info/INSTALLER" ] || rm -rf "$info"
    done
    sh /fedara/docker/install-device.sh "$venv"
    echo "$state" >"$venv/.installed"
}

case ${1:-} in
    --inside-install)
        install_inside
        exit
        ;;
    --inside-check)
        export PATH="$venv/bin:$PATH" # busy-when may name a command of the package
        exec fedara deploy check /node
        ;;
    --inside-start)
        export PATH="$venv/bin:$PATH"
        mkdir -p /node/home
        echo $$ >/node/home/phone.pid
        exec sh /node/start.sh
        ;;
esac

# -- in Termux ---------------------------------------------------------------------------------------------------------------
repo=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
command -v pkg >/dev/null || fail "there is no pkg: this is for Termux on a phone; elsewhere: sh docker/install-device.sh"
[ "$(uname -m)" = aarch64 ] || fail "this is $(uname -m): torch has builds for 64-bit phones (aarch64) only"
node=
if [ $# -gt 0 ]; then
    [ -f "$1/node.toml" ] && [ -f "$1/node.key" ] || fail "$1 is no folder node-NAME of what \`fedara deploy init\` wrote"
    node=$(CDPATH='' cd -- "$1" && pwd -P)
    case $node in
        "$(CDPATH='' cd -- "$HOME" && pwd -P)"/*) ;;
        # other apps may read shared storage, and modes do not count there
        *) fail "$node is outside of Termux's home: cp -r $node ~/" ;;
    esac
    chmod go= "$node" "$node/node.key"
fi
action=${2:-start}
[ "$action" = start ] || [ "$action" = check ] || fail "$action: allowed is start or check"

missing=
command -v proot-distro >/dev/null || missing=proot-distro
command -v termux-battery-status >/dev/null || missing="$missing termux-api"
# shellcheck disable=SC2086 # a list
[ -z "$missing" ] || pkg install -y $missing

name=${DEBIAN:-debian}
# debian [--bind FOLDER:PLACE] -- COMMAND…
debian() {
    proot-distro login "$name" --bind "$repo:/fedara" "$@"
}
if ! debian -- true >/dev/null 2>&1; then
    { proot-distro install "$name" && debian -- true; } ||
        fail "proot-distro has no whole $name: \`proot-distro remove $name\` (all in it is lost), then again"
fi
set -- # variables of the installation, where they are set
for key in TORCH MODEL http_proxy https_proxy no_proxy $(env | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p'); do
    eval "value=\${$key-unset}"
    # shellcheck disable=SC2154 # set by eval
    [ "$value" = unset ] || set -- "$@" "$key=$value"
done
debian -- env "$@" sh /fedara/docker/phone.sh --inside-install
[ -n "$node" ] || exit 0
if [ "$action" = check ]; then
    debian --bind "$node:/node" -- sh /fedara/docker/phone.sh --inside-check
    exit
fi

pid_file=$node/home/phone.pid # processes in Debian have the same numbers
if [ -s "$pid_file" ] && grep -q start.sh "/proc/$(cat "$pid_file")/cmdline" 2>/dev/null; then
    fail "this node is running: process $(cat "$pid_file")"
fi
rm -f "$pid_file"
# shellcheck disable=SC2329 # called by trap
stop() {
    trap '' INT TERM
    # proot itself takes no signal; start.sh ends the node, and proot then ends, too
    until [ -s "$pid_file" ] || ! kill -0 "$child" 2>/dev/null; do sleep 1; done
    kill "$(cat "$pid_file")" || :
    wait "$child" || :
    exit 0
}
termux-wake-lock
trap termux-wake-unlock EXIT
debian --bind "$node:/node" -- sh /fedara/docker/phone.sh --inside-start &
child=$!
trap stop INT TERM
status=0
wait "$child" || status=$?
exit "$status"
