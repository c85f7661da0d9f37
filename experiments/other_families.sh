#!/usr/bin/env bash
# ConvNeXt, and two families that the paper does not have, ResNet and MLP-Mixer, at 32 pixels, each on a CPU core in one to two
# hours: the teachers learn the first 50 classes of CIFAR-100, and students of half their width the last 50, from random
# weights and from a selection.
# Environment and arguments: scripts/experiment.sh; SEEDS="0 1 2" if not given. DATA holds cifar-100-python/, which is
# downloaded if it is missing, and takes class folders of both halves.
SEEDS=${SEEDS:-0 1 2}
source "$(dirname "$0")/experiment.sh" "$@"

classes() { # PART FROM TO: class folders of these classes in DATA
  [ -n "${SMOKE:-}${LISTING:-}" ] || make_once "$DATA/cifar100_$1" \
    "$PYTHON" scripts/cifar100_folders.py "$DATA" "$DATA/cifar100_$1" --classes "$2" "$3"
}

teacher() { # TEACHER
  classes first 0 50
  data_path=$DATA/cifar100_first train_seed "$1" cifar100_first random 0
}

selected() { # NAME TEACHER STUDENT MODEL TEACHER_KWARGS [OPTION...]: select the student of its recipe and train it
  local name=$1 teacher=$2 setting=$3 model=$4 larger=$5 classes=50 image="" student
  student="--student_config recipes/$setting/cifar100_last.yaml"
  shift 5
  wanted "$setting" cifar100_last "$name" || return 0
  if [ -n "${SMOKE:-}" ]; then
    case $model in mixer*) image=" img_size=32" ;; esac
    larger=$(smoke_sizes teacher "$teacher")$image classes=3
    student="--student $model --student_kwargs $(smoke_sizes student "$setting")$image"
  fi
  teacher "$teacher"
  # shellcheck disable=SC2086  # words
  make_once "$OUT/init/$setting/$name.pth" \
    "$PYTHON" weight_selection.py --output_dir "$OUT/init/$setting/$name.pth" \
    --pretrained_model "$model" --teacher_kwargs $larger num_classes=$classes \
    --pretrained_path "$OUT/$teacher/cifar100_first/random/0/checkpoint-best.pth" $student "$@"
  data_path=$DATA/cifar100_last train "$setting" cifar100_last "$name" --initialize "$OUT/init/$setting/$name.pth"
}

family() { # TEACHER STUDENT MODEL TEACHER_KWARGS
  data_path=$DATA/cifar100_last train "$2" cifar100_last random
  selected selected "$@"
  selected inconsistent "$@" --element_selection random_inconsistent
  selected greedy "$@" --element_selection greedy --calibration "$([ -n "${SMOKE:-}" ] && echo noise || echo "$DATA/cifar100_last/train")"
}

classes last 50 100
family resnet18d resnet18d_half resnet18d "stem_width=32 channels=(64,128,256,512)"
family mixer mixer_half mixer_s16_224 "patch_size=4 num_blocks=4 img_size=32 embed_dim=256"
family convnext convnext_half convnext_tiny "patch_size=2 depths=(2,2,4,2) dims=(64,128,256,512)"
finish other_families
