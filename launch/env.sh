# shellcheck shell=bash
# Sourced from the repository's root by the other scripts. Sets `python`, exports shared settings and
# defines install_environment and install_libtpu.
#
# UNI_MOE_PYTHON=/path/to/python uses that interpreter and installs nothing. Otherwise the scripts
# create `.venv` at the repository's root once and use it.

# Services and containers may have none; Python finds the same folder.
if [[ -z "${HOME:-}" ]]; then
  unset HOME
  HOME=~
  export HOME
fi
venv="$PWD/.venv"
python="${UNI_MOE_PYTHON:-$venv/bin/python}"

# The working tree comes first, so that UNI_MOE_PYTHON need not have the package installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# TensorFlow only feeds the data. oneDNN would not speed that up, but prints a notice at every start
# and rounds slightly differently on different processors.
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
export TF_ENABLE_ONEDNN_OPTS="${TF_ENABLE_ONEDNN_OPTS:-0}"

# Cache of compiled programs. XLA's CPU programs are valid only for the processor type that they were
# compiled on, and machines may share a home directory: one folder per type.
processor=$({ grep -m1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || true; } | cksum)
: "${JAX_COMPILATION_CACHE_DIR:=$HOME/.cache/uni_moe_jax/jax/${processor%% *}}"
export JAX_COMPILATION_CACHE_DIR

# Names of interpreters, the preferred one first.
pythons=(python3.11 python3.12 python3.13 python3 python)

# is_usable PYTHON MODULE...: whether the interpreter starts, has a version for which all dependencies
# have wheels (TensorFlow 2.21: 3.13 at most), and has the modules.
is_usable() {
  "$1" - "${@:2}" 2>/dev/null <<'PY'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
sys.exit(bool(missing) or not (3, 11) <= sys.version_info[:2] <= (3, 13))
PY
}

