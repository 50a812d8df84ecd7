#!/usr/bin/env bash
# OCRBench: right answers of 1000, by category.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" ocrbench ocrbench "$@"
