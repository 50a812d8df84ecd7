#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5 with a CLIP-MoE tower: train the projector alone on image-caption pairs. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" pretrain "$@"
