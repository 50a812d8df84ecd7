#!/usr/bin/env bash
# VQAv2 test-dev: the json is for the EvalAI server.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" vqav2 vqav2 "$@"
