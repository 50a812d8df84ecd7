#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5 with a CLIP-MoE tower: train the projector alone on image-caption pairs. See --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

stage_defaults pretrain 256 1e-3 32 zero2
DATA=${DATA:-playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGES=${IMAGES:-playground/data/LLaVA-Pretrain/images}
FINISHED=mm_projector.bin # what upstream writes last

stage_flags() {
    flags --version plain --tune_mm_mlp_adapter True
}

main "$@"
