#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5 with a CLIP-MoE tower, low-rank adapters on a language model in 4 bits. See --help.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh" qlora "$@"
