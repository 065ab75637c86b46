#!/bin/sh
# Hands this folder's containers to systemd, for this user, by podman 4.6 or newer; again after the folder has moved.
#   sh quadlet.sh; systemctl --user start NAME      NAME: as it says; loginctl enable-linger keeps them running after logout
set -eu
umask 077
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
units=${XDG_CONFIG_HOME:-$HOME/.config}/containers/systemd
mkdir -p "$units"
for unit in "$here"/*.container "$here"/*.network; do
    [ -e "$unit" ] || continue
    name=${unit##*/}
    sed "s|@FOLDER@|$here|g" "$unit" >"$units/$name"
    case $name in *.container) echo "${name%.container}" ;; esac
done
systemctl --user daemon-reload
