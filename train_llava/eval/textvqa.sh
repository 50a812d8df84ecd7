#!/usr/bin/env bash
# TextVQA val with the OCR tokens of LLaVA-1.5's prompts; BENCH=textvqa_no_ocr asks without them.
#   MODEL=llava-v1.5-7b-clipmoe DATA=playground/data/eval/textvqa bash textvqa.sh [--batch-size 16 --limit 100 ...]
# Uses all of CUDA_VISIBLE_DEVICES. `llava-clipmoe eval-llava --help` explains the flags.
set -euo pipefail
: "${MODEL:?set MODEL to the LLaVA to evaluate}"
exec llava-clipmoe eval-llava "${BENCH:-textvqa}" --model-path "$MODEL" --data "${DATA:-playground/data/eval/textvqa}" "$@"
