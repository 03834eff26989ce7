#!/usr/bin/env bash
# Runs the test suite, from nothing but Python >= 3.11:
#
#   bash launch/test.sh [arguments of pytest, e.g. tests/inputs -k video]
#
# Creates or extends .venv at the root of the repository. Paths are relative to that root.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install test
cd "$ROOT"
step "running the tests" "$PYTHON" -m pytest -q --durations=10 "$@"
step "checking the style of the code" "$PYTHON" -m ruff check --quiet .
echo "== everything together took $SECONDS s"
