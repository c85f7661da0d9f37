#!/usr/bin/env bash
# Table 17: layer selection from ViT-L. Its first-N is the ViT-L of Table 8.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

teacher=vit_large_patch16_224.augreg_in21k
selected vit_tiny cifar100 selected_vit_large
for layers in mid_n last_n uniform; do
  selected vit_tiny cifar100 large_$layers --layer_selection $layers
done
finish table17
