#!/usr/bin/env bash
# Runs the tests in their own environment; arguments go to pytest. A later -m replaces this one:
#   ./launch/test.sh                          everything but the slow tests
#   ./launch/test.sh -m slow                  the slow tests
#   ./launch/test.sh -m nightly               more of their kind, for which CI has no time
#   ./launch/test.sh tests/moe -k merge -n 0  some tests, in one process
# UNI_MOE_PYTHON=/path/to/python uses that interpreter and installs nothing (see env.sh).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env.sh
. launch/env.sh

install_environment test
exec "$python" -m pytest -n 2 --dist loadfile -m 'not slow and not nightly' "$@"
