#!/usr/bin/env bash
# VQAv2 test-dev: the json is for the EvalAI server.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/vqav2 bash vqav2.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava vqav2 --model-path "$MODEL" --data "${DATA:-playground/data/eval/vqav2}" "$@"
