#!/usr/bin/env bash
# Table 4: knowledge distillation, weight selection, and both.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

deit=deit_small_patch16_224.fb_in1k
train vit_tiny imagenet random
distill="logit $deit" train vit_tiny imagenet logit_distilled
teacher=$deit selected vit_tiny imagenet selected_deit
teacher=$deit init=selected_deit distill="logit $deit" selected vit_tiny imagenet logit_distilled_selected

features="feature vit_small_patch16_224.augreg_in21k"
train vit_tiny cifar100 random
distill=$features train vit_tiny cifar100 feature_distilled
selected vit_tiny cifar100 selected
init=selected distill=$features selected vit_tiny cifar100 feature_distilled_selected
# The paper tuned alpha for the features and does not give it. ALPHA="0.3 3" trains with others, in runs of their own.
for alpha in ${ALPHA:-}; do
  distill=$features train vit_tiny cifar100 feature_distilled_alpha$alpha --distillation_alpha $alpha
  init=selected distill=$features selected vit_tiny cifar100 feature_distilled_selected_alpha$alpha -- \
    --distillation_alpha $alpha
done
finish table04
