#!/usr/bin/env bash
# Every table, figure and experiment end to end on a CPU, with tiny models and images, in OUT (default: a new temporary directory).
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
export SMOKE=1 OUT=${OUT:-$(mktemp -d)}
for script in scripts/table*.sh scripts/figure*.sh experiments/*.sh; do
  echo "== $script"
  bash "$script"
done
echo "all passed; results: $OUT"