# Prints the first usable Python. A name on PATH is not enough: a version manager's shim may stand for
# a version that is not installed, and Debian's python3 lacks ensurepip without python3-venv.
find_python() {
  local name seen='' package='' advice
  for name in "${pythons[@]}"; do
    command -v "$name" >/dev/null || continue
    if is_usable "$name" venv ensurepip; then
      command -v "$name"
      return
    fi
    seen+="${seen:+, }$name ($("$name" --version 2>/dev/null || echo 'does not start'))"
    if [[ -z "$package" ]] && is_usable "$name"; then  # but for the modules, which Debian has in a package of their own
      package=$("$name" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    fi
  done
  advice="Install ${package:-Python 3.11} (on Debian and Ubuntu: apt-get install"
  advice+=" ${package:-python3.11 python3.11-venv})"
  echo "No usable Python: the scripts need 3.11, 3.12 or 3.13 with the modules venv and ensurepip;" \
    "PATH has ${seen:-none}. $advice, or set UNI_MOE_PYTHON to an interpreter that has this package's dependencies." >&2
  return 1
}

# check_python MODULE...: reports what UNI_MOE_PYTHON lacks, without importing the modules, which
# would take seconds.
check_python() {
  "$python" - "$@" <<'PY'
import importlib.util, sys
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
if sys.version_info < (3, 11):
  sys.exit('UNI_MOE_PYTHON is Python %d.%d; it must be 3.11 or newer.' % sys.version_info[:2])
if missing:
  sys.exit(f'UNI_MOE_PYTHON={sys.executable} lacks {", ".join(missing)}: install the package '
           "there (pip install -c constraints.txt -e '.[test]') or unset UNI_MOE_PYTHON.")
PY
}

# Creates .venv unless it exists. Its file `launch` marks it as created by this script, and contains
# `made` when it is complete. Another .venv is used if it is usable, and never removed.
make_venv() {
  local state='' base
  if [[ -f "$venv/launch" ]]; then state=$(<"$venv/launch"); fi
  if [[ "$state" != making ]] && is_usable "$python" pip; then return; fi
  if [[ -e "$venv" && -z "$state" ]]; then
    echo "$venv has no Python 3.11, 3.12 or 3.13 with pip, and this script did not create it:" \
      'move it away, or set UNI_MOE_PYTHON.' >&2
    return 1
  fi
  base=$(find_python) || return 1
  echo "Creating .venv with $base"
  rm -rf "$venv"
  mkdir "$venv" && echo making >"$venv/launch" || return 1
  "$base" -m venv "$venv" && echo made >"$venv/launch"
}

# Prints the file with the exact versions for $python.
constraints() {
  "$python" -c 'import sys; print("constraints%s.txt" % ("-py313" if sys.version_info[:2] == (3, 13) else ""))'
}

# install_environment [test]: installs the package for $python, once per content of setup.py and of
# the constraints. The stamp is written last, so that an interrupted install is repeated. An install
# with `test` also serves without.
install_environment() {
  local extra="${1:-}"
  if [[ -n "${UNI_MOE_PYTHON:-}" ]]; then
    if ! command -v "$python" >/dev/null; then
      echo "UNI_MOE_PYTHON=$python is not an executable program." >&2
      return 1
    fi
    check_python jax flax tensorflow tensorflow_datasets ${extra:+pytest xdist hypothesis ftfy tokenizers torch}
    return
  fi
  # Of several scripts that start at once, one installs. The subshell's end releases the lock. Where the folder cannot
  # be written, there is nothing to lock: .venv is complete, or installing fails.
  (if { exec 9>"$venv.lock"; } 2>/dev/null; then wait_for_lock || exit; fi
   install_once "$extra")
}

# Waits for the lock of descriptor 9, the kernel's, which ends with the process; not on a file system without locks.
wait_for_lock() {
  local base="$python"
  is_usable "$base" || base=$(find_python) || return 1
  "$base" - <<'PY'
import fcntl
try:
  fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
  print('Waiting for another script, which installs into .venv')
  fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
  pass
PY
}

# install_once [test]: the part of install_environment that one script at a time runs.
install_once() {
  local extra="$1" want stamp name
  make_venv || return 1
  # The stamp includes the folder, because an editable install contains its path.
  want=$("$python" - "$PWD" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.argv[1].encode())
for name in ('setup.py', *sorted(pathlib.Path().glob('constraints*.txt'))):
  digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
  ) || return 1
  for name in test ${extra:-run}; do
    stamp="$venv/installed-$name"
    [[ -f "$stamp" && "$(<"$stamp")" == "$want" ]] && return
  done
  echo 'Installing the dependencies into .venv (about half a minute and 2.3 GB)'
  rm -f "$venv"/installed-*
  pip_install -c "$(constraints)" -e ".[${extra:-serve}]" || return 1  # `test` has what `serve` has
  # TensorFlow's C++ headers, 287 MB, are for building extensions of it.
  if [[ -f "$venv/launch" ]]; then rm -rf "$venv"/lib/python*/site-packages/tensorflow/include; fi
  echo "$want" >"$stamp"
}

# pip_install -c FILE WHAT...: by uv, which needs a third of pip's time, or by pip where uv cannot. On Python 3.12, for
# which nothing is pinned, falls back to inexact versions.
pip_install() {
  local pip=("$python" -m pip install --quiet --disable-pip-version-check) uv=("$python" -m uv pip install --quiet)
  local source code=0
  uv+=(--python "$python")
  # Python keeps the byte code of what it imports, unless this is set: then all of it, or each start would make it.
  if [[ -n "${PYTHONDONTWRITEBYTECODE:-}" ]]; then uv+=(--compile-bytecode); fi
  # uv does not read pip's settings: it gets what they say about where packages are.
  while IFS= read -r source; do uv+=("$source"); done < <("$python" -m pip config list 2>/dev/null |
    sed -nE "s/^[^=]*\\.(index-url|extra-index-url|find-links)='(.*)'$/--\\1=\\2/p")
  { "${pip[@]}" -c "$2" uv 2>/dev/null && "${uv[@]}" "$@"; } || code=$?
  if ((code == 0 || code > 128)); then return "$code"; fi  # over 128: a signal, such as Ctrl-C
  echo 'uv did not install them, trying pip.'
  "${pip[@]}" "$@" && return
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' || return 1
  echo "The exact versions of $2 do not install on $("$python" --version): continuing without them."
  "${pip[@]}" "${@:3}"
}

# install_libtpu: installs JAX's compiler for TPUs in the folder $libtpu, which is not on the path by
# default: wherever JAX finds libtpu, it looks for a TPU first.
libtpu="$PWD/.pytest_cache/libtpu"
install_libtpu() {
  "$python" -m pip install -q --upgrade --no-deps -c "$(constraints)" --target "$libtpu" libtpu
}
