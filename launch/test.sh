#!/usr/bin/env bash
# Runs the test suite, from nothing but Python >= 3.11:
#
#   bash launch/test.sh [--slow] [arguments of pytest, e.g. tests/inputs -k video]
#
# Creates or extends .venv at the root of the repository. Paths are relative to that root. Tests run side by side
# on up to four cores; `-n 0` runs them in one process. Tests that are marked `slow` (pyproject.toml) are left out
# and counted unless --slow or -m asks for them. Compiled programs are kept in .pytest_cache/jax for later runs. A
# test that hangs fails, and the run continues (tests/limits.py). With MOLMO2_SEQIO=1 the tests that need seqio
# and TensorFlow run too, and both are installed (0.7 GB to load, 2.3 GB on disk).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install "test${MOLMO2_SEQIO:+,seqio}"
cd "$ROOT"
# worksteal: unlike loadfile, it does not repeat a test that ended its worker.
step "running the tests" "$PYTHON" -m pytest -q --durations=10 \
  -n auto --maxprocesses 4 --dist worksteal --max-worker-restart 4 "$@"
step "checking the style of the code" "$PYTHON" -m ruff check --quiet .
step "checking types across modules" "$PYTHON" -m mypy
echo "== everything together took $SECONDS s"
