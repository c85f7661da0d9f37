#!/usr/bin/env bash
# Table 16: which six of the twelve layers of a pretrained ViT-T to fine-tune.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for layers in first_n mid_n last_n uniform; do
  teacher=vit_tiny_patch16_224.augreg_in21k selected vit_a cifar100 tiny_$layers --layer_selection $layers
done
finish table16
