#!/usr/bin/env bash
# Every table and figure end to end on a CPU, with tiny models and images. OUT=runs says where.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export SMOKE=1 OUT=${OUT:-runs}
for script in scripts/table*.sh scripts/figure*.sh scripts/evidence.sh; do
  echo "== $script"
  bash "$script"
done
