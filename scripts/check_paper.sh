#!/usr/bin/env bash
# Run every command of docs/paper.md as a dry run; fail at the first that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
export PYTHON

grep -o '`bash scripts/[a-z]*[0-9]*\.sh`' docs/paper.md | tr -d '`' | sort -u | while read -r command; do
  printed=$(DRY_RUN=1 $command)
  echo "$command: $(wc -l <<<"$printed") commands"
done
for options in "--element_selection consecutive" "--element_selection random --seed 1" \
  "--element_selection random_inconsistent --seed 1" "--exclude norm" ""; do
  for names in "vit vit_small_patch16_224_in21k" "convnext convnext_tiny_in22k"; do
    read -r type teacher <<<"$names"
    # shellcheck disable=SC2086  # words
    "$PYTHON" weight_selection.py --model_type $type --pretrained_model $teacher $options --dry_run | tail -n 1
  done
done
