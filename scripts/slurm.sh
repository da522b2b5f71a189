#!/bin/bash
# One node or many under SLURM, from the repository's folder on a file system that all nodes see:
#
#   sbatch --nodes=4 scripts/slurm.sh configs/gpt_3b.py [--field=value ...]
#
# Two minutes before the time is up all ranks save and stop. Call sbatch with the same line again, or let SLURM requeue
# the job: the run goes on, on as many nodes as there are then.
#SBATCH --job-name=msign
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
cd "${SLURM_SUBMIT_DIR:-.}"
PATH="$PWD/.venv/bin:$PATH"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# exec: SLURM's signal reaches torchrun, which hands it to every rank; without --shutdown-timeout, torchrun would kill
# the ranks after 30 s, perhaps before the checkpoint is written
exec srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="${NPROC:-gpu}" \
  --shutdown-timeout=110 --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$head:${MASTER_PORT:-29500}" train.py "$@" --resume
