#!/usr/bin/env bash
# MMBench-CN dev: as mmbench.sh, in Chinese.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmbench_cn mmbench_cn "$@"
