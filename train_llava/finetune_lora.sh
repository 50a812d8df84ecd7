#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with a CLIP-MoE tower, low-rank adapters in the place of the whole language model. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" lora "$@"
