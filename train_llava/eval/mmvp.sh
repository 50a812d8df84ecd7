#!/usr/bin/env bash
# MMVP: pairs of pictures that CLIP takes for the same; pair accuracy.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/mmvp bash mmvp.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava mmvp --model-path "$MODEL" --data "${DATA:-playground/data/eval/mmvp}" "$@"
