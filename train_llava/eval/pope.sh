#!/usr/bin/env bash
# POPE: yes/no questions about objects; F1, accuracy, yes ratio.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" pope pope "$@"
