#!/usr/bin/env bash
# Train one stage on this machine: one process per GPU, or NPROC processes.
# This file says where a stage runs; every setting of the experiment is in the YAML or given as key=value.
#
#   launch/local.sh STAGE CONFIG [key=value ...]
#   NPROC=2 launch/local.sh stage2 configs/quickstart.yaml
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: ${0##*/} STAGE CONFIG [key=value ...]    (NPROC: processes, default one per GPU)" >&2
  exit 2
fi
stage=$1
config=$2
shift 2

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
# processes that each take every core slow each other down
threads=$(($(getconf _NPROCESSORS_ONLN) / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec latent-sft train "$stage" "$config" "launch.nproc=$nproc" "$@"
