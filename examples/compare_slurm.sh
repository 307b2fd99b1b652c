#!/bin/bash
# Compare methods on several machines with Slurm: sbatch examples/compare_slurm.sh
#
# Every task is one process with one GPU. Each takes a model that no other task is making; the last one to finish writes
# the report. A task that is cut off loses nothing: submit the script again, and it goes on. The folder must be on a file
# system that all machines share. See docs/launchers.md.
#SBATCH --job-name=gradpruner-compare
#SBATCH --ntasks=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00

set -euo pipefail

# srun starts independent processes here. They must not take themselves for one training in eight processes.
unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT

# --mpi=none: otherwise accelerate could take the tasks for one training.
# --kill-on-bad-exit=0: if a task fails, the others finish what they can.
srun --mpi=none --kill-on-bad-exit=0 gradpruner compare \
  --model "${MODEL:-meta-llama/Llama-3.2-1B}" \
  --data "${DATA:-train.jsonl}" \
  --steps "${STEPS:-250}" \
  --ratios 0.2 0.4 \
  --seeds 0 1 2 \
  --out "${OUT:-comparison}"
