#!/usr/bin/env bash
# MMBench dev: accuracy by the letter and circular accuracy here; the xlsx is for the server.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/mmbench bash mmbench.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava mmbench --model-path "$MODEL" --data "${DATA:-playground/data/eval/mmbench}" "$@"
