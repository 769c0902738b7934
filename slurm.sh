#!/usr/bin/env bash
# Any launcher on several nodes under Slurm; the checkout and its outputs/ must be on a disk that all nodes share.
#   sbatch --nodes 4 slurm.sh fsdp2-fused-moe-Qwen3-30B-A3B-lora-256.sh [flags]
# Five minutes before the time limit every process gets SIGTERM, saves and exits; submit again with --resume to go on.
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --exclusive
#SBATCH --signal=TERM@300
set -euo pipefail
export NNODES=$SLURM_NNODES MASTER_PORT=${MASTER_PORT:-29500}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240  # seconds that torchrun leaves its processes to save
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash "$@"' launcher "$@"
