#!/usr/bin/env bash
# Installs what is missing and runs every test. Arguments go to pytest: bash scripts/test.sh tests/unit -k packing
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
bin="${SKYRL_MEGA_VENV:-.venv}/bin"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -eq 0 ]; then
  "$bin/ruff" check .
  "$bin/ruff" format --check .
  "$bin/mypy"
fi
exec "$bin/python" -m pytest "$@"
