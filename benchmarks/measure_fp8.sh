#!/usr/bin/env bash
# Experts that compute in FP8, on one Hopper GPU: are they right, how long do a block and a step take, beside bf16's
# products of bf16 and of widened weights. `bash benchmarks/measure_fp8.sh`, or with one of: tests, block, step.
# Appends to results/fused_moe_lora.json and results/step.json; the tests print every gradient's distance from fp32.
set -euo pipefail
cd "$(dirname "$0")/.."
stages=${*:-tests block step}
for stage in $stages; do
    case $stage in
        tests)
            python -m pytest -m gpu -s -q tests/test_fp8_arithmetic.py
            ;;
        block)
            python benchmarks/bench_fused_moe_lora.py --adapters lora --routings random --modes fast --per_op true \
                --implementations fused_moe_lora,fused_moe_lora_widened,fused_moe_lora_fp8
            ;;
        step)
            for arithmetic in bf16 fp8; do
                python benchmarks/bench_step.py --gpus 1 --base_dtype fp8 --expert_arithmetic $arithmetic
            done
            ;;
        *)
            echo "error: $stage: expected tests, block or step" >&2
            exit 1
            ;;
    esac
done
