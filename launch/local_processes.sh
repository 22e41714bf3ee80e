#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/local_processes.sh [--processes N] [--devices D] [--evaluate] [--port P] [--dry_run] -- ARGUMENT...

Trains one run in N processes of this machine that find each other on 127.0.0.1: what several hosts
do, to be tried on one. ARGUMENTs go to launch/train.py:
  ./launch/local_processes.sh --processes 2 --devices 4 -- --config=configs/quickstart.py --workdir=runs/two

  --processes N  how many (default 2)
  --devices D    virtual CPU devices of each; without it process i sees accelerator i, or one CPU device
                 where JAX_PLATFORMS=cpu
  --evaluate     ARGUMENTs go to launch/evaluate.py
  --port P       of process 0 (default: a free one)
  --dry_run      print the commands, run nothing

Process 0 prints; errors of process i begin with [i]. Ctrl-C reaches all, which save and stop. Where one
fails, the others are ended. The exit code is that of the first that failed, 75 where the same command
continues, or 0. UNI_MOE_PYTHON names the interpreter (default: .venv/bin/python, else python3).
HELP
}

processes=2 devices='' script=train.py port='' dry_run=''
while (($#)); do
  case "$1" in
    --processes) processes="$2"; shift 2 ;;
    --devices) devices="$2"; shift 2 ;;
    --evaluate) script=evaluate.py; shift ;;
    --port) port="$2"; shift 2 ;;
    --dry_run) dry_run=yes; shift ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) echo "local_processes.sh: $1 is no option; arguments of $script stand after --. See --help." >&2; exit 2 ;;
  esac
done
if ! [[ "$processes" =~ ^[1-9][0-9]*$ && "${devices:-1}" =~ ^[1-9][0-9]*$ ]]; then
  echo "local_processes.sh: --processes $processes and --devices ${devices:-1} must be positive numbers." >&2
  exit 2
fi
if (($# == 0)); then
  echo "local_processes.sh: nothing to do; give the arguments of $script after --. See --help." >&2
  exit 2
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${UNI_MOE_PYTHON:-$PWD/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [[ -z "$port" && -n "$dry_run" ]]; then port=PORT; fi
if [[ -z "$port" ]]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

# command_of I ARGUMENT...: sets `command` to that of process I.
command_of() {
  local own=("JAX_LOCAL_DEVICE_IDS=$1")
  if [[ -n "$devices" || "${JAX_PLATFORMS:-}" == cpu ]]; then
    # The last of two equal flags counts.
    own=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${devices:-1}")
  fi
  command=(env "${own[@]}" "$python" "launch/$script" "${@:2}"
    "--coordinator_address=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$1")
}

if [[ -n "$dry_run" ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$@"
    printf '%q ' "${command[@]}"
    echo
  done
  exit 0
fi

# A process group each (set -m), so that a signal reaches each exactly once, through the trap.
set -m
pids=()
tell() { # tell SIGNAL
  for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'tell TERM' INT TERM HUP
for ((i = 0; i < processes; i++)); do
  command_of "$i" "$@"
  "${command[@]}" </dev/null 2> >(trap '' INT TERM; exec sed -u "s/^/[$i] /" >&2) &
  pids+=("$!")
done

code=0 left=("${pids[@]}")
while ((${#left[@]})); do
  # `wait` also returns when a trap ran; then the process is still there.
  one=0 done_pid=''
  wait -n -p done_pid "${left[@]}" || one=$?
  [[ -n "${done_pid:-}" ]] || continue
  still=()
  for pid in "${left[@]}"; do [[ "$pid" == "$done_pid" ]] || still+=("$pid"); done
  left=("${still[@]}")
  if ((one != 0 && code == 0)); then
    code=$one
    # 75 is what a stopped run says: the others are about to say it, too. Others would wait for a dead one.
    if ((one != 75)); then tell KILL; fi
  fi
done
exit "$code"
