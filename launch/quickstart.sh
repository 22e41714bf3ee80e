#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/quickstart.sh [ARGUMENT...]

Trains and evaluates a generalist model with Python 3.11, 3.12 or 3.13: creates the environment,
prepares the embedded data, trains on all its tasks, evaluates, writes a report and exports. Finished phases are
skipped. After Ctrl-C (exit code 75) the same command continues.

ARGUMENTs go to launch/train.py. Use another WORKDIR for another model:
  WORKDIR=runs/dense ./launch/quickstart.sh --config.moe.router=dense

Environment variables:
  UNI_MOE_DATA    folder of the embedded data       (default: ~/.cache/uni_moe_jax)
  WORKDIR         checkpoints, metrics and report   (default: runs/quickstart)
  UNI_MOE_PYTHON  use this interpreter, install nothing   (default: creates .venv)
Relative folders are relative to the repository's root.
HELP
}

for argument in "$@"; do
  case "$argument" in -h | --help) usage; exit 0 ;; esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
. launch/env.sh
export UNI_MOE_DATA="${UNI_MOE_DATA:-$HOME/.cache/uni_moe_jax}"
export GLIBC_TUNABLES="${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}"  # huge pages: steps on a CPU are 4 % faster
workdir="${WORKDIR:-runs/quickstart}"
readonly preempted=75

# Each phase runs in a process group of its own (set -m). It gets a signal exactly once, through the
# trap, whether the terminal signals all processes or only this script is signaled.
set -m
name='1 environment'
signal=''
signals=0
stop() {
  local running
  signal="$1"
  signals=$((signals + 1))
  running=$(jobs -pr)
  if [[ -z "$running" ]]; then leave "$preempted"; fi
  kill -TERM -- "-$running" 2>/dev/null || true
}
trap 'stop Ctrl-C' INT
trap 'stop SIGTERM' TERM
trap 'stop SIGHUP' HUP

# leave CODE: prints in one sentence why the script ends, and exits. A command that the signal killed
# (143) or that succeeded in spite of it can be continued like one that saved and exited with 75.
leave() {
  if [[ "$1" == "$preempted" || (-n "$signal" && "$1" =~ ^(0|143)$) ]]; then
    echo "Stopped${signal:+ by $signal} in phase $name; the same command continues from here." >&2
    exit "$preempted"
  fi
  echo "Phase $name failed with exit code $1." >&2
  exit "$1"
}

# phase NAME COMMAND...: runs the command and prints its duration.
phase() {
  name="$1"
  local start=$SECONDS code seen
  printf '\n== %s\n' "$name"
  "${@:2}" </dev/null &
  while :; do
    # `wait` also returns after a trap: then call it again, for the exit code of the command.
    seen=$signals code=0
    wait "$!" || code=$?
    if [[ "$signals" == "$seen" ]]; then break; fi
  done
  if [[ "$code" != 0 || -n "$signal" ]]; then leave "$code"; fi
  printf '== %s: %d s\n' "$name" "$((SECONDS - start))"
}

phase '1 environment' install_environment
phase '2 data' "$python" launch/prepare_data.py --data_dir="$UNI_MOE_DATA"
phase '3 train' "$python" launch/train.py --config=configs/quickstart.py --workdir="$workdir" \
  --config.data.dir="$UNI_MOE_DATA" --compile_separately "$@"
phase '4 evaluate' "$python" launch/evaluate.py --workdir="$workdir"
phase '5 report' "$python" launch/report.py --workdir="$workdir"
if [[ "$workdir" != *://* ]]; then  # the page reads a model from a disk
  phase '6 export' "$python" launch/serve.py --workdir="$workdir" --export_only
fi
printf '\nDone in %d s. Report: %s\nDraw, and the model answers: %s launch/serve.py --workdir=%s\n' \
  "$SECONDS" "$workdir/report.html" "${python#"$PWD/"}" "$workdir"
