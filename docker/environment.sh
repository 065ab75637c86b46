# Which torch where TORCH does not say; read by install.sh and lock.sh.
# shellcheck shell=sh disable=SC2154 # `docker` is set by the script that reads this
if [ -z "${TORCH:-}" ]; then
    case $(uname -m) in
        # newer builds for aarch64 are for CUDA, and do not load without it
        aarch64) TORCH=torch==2.9.1 ;;
        *) TORCH=torch==$(sed -n 's/^torch==//p' "$docker/../constraints.txt") ;;
    esac
fi
