#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with a CLIP-MoE tower, low-rank adapters on a language model in 4 bits. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_defaults qlora 128 2e-4 16 zero2
FINISHED=non_lora_trainables.bin # what upstream writes last

stage_flags() {
    stage_2_flags
    lora_flags
    flags --bits 4
}

main "$@"
