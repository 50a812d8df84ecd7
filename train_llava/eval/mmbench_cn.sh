#!/usr/bin/env bash
# MMBench-CN dev: as mmbench.sh, in Chinese.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/mmbench_cn bash mmbench_cn.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava mmbench_cn --model-path "$MODEL" --data "${DATA:-playground/data/eval/mmbench_cn}" "$@"
