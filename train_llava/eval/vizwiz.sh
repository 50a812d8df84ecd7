#!/usr/bin/env bash
# VizWiz test: the json is for the EvalAI server.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/vizwiz bash vizwiz.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava vizwiz --model-path "$MODEL" --data "${DATA:-playground/data/eval/vizwiz}" "$@"
