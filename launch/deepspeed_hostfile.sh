#!/usr/bin/env bash
# Train one stage on the machines of a DeepSpeed hostfile, started from one of them over ssh.
# This file says where a stage runs; every setting of the experiment is in the YAML or given as key=value.
#
#   HOSTFILE=hosts launch/deepspeed_hostfile.sh STAGE CONFIG [key=value ...]
#
#   HOSTFILE  lines `host slots=n`; ssh to every host has to work without a password, and the checkout, the
#             environment and run_dir have to be at the same path everywhere
#
# The output of every rank is in <run>/logs/STAGE, and the launcher's on the console. That launcher kills the ranks when
# it is told to stop: such a job goes on from its last checkpoint (`save_every` of the stage). Where jobs are preempted,
# use multi_node.sh or slurm.sbatch, which save first; ZeRO runs there too (launch.zero).
set -euo pipefail

if [[ $# -lt 2 || -z ${HOSTFILE:-} ]]; then
  echo "usage: HOSTFILE=file ${0##*/} STAGE CONFIG [key=value ...]" >&2
  exit 2
fi
logs=$(latent-sft config --directory "${@:2}")/logs/$1/$(date +%Y%m%d-%H%M%S)
mkdir -p "$logs"

exec deepspeed "--hostfile=$HOSTFILE" "--enable_each_rank_log=$logs" --no_local_rank --module latent_sft.cli train "$@"
