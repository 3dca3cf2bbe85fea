#!/usr/bin/env bash
# Sets up what is missing, then runs the tests; arguments go to pytest: bash tests/run.sh -k frozen
set -euo pipefail
. "$(dirname "$0")/../setup.sh" numpy matplotlib pytest
cd "$here"
exec "$python" -m pytest "$@"
