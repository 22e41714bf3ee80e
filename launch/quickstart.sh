#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/quickstart.sh [ARGUMENT...]

From a machine with only Python 3.11 to a trained and evaluated generalist: makes the environment,
builds the embedded data, trains on all its tasks together, evaluates, and writes a report. What is
done already is skipped. Ctrl-C stops it so that the same command continues (exit code 75).

ARGUMENTs go to launch/train.py. Give another model another WORKDIR:
  WORKDIR=runs/dense ./launch/quickstart.sh --config.moe.router=dense

Environment variables:
  UNI_MOE_DATA    where the embedded data is kept   (default: ~/.cache/uni_moe_jax)
  WORKDIR         checkpoints, metrics and report   (default: runs/quickstart)
  UNI_MOE_PYTHON  use this interpreter, install nothing   (default: makes .venv)
Relative folders are taken from the repository's root.
HELP
}

for argument in "$@"; do
  case "$argument" in -h | --help) usage; exit 0 ;; esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
. launch/env.sh
export UNI_MOE_DATA="${UNI_MOE_DATA:-$HOME/.cache/uni_moe_jax}"
workdir="${WORKDIR:-runs/quickstart}"
readonly preempted=75

# Each phase runs in a process group of its own (set -m). A signal then reaches it exactly once,
# through the trap: when the terminal sends it to everybody, and also when only this script gets it.
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

# leave CODE: says in one sentence why the script ends here, and ends it. A command that the signal
# ended (143), or that ended well in spite of it, is as resumable as one that saved and said 75.
leave() {
  if [[ "$1" == "$preempted" || (-n "$signal" && "$1" =~ ^(0|143)$) ]]; then
    echo "Stopped${signal:+ by $signal} in phase $name; the same command continues from here." >&2
    exit "$preempted"
  fi
  echo "Phase $name failed with exit code $1." >&2
  exit "$1"
}

# phase NAME COMMAND...: runs the command and prints the seconds it took.
phase() {
  name="$1"
  local start=$SECONDS code seen
  printf '\n== %s\n' "$name"
  "${@:2}" </dev/null &
  while :; do
    # `wait` also returns when a trap ran: then ask again, for the command's own exit code.
    seen=$signals code=0
    wait "$!" || code=$?
    if [[ "$signals" == "$seen" ]]; then break; fi
  done
  if [[ "$code" != 0 || -n "$signal" ]]; then leave "$code"; fi
  printf '== %s: %d s\n' "$name" "$((SECONDS - start))"
}

phase '1 environment' install_environment
phase '2 data' "$python" launch/prepare_data.py --data_dir="$UNI_MOE_DATA"
train=("$python" launch/train.py --config=configs/quickstart.py --workdir="$workdir" --config.data.dir="$UNI_MOE_DATA" "$@")
# A process that has compiled steps half as fast again on CPU, see `compile_steps`: so one process compiles, another trains.
phase '3 compile' "${train[@]}" --compile_only
phase '4 train' "${train[@]}"
phase '5 evaluate' "$python" launch/evaluate.py --workdir="$workdir"
phase '6 report' "$python" launch/report.py --workdir="$workdir"
printf '\nDone in %d s. Report: %s\n' "$SECONDS" "$workdir/report.html"
