#!/usr/bin/env bash
# Train one stage on several machines: run this on every one of them, at about the same time.
# This file says where a stage runs; every setting of the experiment is in the YAML or given as key=value.
#
#   NNODES=2 HEAD=node1 launch/multi_node.sh STAGE CONFIG [key=value ...]
#
#   NNODES  machines of the job
#   HEAD    one of them, by a name or address that all can reach; PORT there (29400) has to be free
#   NPROC   processes a machine; default one per GPU
#   JOB     the same word on every machine, another for every job (default: 0)
#
# run_dir has to be on storage that all machines share. The output of every rank is in <run>/logs/STAGE, a folder for
# each machine; each console shows the first rank of its machine. The exit status is that of the rank that failed, 75
# where the job was told to stop (SIGTERM or SIGUSR1 to this script on any machine): the same command then goes on.
set -euo pipefail

if [[ $# -lt 2 || -z ${NNODES:-} || -z ${HEAD:-} ]]; then
  echo "usage: NNODES=n HEAD=host [PORT=p] [NPROC=n] [JOB=word] ${0##*/} STAGE CONFIG [key=value ...]" >&2
  exit 2
fi

gpus=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
threads=$(($(getconf _NPROCESSORS_ONLN) / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

exec python -m latent_sft.launcher "--nnodes=$NNODES" "--nproc-per-node=$nproc" --rdzv-backend=c10d \
  "--rdzv-endpoint=$HEAD:${PORT:-29400}" "--rdzv-id=${JOB:-0}" -- "$@"
