#!/usr/bin/env bash
# Runs what CI has no time for: the nightly tests, those that need libtpu too, and the stress suites.
# Takes hours. Arguments go to tests/stress/run.py, for example --quick.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
. launch/env.sh

install_environment test
code=0
install_libtpu || echo 'libtpu could not be installed: its tests are skipped.' >&2
./launch/test.sh -m nightly || code=$?
PYTHONPATH="$libtpu:$PYTHONPATH" ./launch/test.sh tests/tools/preflight -k libtpu -m nightly || code=$?
"$python" tests/stress/run.py "$@" || code=$?
exit "$code"
