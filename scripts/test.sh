#!/usr/bin/env bash
# Installs what is missing and runs every test, half of them beside the other half: most use one core.
# Arguments go to pytest: bash scripts/test.sh tests/unit -k packing
# Many tests start processes, kill some, and share two cores: in a whole run one that fails is tried once more, and the report
# names it as RERUN. Such a name is a defect to look into; a test that fails twice fails the run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh
bin="${SKYRL_MEGA_VENV:-.venv}/bin"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ $# -gt 0 ]; then exec "$bin/python" -m pytest "$@"; fi

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
again=(--reruns 1 -rfER)
log="$(mktemp)"
# The trap's own failures must not become the script's: a half that has ended can't be killed.
trap 'kill "${beside:-}" 2>/dev/null || true; rm -f "$log"' EXIT
"$bin/python" -m pytest "${again[@]}" -p no:cacheprovider tests/unit tests/peers tests/kernels tests/distributed >"$log" 2>&1 &
beside=$!
status=0
echo "tests/e2e, beside the others (whose report follows):"
"$bin/python" -m pytest "${again[@]}" tests/e2e || status=$?
wait "$beside" || status=$?
echo "tests/unit, tests/peers, tests/kernels and tests/distributed:"
cat "$log"
exit "$status"
