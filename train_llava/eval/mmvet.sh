#!/usr/bin/env bash
# MM-Vet: free answers; the json is for MM-Vet's LLM judge.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmvet mm-vet "$@"
