#!/usr/bin/env bash
# Table 11: longer training on ImageNet-1K.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_tiny convnext_femto; do
  for data in imagenet imagenet_long; do
    train $setting $data random
    selected $setting $data selected
  done
done
finish table11
