#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with a CLIP-MoE tower: train language model and projector on conversations. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_defaults finetune 128 2e-5 16 zero3
FINISHED=training_args.bin # what upstream writes last

stage_flags() {
    stage_2_flags
}

main "$@"
