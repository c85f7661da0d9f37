#!/usr/bin/env bash
# Table 7: pruning as element selection.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_tiny convnext_femto; do
  train $setting cifar100 random
  selected $setting cifar100 selected
  selected $setting cifar100 l1 --element_selection l1
  selected $setting cifar100 magnitude --element_selection magnitude
done
finish table07
