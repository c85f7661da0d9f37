#!/usr/bin/env bash
# A table or figure on several nodes of a SLURM cluster:
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=80 --time=24:00:00 scripts/slurm.sh scripts/table02.sh vit_tiny imagenet
# On each node one task starts torchrun, which starts one process per GPU; the nodes find each other by the c10d
# rendezvous. NPROC=8 is the number of GPUs of a node, PORT=29500 the rendezvous port; the variables of
# scripts/experiment.sh count too. Two minutes before its time is over, or when SLURM pre-empts it, the job saves the
# run, stops it and queues itself again. A job that was cancelled goes on where it was when you submit it again.
#SBATCH --job-name=weight-selection
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
set -euo pipefail
[ $# -gt 0 ] && [ -n "${SLURM_JOB_ID:-}" ] || {
  echo "slurm.sh: error: start it with sbatch and the script to run: sbatch --nodes=2 scripts/slurm.sh scripts/table02.sh" >&2
  exit 2
}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun does not hand the job's number of cores on to its steps. experiment.sh replaces PYTHON by its interpreter.
export LAUNCH="srun --kill-on-bad-exit=1 --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} PYTHON -m \
torch.distributed.run --nnodes=$SLURM_NNODES --nproc_per_node=${NPROC:-8} --rdzv_id=$SLURM_JOB_ID \
--rdzv_backend=c10d --rdzv_endpoint=$head:${PORT:-29500}"

stop() { # the signal comes to this shell alone
  stopped=1
  scancel --signal=TERM "$SLURM_JOB_ID" # all steps: main.py saves and ends
}
stopped=
trap stop TERM
bash "$@" &
status=0
wait $! || status=$?
if [ -n "$stopped" ]; then
  status=0
  wait $! || status=$? # the first wait ended with the signal
  [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
