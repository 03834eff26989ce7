#!/usr/bin/env bash
# Trains a small Molmo2 on drawn videos and shows what it learnt; needs only Python >= 3.11:
#
#   bash launch/quickstart.sh [flags of launch.quickstart; --help lists them]
#
# Creates .venv at the root of the repository on the first run. Runs on CPU unless JAX_PLATFORMS is set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"

install
step "training, evaluating and drawing the report" "$PYTHON" -m launch.quickstart "$@"
echo "== total time: $SECONDS s"
