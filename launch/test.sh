#!/usr/bin/env bash
# Runs the test suite; needs only Python >= 3.11:
#
#   bash launch/test.sh [--slow] [arguments of pytest, e.g. tests/inputs -k video]
#
# Creates or extends .venv at the root of the repository. Paths are relative to that root. Tests run in parallel on
# up to four cores; `-n 0` runs them in one process. Tests marked `slow` (pyproject.toml) are skipped and counted
# unless --slow or -m selects them. Compiled programs are cached in .pytest_cache/jax. A test that hangs fails, and
# the run continues (tests/limits.py). With MOLMO2_SEQIO=1 the tests that need seqio and TensorFlow run too, and
# both are installed (0.7 GB to download, 2.3 GB on disk).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install "test${MOLMO2_SEQIO:+,seqio}"
cd "$ROOT"
# worksteal: unlike loadfile, it does not repeat a test that killed its worker.
step "running the tests" "$PYTHON" -m pytest -q --durations=10 \
  -n auto --maxprocesses 4 --dist worksteal --max-worker-restart 4 "$@"
step "checking code style" "$PYTHON" -m ruff check --quiet .
step "checking types across modules" "$PYTHON" -m mypy
echo "== total time: $SECONDS s"
