#!/usr/bin/env bash
# Table 1: sizes of the students and teachers, counted in the models.
# Environment: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh"

[ $# = 0 ] || fail "$*: takes no arguments"
run "$PYTHON" scripts/print_configurations.py
