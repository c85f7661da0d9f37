#!/usr/bin/env bash
# Table 12: mimetic initialisation.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for data in cifar10 cifar100 stl10; do
  train vit_tiny $data random
  train vit_tiny $data mimetic --init mimetic
  selected vit_tiny $data selected
done
finish table12
