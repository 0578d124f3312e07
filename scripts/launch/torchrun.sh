#!/usr/bin/env bash
# Trains on all GPUs of this machine (or on several processes of its CPU), alone or as one node of several.
#
#   bash scripts/launch/torchrun.sh recipe=gsm8k data.path=train.jsonl parallel=tp2
#
# On each node of a cluster, with the same arguments:
#
#   NNODES=4 MASTER_ADDR=node0 bash scripts/launch/torchrun.sh ...
#
# Environment:
#   NPROC_PER_NODE  processes on this node (default: its GPUs, 1 without any)
#   NNODES          nodes (default 1)
#   MASTER_ADDR     host at which the nodes meet (default: this one; needed with several nodes)
#   MASTER_PORT     port there (default 29400; any free one with a single node)
#   JOB_ID          name of the rendezvous, the same on all nodes (default: SLURM_JOB_ID, else skyrl_mega)
#   MAX_RESTARTS    how often a job whose process died is started again, on all nodes (default 3)
#   OMP_NUM_THREADS threads of a process on CPU (default 1: more help only on idle cores)
#
# A restart goes on at the run directory's newest checkpoint (checkpoint.resume=auto): set checkpoint.interval_steps so that
# what lies between two is cheap to repeat. The run directory must be on a file system that all nodes share.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

case "${1:-}" in
  "" | -h | --help) sed -n '2,20p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
esac

python="${SKYRL_MEGA_VENV:-$root/.venv}/bin/python"
[ -x "$python" ] || python="$(command -v python)" || { echo "torchrun.sh: run 'bash scripts/setup.sh' first" >&2; exit 1; }

gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
nnodes="${NNODES:-1}"
nproc="${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
if [ "$nnodes" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then
  echo "torchrun.sh: NNODES is $nnodes; set MASTER_ADDR to the host name of one of them, the same on all" >&2
  exit 2
fi
# Port 0 lets a single node take any free one, so that two jobs on one machine do not meet each other.
default_port=$((nnodes > 1 ? 29400 : 0))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A store of its own for every attempt: in the agents' shared one a restarted rank finds the addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

exec "$python" -m torch.distributed.run \
  --nnodes "$nnodes" \
  --nproc-per-node "$nproc" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${MASTER_ADDR:-localhost}:${MASTER_PORT:-$default_port}" \
  --rdzv-id "${JOB_ID:-${SLURM_JOB_ID:-skyrl_mega}}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  -m skyrl_mega.train "$@"
