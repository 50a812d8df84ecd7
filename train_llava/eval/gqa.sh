#!/usr/bin/env bash
# GQA testdev-balanced: accuracy.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" gqa gqa "$@"
