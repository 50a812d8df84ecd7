#!/usr/bin/env bash
# MMVP: pairs of pictures that CLIP takes for the same; pair accuracy.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmvp mmvp "$@"
