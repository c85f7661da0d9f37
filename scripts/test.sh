#!/usr/bin/env bash
# Lint and tests, offline, on a CPU.
#   bash scripts/test.sh                             all of them, as a change must pass them
#   bash scripts/test.sh --quick                     while editing: one case of each test that does not train or start processes
#   bash scripts/test.sh tests/test_models.py -k ema all arguments go to pytest
# What --quick leaves out is decided in tests/conftest.py; the last line of the output counts it.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Compiled modules are kept: else each of the two processes, and each that a test starts, compiles all of them.
unset PYTHONDONTWRITEBYTECODE
# worksteal: half of the tests for each process, and who is done first takes from the other.
CUDA_VISIBLE_DEVICES="" .venv/bin/python -m pytest -n 2 --dist worksteal "$@"
