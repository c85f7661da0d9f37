#!/usr/bin/env bash
# The first experiments of docs/results.md: a small ViT, 112 pixels, short training, on a CPU in minutes a run.
# Environment and arguments: scripts/experiment.sh. DATA holds flowers-102/ and what this makes of CIFAR-100:
#   python experiments/cifar100_folders.py data/ data/cifar100_50 --train 50
source "$(dirname "$0")/../scripts/experiment.sh" "$@"
recipes=experiments
setting=vit_half_112

# Table 3, 7, 12: initialisations, and ways to select elements.
train $setting flowers random
for init_scheme in xavier kaiming mimetic; do
  train $setting flowers $init_scheme --init $init_scheme
done
selected $setting flowers selected
for rule in consecutive l1 magnitude; do
  selected $setting flowers $rule --element_selection $rule
done
drawn $setting flowers random_consistent --element_selection random
drawn $setting flowers random_inconsistent --element_selection random_inconsistent

# Table 4: feature distillation.
features="feature vit_tiny_patch16_224.augreg_in21k_ft_in1k"
distill=$features train $setting flowers feature_distilled
init=selected distill=$features selected $setting flowers feature_distilled_selected

# Table 9: linear probing.
recipe=linear_probe_flowers train $setting flowers linear_probe_random
recipe=linear_probe_flowers init=selected selected $setting flowers linear_probe_selected
recipe=linear_probe_flowers train $setting flowers linear_probe_random_low_lr --lr 0.1
recipe=linear_probe_flowers init=selected selected $setting flowers linear_probe_selected_low_lr -- --lr 0.1
data_path=$DATA/cifar100_50
recipe=linear_probe_cifar100 train $setting cifar100 linear_probe_random
recipe=linear_probe_cifar100 init=selected selected $setting cifar100 linear_probe_selected

# Table 16: which six of twelve layers.
train vit_a_112 cifar100 random
for layers in first_n mid_n last_n uniform; do
  selected vit_a_112 cifar100 $layers --layer_selection $layers
done
finish evidence_elements evidence_distillation evidence_probe evidence_probe_lr evidence_layers
