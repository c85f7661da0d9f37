#!/usr/bin/env bash
# Table 17: layer selection from ViT-L. Its first-N is the ViT-L of Table 8.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

# Each with q, k and v cut one by one, and as a whole like in today's release. Which way the paper's numbers are of is not known.
teacher=vit_large_patch16_224.augreg_in21k
selected vit_tiny cifar100 selected_vit_large_whole --fused_qkv whole
selected vit_tiny cifar100 selected_vit_large
for layers in mid_n last_n uniform; do
  selected vit_tiny cifar100 large_${layers}_whole --layer_selection $layers --fused_qkv whole
  selected vit_tiny cifar100 large_$layers --layer_selection $layers
done
finish table17
