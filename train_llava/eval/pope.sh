#!/usr/bin/env bash
# POPE: yes/no questions about objects; F1, accuracy, yes ratio.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/pope bash pope.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava pope --model-path "$MODEL" --data "${DATA:-playground/data/eval/pope}" "$@"
