#!/usr/bin/env bash
# Table 2: random initialisation and weight selection on ten data sets.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_tiny convnext_femto; do
  for data in imagenet svhn food101 eurosat cifar10 cifar100 stl10 flowers pets dtd; do
    train $setting $data random
    selected $setting $data selected
  done
done
finish table02
