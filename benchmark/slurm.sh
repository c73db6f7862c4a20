#!/usr/bin/env bash
# The seed sweep as a Slurm array, one seed per task: flags, NAME, EPISODES and RUNS as for
# benchmark/ppo_residual_so101.sh, other seeds with sbatch --array=501-510.
#
#   NAME=standard_200k sbatch benchmark/slurm.sh --total-timesteps 200000
#
# After all tasks have finished, run the plain script on the shared file system. It only writes the report:
#
#   NAME=standard_200k bash benchmark/ppo_residual_so101.sh --total-timesteps 200000
#
# One run on several machines, with a process per core (16 here). The processes connect to each other through the first
# machine. --num-envs and --minibatch-size are totals, and must be divisible by the number of processes.
#
#   salloc --nodes=4 --ntasks-per-node=1 --cpus-per-task=16 bash -c 'srun --export=ALL,OMP_NUM_THREADS=1 \
#     torchrun --nnodes=4 --nproc-per-node=16 --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
#     --rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \
#     ppo_residual_so101.py --num-envs 2048 --minibatch-size 32768 --total-timesteps 10000000'
#
#SBATCH --job-name=so101
#SBATCH --array=401-420
#SBATCH --cpus-per-task=1
#SBATCH --mem=2G
#SBATCH --time=01:00:00
#SBATCH --output=slurm-%A_%a.txt
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# shellcheck disable=SC1091
[ ! -e .venv/bin/activate ] || source .venv/bin/activate
SEEDS=$SLURM_ARRAY_TASK_ID JOBS=1 OUT='' bash benchmark/ppo_residual_so101.sh "$@"
