#!/usr/bin/env bash
# MMStar: accuracy by category.
source "$(dirname "${BASH_SOURCE[0]}")/../benchmark.sh" mmstar mmstar "$@"
