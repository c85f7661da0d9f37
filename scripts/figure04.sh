#!/usr/bin/env bash
# Figure 4: what weight selection saves of training, into OUT/figure04.png.
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"
# (a) EPOCHS="25 50 75 100 150 200" of training, and the recipe's 300. (b) PRETRAINING="20 40 60 80 100" epochs on
# ImageNet-1K before fine-tuning for the recipe's 300. The warm-up keeps its share of a sixth.
length() { # EPOCHS
  echo "--epochs $1 --warmup_epochs $((($1 + 3) / 6))"
}

train vit_tiny cifar100 random
selected vit_tiny cifar100 selected
for epochs in ${EPOCHS:-25 50 75 100 150 200}; do
  # shellcheck disable=SC2046  # words
  train vit_tiny cifar100 random_$epochs $(length $epochs)
  # shellcheck disable=SC2046
  init=selected selected vit_tiny cifar100 selected_$epochs -- $(length $epochs)
done

seeds=$SEEDS
for epochs in ${PRETRAINING:-20 40 60 80 100}; do
  # shellcheck disable=SC2046
  train vit_tiny imagenet pretrained_$epochs $(length $epochs)
  for seed in $seeds; do
    pretrained=$OUT/vit_tiny/imagenet/pretrained_$epochs/$seed
    if [ -n "${LISTING:-}" ] || there "$pretrained/results.json"; then
      SEEDS=$seed train vit_tiny cifar100 finetuned_$epochs --finetune "$pretrained/checkpoint-best.pth"
    else
      echo "skipped: vit_tiny cifar100 finetuned_$epochs, seed $seed: waits for $pretrained"
    fi
  done
done
finish
if there "$OUT/vit_tiny/cifar100/*/*/results.json"; then
  run "$PYTHON" scripts/plot_epochs.py "$OUT" --output "$OUT/figure04.png"
fi
