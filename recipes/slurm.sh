#!/usr/bin/env bash
#SBATCH --job-name=sd_nb
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#
# 64 GPUs under SLURM: one torchrun on each machine, see 64-gpus.sh for what it expects.
#
#   sbatch recipes/slurm.sh RUN LATENTS [FLAGS]
#
# Five minutes before the time is up, SLURM sends SIGTERM: the run saves, and the job is put in the queue again.
set -euo pipefail
export NODES=$SLURM_JOB_NUM_NODES
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST
stopping=
srun "${SLURM_SUBMIT_DIR:-.}/recipes/64-gpus.sh" "$@" &
trap 'stopping=yes; kill -TERM $!' TERM
code=0
wait $! || code=$?
if [ -n "$stopping" ]; then
  wait $! || true  # the first wait ended with the signal, not with the run
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
