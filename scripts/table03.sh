#!/usr/bin/env bash
# Table 3: classic initialisations, and ways to select elements.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_tiny convnext_femto; do
  train $setting cifar100 random
  train $setting cifar100 xavier --init xavier
  train $setting cifar100 kaiming --init kaiming
  selected $setting cifar100 selected
  selected $setting cifar100 consecutive --element_selection consecutive
  drawn $setting cifar100 random_consistent --element_selection random
  drawn $setting cifar100 random_inconsistent --element_selection random_inconsistent
done
finish table03
