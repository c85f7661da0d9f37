#!/usr/bin/env bash
# Table 5: ViT-B of different pretraining as teachers.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for data in cifar10 cifar100 stl10; do
  teacher=vit_base_patch16_224.augreg_in21k selected vit_tiny $data selected_vit_base
  # CLIP's ViT normalises before the first block, and so must its student.
  teacher=vit_base_patch16_clip_224.openai selected vit_tiny $data clip --student vit_tiny_clip -- --model vit_tiny_clip
  teacher=vit_base_patch16_224.mae selected vit_tiny $data mae
  teacher=vit_base_patch16_224.dino selected vit_tiny $data dino
done
finish table05
