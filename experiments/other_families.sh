#!/usr/bin/env bash
# ConvNeXt, and two families that the paper does not have, ResNet and MLP-Mixer, at 32 pixels, each on a CPU core in one to
# two hours: the teachers learn the first 50 classes of CIFAR-100, and students of half their width the last 50, from
# random weights and from a selection. The sizes of both are in experiments/other_families.yaml.
# Environment and arguments: scripts/experiment.sh; SEEDS="0 1 2" if not given. DATA holds cifar-100-python/, which is
# downloaded if it is missing, and takes class folders of both halves.
SEEDS=${SEEDS:-0 1 2}
source "$(dirname "$0")/../scripts/experiment.sh" "$@"
file=experiments/other_families.yaml

write_folders() { # first|last FROM TO: class folders of these classes in DATA
  [ -n "${SMOKE:-}${LISTING:-}" ] || make_once "$DATA/cifar100_$1" \
    "$PYTHON" experiments/cifar100_folders.py "$DATA" "$DATA/cifar100_$1" --classes "$2" "$3"
}

model_of() { # SETTING: its model and the model's arguments, as words
  "$PYTHON" -c '
import sys
from weight_selection.sources.recipe import read_recipe
options = read_recipe(sys.argv[1], "recipe")
print(*options["model"], *options.get("model_kwargs", []))' "$file:$1"
}

train_teacher() { # SETTING
  write_folders first 0 50
  recipe=$file:$1 data_path=$DATA/cifar100_first train_seed "$1" cifar100_first random 0
}

train_student() { # SETTING NAME [options of main.py]
  recipe=$file:$1 data_path=$DATA/cifar100_last train "$1" cifar100_last "${@:2}"
}

train_selected() { # TEACHER NAME [options of weight_selection.py]: select the student from its teacher and train it
  local teacher=$1 setting=$1_half name=$2 classes=50 words model sizes image=() student
  local init=$OUT/init/$setting/$name.pth
  wanted "$setting" cifar100_last "$name" || return 0
  words=$(model_of "$teacher")
  read -r model sizes <<<"$words"
  case $model in mixer*) image=(img_size=32) ;; esac
  student=(--student_config "$file:$setting")
  if [ -n "${SMOKE:-}" ]; then
    sizes=$(smoke_sizes teacher "$teacher") classes=3
    # shellcheck disable=SC2046  # words
    student=(--student "$model" --student_kwargs $(smoke_sizes student "$setting") ${image[@]+"${image[@]}"})
  fi
  train_teacher "$teacher"
  # shellcheck disable=SC2086  # words
  make_once "$init" "$PYTHON" weight_selection.py --output_dir "$init" \
    --pretrained_model "$model" --teacher_kwargs $sizes ${image[@]+"${image[@]}"} num_classes=$classes \
    --pretrained_path "$OUT/$teacher/cifar100_first/random/0/checkpoint-best.pth" "${student[@]}" "${@:3}"
  train_student "$setting" "$name" --initialize "$init"
}

write_folders last 50 100
images=$([ -n "${SMOKE:-}" ] && echo noise || echo "$DATA/cifar100_last/train")
for teacher_setting in resnet18d mixer convnext; do
  train_student ${teacher_setting}_half random
  train_selected $teacher_setting selected
  train_selected $teacher_setting inconsistent --element_selection random_inconsistent
  train_selected $teacher_setting greedy --element_selection greedy --calibration "$images"
done
finish other_families
