#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./launch/local_processes.sh [--processes N] [--devices D] [--evaluate] [--port P] [--dry_run] -- ARGUMENT...

Trains one run in N processes on this machine, as several hosts would. ARGUMENTs go to launch/train.py:
  ./launch/local_processes.sh --processes 2 --devices 4 -- --config=quickstart --workdir=runs/two

  --processes N  number of processes (default 2)
  --devices D    virtual CPU devices per process; default: process i uses accelerator i, or one CPU device
                 with JAX_PLATFORMS=cpu
  --evaluate     ARGUMENTs go to launch/evaluate.py
  --port P       port of process 0 (default: a free one)
  --dry_run      print the commands without running them

Only process 0 prints; errors of process i start with [i]. After Ctrl-C all processes save and stop. If one
fails, the others are killed. The exit code is that of the first one that failed, 75 if the same command
continues, or 0. UNI_MOE_PYTHON names the interpreter (default: .venv/bin/python, else python3).
It needs bash 5.1 or newer; macOS has 3.2.
HELP
}

# shellcheck source=launch/options.sh
. "$(dirname "${BASH_SOURCE[0]}")/options.sh"

processes=2 devices='' script=train.py port='' dry_run=''
while (($#)); do
  case "$1" in
    --processes) check_value "$@"; processes="$2"; shift 2 ;;
    --devices) check_value "$@"; devices="$2"; shift 2 ;;
    --evaluate) script=evaluate.py; shift ;;
    --port) check_value "$@"; port="$2"; shift 2 ;;
    --dry_run) dry_run=yes; shift ;;
    --) shift; break ;;
    -h | --help) usage; exit 0 ;;
    *) echo "local_processes.sh: unknown option $1; give the arguments of $script after --. See --help." >&2; exit 2 ;;
  esac
done
if ! [[ "$processes" =~ ^[1-9][0-9]*$ && "${devices:-1}" =~ ^[1-9][0-9]*$ ]]; then
  echo "local_processes.sh: --processes $processes and --devices ${devices:-1} must be positive numbers." >&2
  exit 2
fi
if (($# == 0)); then
  echo "local_processes.sh: no arguments; give the arguments of $script after --. See --help." >&2
  exit 2
fi

python=''
if [[ -n "${UNI_MOE_PYTHON:-}" ]]; then  # may be relative to the current folder
  if ! python=$(type -P "$UNI_MOE_PYTHON"); then
    echo "local_processes.sh: UNI_MOE_PYTHON=$UNI_MOE_PYTHON is not an executable program; correct or unset it." >&2
    exit 2
  fi
  if [[ "$python" != /* ]]; then python="$PWD/$python"; fi
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z "$python" ]]; then
  python="$PWD/.venv/bin/python"
  if [[ ! -x "$python" ]]; then python=python3; fi
fi
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

# Without this, the loop below would never end. 2: an unknown option; 127: no process to wait for.
code=0
wait -n -p done_pid 2>/dev/null || code=$?
if ((code == 2)); then
  echo "local_processes.sh: bash $BASH_VERSION is too old; install bash 5.1 or newer (macOS: brew install bash)." >&2
  exit 2
fi

# Each process has its own group (set -m), so that it gets a signal exactly once, through the trap.
set -m
pids=() stopped=''
send() { # send SIGNAL
  for pid in "${pids[@]}"; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'stopped=yes; send TERM' INT TERM HUP
for ((i = 0; i < processes; i++)); do
  command_of "$i" "$@"
  "${command[@]}" </dev/null 2> >(trap '' INT TERM; exec sed -u "s/^/[$i] /" >&2) &
  pids+=("$!")
  # A signal that came before the line above did not reach this process.
  [[ -z "$stopped" ]] || kill -TERM -- "-$!" 2>/dev/null || true
done

code=0 left=("${pids[@]}")
while ((${#left[@]})); do
  # `wait` also returns after a trap; then the process is still running.
  one=0 done_pid=''
  wait -n -p done_pid "${left[@]}" || one=$?
  [[ -n "${done_pid:-}" ]] || continue
  still=()
  for pid in "${left[@]}"; do [[ "$pid" == "$done_pid" ]] || still+=("$pid"); done
  left=("${still[@]}")
  if ((one != 0 && code == 0)); then
    code=$one
    # After 75 the others stop too. After an error they would wait for a dead process.
    if ((one != 75)); then send KILL; fi
  fi
done
exit "$code"
