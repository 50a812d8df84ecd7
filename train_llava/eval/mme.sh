#!/usr/bin/env bash
# MME: perception and cognition scores.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mme MME "$@"
