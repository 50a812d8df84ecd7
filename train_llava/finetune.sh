#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with a CLIP-MoE tower: train language model and projector on conversations. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" finetune "$@"
