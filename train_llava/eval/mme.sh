#!/usr/bin/env bash
# MME: perception and cognition scores.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/MME bash mme.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava mme --model-path "$MODEL" --data "${DATA:-playground/data/eval/MME}" "$@"
