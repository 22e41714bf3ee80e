#!/usr/bin/env bash
# Runs what CI has no time for: the nightly tests, which include the stress suite, and those that need libtpu or
# tokamax. Takes hours. UNI_MOE_STRESS=10 makes ten times as many kills and bad inputs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
. launch/env.sh

install_environment test
code=0
install_libtpu || echo 'libtpu could not be installed: its tests are skipped.' >&2
./launch/test.sh -m nightly || code=$?
PYTHONPATH="$libtpu:$PYTHONPATH" ./launch/test.sh tests/preflight tests/docs_tutorials_test.py \
  -k 'libtpu or rented' -m nightly || code=$?
# tokamax beside the environment, with what it brings.
tokamax="$PWD/.pytest_cache/tokamax"
"$python" -m pip install -q --upgrade --no-deps -c "$(constraints)" --target "$tokamax" \
  tokamax einshape jaxtyping qwix tensorboardX typeguard wadler_lindig ||
  echo 'tokamax could not be installed: its tests are skipped.' >&2
PYTHONPATH="$tokamax:$PYTHONPATH" ./launch/test.sh tests/kernels tests/moe -k tokamax -m 'not nightly' || code=$?
exit "$code"
