#!/usr/bin/env bash
# Table 6: layer selection.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_a convnext_femto; do
  train $setting cifar100 random
  selected $setting cifar100 selected
  selected $setting cifar100 uniform_layers --layer_selection uniform
done
finish table06
