#!/usr/bin/env bash
# From a fresh machine to a trained language model: set-up, model, GRPO on two-digit addition, evaluation, plot.
# About ten minutes on two CPU cores; the same command uses a GPU where there is one.
#
#   bash scripts/quickstart.sh [any setting, e.g. trainer.max_steps=10 trainer.run_dir=runs/mine]
#
# Results: runs/quickstart/{summary.json, reward_curve.png, metrics.jsonl, tensorboard/, checkpoints/, hf/}. Stopped half-way,
# the same command continues; after a finished run it starts a new one and keeps the old under a dated name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$(date +%s)

bash scripts/setup.sh
python="${SKYRL_MEGA_VENV:-.venv}/bin/python"
"$python" scripts/prepare_smollm2.py

run_dir=runs/quickstart
for setting in "$@"; do case "$setting" in trainer.run_dir=*) run_dir="${setting#trainer.run_dir=}" ;; esac; done
if [ -f "$run_dir/summary.json" ]; then
  kept="$run_dir-$(date -r "$run_dir/summary.json" +%Y%m%d-%H%M%S)"
  echo "The finished run in $run_dir is kept as $kept"
  mv "$run_dir" "$kept"
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
SKYRL_MEGA_SETUP_S=$(($(date +%s) - began)) exec "$python" -m skyrl_mega.train recipe=quickstart "$@"
