#!/usr/bin/env bash
# Figure 3: training curves on ImageNet-1K, into OUT/figure03a.png (ViT-T) and b (ConvNeXt-F).
# Environment and arguments: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh" "$@"

for setting in vit_tiny convnext_femto; do
  train $setting imagenet random
  selected $setting imagenet selected
done
finish

plot() { # PANEL SETTING NAME: if its runs are there
  local runs=$OUT/$2/imagenet
  if there "$runs/random/*/results.json" && there "$runs/selected/*/results.json"; then
    run "$PYTHON" scripts/plot_curves.py --output "$OUT/figure03$1.png" --title "$3 on ImageNet-1K" \
      "random init" "$runs/random" "weight selection" "$runs/selected"
  fi
}
plot a vit_tiny ViT-T
plot b convnext_femto ConvNeXt-F
