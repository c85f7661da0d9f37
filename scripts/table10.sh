#!/usr/bin/env bash
# Table 10: weight selection without one of the components.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for data in cifar10 cifar100 stl10; do
  train vit_tiny $data random
  selected vit_tiny $data selected
  for component in patch_embed pos_embed attention norm mlp; do
    selected vit_tiny $data no_$component --exclude $component
  done
done
finish table10
