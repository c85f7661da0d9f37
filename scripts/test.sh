#!/usr/bin/env bash
# Lint and tests, offline, on a CPU. Arguments go to pytest: bash scripts/test.sh tests/test_models.py -k clip
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
CUDA_VISIBLE_DEVICES="" .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
