#!/usr/bin/env bash
# Two families that the paper does not have, ResNet and MLP-Mixer, on a CPU core in an hour and a half: the teachers learn the
# first 50 classes of CIFAR-100, and students of half their width the last 50, from random weights and from a selection.
# Environment and arguments: scripts/experiment.sh; SEEDS="0 1 2" if not given. DATA holds cifar-100-python/, which is
# downloaded if it is missing, and takes class folders of both halves.
SEEDS=${SEEDS:-0 1 2}
source "$(dirname "$0")/experiment.sh" "$@"

classes() { # PART FROM TO: class folders of these classes in DATA
  [ -n "${SMOKE:-}${LISTING:-}" ] || make_once "$DATA/cifar100_$1" \
    "$PYTHON" scripts/cifar100_folders.py "$DATA" "$DATA/cifar100_$1" --classes "$2" "$3"
}

selection() { # TEACHER STUDENT MODEL TEACHER_KWARGS: train the teacher, select from it the student of its recipe
  local model=$3 larger=$4 classes=50 student="--student_config recipes/$2/cifar100_last.yaml" image=""
  if [ -n "${SMOKE:-}" ]; then
    case $model in mixer*) image=" img_size=32" ;; esac
    larger=$(smoke_sizes teacher "$1")$image classes=3
    student="--student $model --student_kwargs $(smoke_sizes student "$2")$image"
  fi
  classes first 0 50
  data_path=$DATA/cifar100_first train_seed "$1" cifar100_first random 0
  # shellcheck disable=SC2086  # words
  make_once "$OUT/init/$2/selected.pth" \
    "$PYTHON" weight_selection.py --output_dir "$OUT/init/$2/selected.pth" \
    --pretrained_model "$model" --teacher_kwargs $larger num_classes=$classes \
    --pretrained_path "$OUT/$1/cifar100_first/random/0/checkpoint-best.pth" $student
}

family() { # TEACHER STUDENT MODEL TEACHER_KWARGS
  data_path=$DATA/cifar100_last train "$2" cifar100_last random
  wanted "$2" cifar100_last selected || return 0
  selection "$@"
  data_path=$DATA/cifar100_last train "$2" cifar100_last selected --initialize "$OUT/init/$2/selected.pth"
}

classes last 50 100
family resnet18d resnet18d_half resnet18d "stem_width=32 channels=(64,128,256,512)"
family mixer mixer_half mixer_s16_224 "patch_size=4 num_blocks=4 img_size=32 embed_dim=256"
finish other_families
