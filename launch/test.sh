#!/usr/bin/env bash
# Runs the tests in their own environment, in two processes. Arguments go to pytest:
#   ./launch/test.sh                          the default lane, without the nightly tests
#   ./launch/test.sh -m nightly               the nightly tests, which take an hour and more
#   ./launch/test.sh tests/moe -k merge -n 0  some tests, in one process
# UNI_MOE_PYTHON=/path/to/python uses that interpreter and installs nothing (see env.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
. launch/env.sh

install_environment test
# Files in alphabetical order: by default those with few tests come last, however long these take.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
