#!/usr/bin/env bash
# MMBench dev: accuracy by the letter and circular accuracy here; the xlsx is for the server.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmbench mmbench "$@"
