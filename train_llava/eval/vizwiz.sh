#!/usr/bin/env bash
# VizWiz test: the json is for the EvalAI server.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" vizwiz vizwiz "$@"
