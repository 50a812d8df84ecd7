#!/usr/bin/env bash
# TextVQA val with the OCR tokens of LLaVA-1.5's prompts; BENCH=textvqa_no_ocr asks without them.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" "${BENCH:-textvqa}" textvqa "$@"
