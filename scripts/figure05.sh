#!/usr/bin/env bash
# Figure 5: attention products of random, pretrained and selected weights, into OUT/figure05.png.
# Environment: scripts/experiment.sh.
source "$(dirname "$0")/experiment.sh"

[ $# = 0 ] || fail "$*: takes no arguments"
select_weights vit_tiny selected
teacher=vit_small_patch16_224.augreg_in21k
file=$(teacher_file $teacher)
student_size=() teacher_size=()
if [ -n "${SMOKE:-}" ]; then
  read -ra student_size <<<"$(smoke_sizes student vit_tiny) img_size=32"
  read -ra teacher_size <<<"$(smoke_sizes teacher $teacher) img_size=32"
fi
run "$PYTHON" scripts/plot_attention.py --output "$OUT/figure05.png" \
  --panel "random init" vit_tiny timm ${student_size[@]+"${student_size[@]}"} \
  --panel "pretrained ViT-S" $teacher "${file:-pretrained}" ${teacher_size[@]+"${teacher_size[@]}"} \
  --panel "weight selection" vit_tiny "$OUT/init/vit_tiny/selected" ${student_size[@]+"${student_size[@]}"}
