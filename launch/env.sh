# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh, which have gone to the repository's root before: sets
# `python`, exports the settings that both want, and defines install_environment.
#
# UNI_MOE_PYTHON=/path/to/python uses that interpreter, with what is installed there, and installs
# nothing. Otherwise `.venv` at the repository's root is made once and used.

venv="$PWD/.venv"
python="${UNI_MOE_PYTHON:-$venv/bin/python}"

# The working tree comes first, so that UNI_MOE_PYTHON need not have the package installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# TensorFlow only feeds the data here. oneDNN would not speed that up, but would announce itself at
# every start and round a little differently from one processor to the next.
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
export TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"

# Compiled programs are kept between runs. XLA's CPU programs are only right for the kind of
# processor that they were compiled on, and home directories are shared between machines: one folder
# for each kind.
processor=$({ grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true; } | cksum)
: "${JAX_COMPILATION_CACHE_DIR:=$HOME/.cache/uni_moe_jax/jax/${processor%% *}}"
export JAX_COMPILATION_CACHE_DIR

# suits PYTHON MODULE...: whether the interpreter starts, is of a version for which all dependencies
# have wheels (TensorFlow 2.21: 3.13 at most), and has the modules.
suits() {
  "$1" - "${@:2}" 2>/dev/null <<'PY'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit(bool(missing) or not (3, 11) <= sys.version_info[:2] <= (3, 13))
PY
}

# Prints the first usable Python. A name on PATH is not enough: a version manager's stand-in may
# answer for a version that is not there, and Debian's python3 has no ensurepip before python3-venv
# is installed.
find_python() {
  local name seen=''
  for name in python3.11 python3.12 python3.13 python3 python; do
    command -v "$name" >/dev/null || continue
    if suits "$name" venv ensurepip; then
      command -v "$name"
      return
    fi
    seen+="${seen:+, }$name ($("$name" --version 2>/dev/null || echo 'does not start'))"
  done
  echo "No usable Python: 3.11, 3.12 or 3.13 with the modules venv and ensurepip is needed, and" \
    "PATH has ${seen:-none}. Install Python 3.11 (on Debian and Ubuntu: python3.11 and" \
    "python3.11-venv), or set UNI_MOE_PYTHON to an interpreter that has this package's" \
    'dependencies.' >&2
  return 1
}

# check_python MODULE...: says what UNI_MOE_PYTHON lacks. Importing the modules would take seconds.
check_python() {
  "$python" - "$@" <<'PY'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 11):
  sys.exit('UNI_MOE_PYTHON is Python %d.%d; 3.11 or newer is needed.' % sys.version_info[:2])
if missing:
  sys.exit(f'UNI_MOE_PYTHON={sys.executable} has no {", ".join(missing)}: install the package '
           "there (pip install -c constraints.txt -e '.[test]') or unset UNI_MOE_PYTHON.")
PY
}

# A training step on CPU takes and gives back gigabytes. By default the C library returns them to the
# system every time, and a quarter of each step goes into page faults.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456 MALLOC_ARENA_MAX=1

# Makes .venv unless it is there. Its file `launch` says that it is ours to remove, and `made` when
# it is whole. A .venv that somebody else made is used if it suits, and never removed.
make_venv() {
  local state='' base
  if [[ -f "$venv/launch" ]]; then state=$(<"$venv/launch"); fi
  if [[ "$state" != making ]] && suits "$python" pip; then return; fi
  if [[ -e "$venv" && -z "$state" ]]; then
    echo "$venv has no Python 3.11, 3.12 or 3.13 with pip, and was not made by this script:" \
      'move it away, or set UNI_MOE_PYTHON.' >&2
    return 1
  fi
  base=$(find_python) || return 1
  echo "Making .venv with $base"
  rm -rf "$venv"
  mkdir "$venv" && echo making >"$venv/launch" || return 1
  "$base" -m venv "$venv" && echo made >"$venv/launch"
}

# install_environment [test]: makes $python ready, once for each content of setup.py and
# constraints.txt. The stamp is written last, so that a half-finished install is done again. An
# install with `test` serves without, too.
install_environment() {
  local extra="${1:-}" want stamp name
  if [[ -n "${UNI_MOE_PYTHON:-}" ]]; then
    if ! command -v "$python" >/dev/null; then
      echo "UNI_MOE_PYTHON=$python is not a program." >&2
      return 1
    fi
    check_python jax flax tensorflow tensorflow_datasets ${extra:+pytest xdist ftfy tokenizers torch}
    return
  fi
  make_venv || return 1
  # The folder is part of the stamp, since an editable install holds its path.
  want=$("$python" - "$PWD" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.argv[1].encode())
for name in ('setup.py', 'constraints.txt'):
  digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
  ) || return 1
  for name in test ${extra:-run}; do
    stamp="$venv/installed-$name"
    [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]] && return
  done
  echo 'Installing the dependencies into .venv (about 1 minute and 2.6 GB)'
  rm -f "$venv"/installed-*
  pip_install -c constraints.txt -e ".${extra:+[$extra]}" || return 1
  echo "$want" >"$stamp"
}

# pip_install -c FILE WHAT...: another Python than 3.11 may have to do without the exact versions.
pip_install() {
  "$python" -m pip install --quiet --disable-pip-version-check "$@" && return
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] == (3, 11))' || return 1
  echo "The exact versions of $2 do not install on $("$python" --version): going on without them."
  "$python" -m pip install --quiet --disable-pip-version-check "${@:3}"
}
