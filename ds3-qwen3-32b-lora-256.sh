#!/usr/bin/env bash
# Qwen3-32B, LoRA rank 256 on every linear layer: one node of 8 GPUs of 80 GB, 32 packs x 16,384 = 524,288 token places a step.
# Several nodes: run it on each with NNODES, NODE_RANK and MASTER_ADDR set. Any flag of train_dense.py may follow.
# Planned for 8 x 80 GB: 72 GiB a GPU, 4.5 to 6.9 hours for 3 epochs. Measured: not yet.
set -euo pipefail
cd "$(dirname "$0")"
export NUM_GPUS=${NUM_GPUS:-8} NNODES=${NNODES:-1}

ARGS=(
    --run_name "$(basename "$0" .sh)"
    --model_name_or_path Qwen/Qwen3-32B
    --dataset Scicom-intl/Malaysian-Instructions
    --max_seq_length 16384
    --global_batch_size 32
    --r 256
    --learning_rate 1e-4
    --warmup_steps 50
    --num_train_epochs 3
    --deepspeed ds3.json
)

# Tokenise and pack once, in one process: the ranks then only memory-map the result.
python3 train_dense.py "${ARGS[@]}" --prepare_only True "$@"
[[ " $* " =~ \ --(dry_run|prepare_only)[\ =]([TtYy1-]|$) ]] && exit  # the plan, or the report, is printed

# torchrun, whose flags end at "--". Without a GPU the NUM_GPUS processes run on the CPU.
exec python3 -m malaysian_sft.launch \
    --nproc_per_node "$NUM_GPUS" \
    --nnodes "$NNODES" \
    --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" \
    --master_port "${MASTER_PORT:-29500}" \
    -- train_dense.py "${ARGS[@]}" "$@"
