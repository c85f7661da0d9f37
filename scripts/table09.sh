#!/usr/bin/env bash
# Table 9: linear probing.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_tiny convnext_femto; do
  recipe=linear_probe_cifar100 train $setting cifar100 linear_probe_random
  recipe=linear_probe_cifar100 init=selected selected $setting cifar100 linear_probe_selected
done
finish table09
