#!/usr/bin/env bash
# Half of a ViT's layers, selected or projected (docs/results.md): 112 pixels, short training, on a CPU in minutes a run.
# Environment and arguments: scripts/experiment.sh. DATA holds flowers-102/ and what these make of CIFAR-100 and Flowers:
#   python experiments/cifar100_folders.py data/ data/cifar100_50 --train 50
#   python scripts/calibration_images.py flowers data/ data/flowers_256 --count 256
source "$(dirname "$0")/../scripts/experiment.sh" "$@"
recipes=experiments

folder() { # DATA: print the directory of its images
  case $1 in
    cifar100) echo "$DATA/cifar100_50" ;;
    *) echo "$DATA" ;;
  esac
}

images() { # DATA: print the options that calibrate with its training images
  local source=$DATA/flowers_256
  case $1 in cifar100) source=$(folder cifar100)/train ;; esac
  [ -z "${SMOKE:-}" ] || source=noise
  echo "--calibration $source"
}

greedy() { # DATA NAME LAYERS: train from the layers that --layer_selection LAYERS keeps, the skipped ones approximated
  # shellcheck disable=SC2046  # words
  init=$1_greedy_$3 selected vit_a_112 "$1" "$2" --element_selection greedy $(images "$1") --layer_selection "$3"
}

# Half the depth.
for data in flowers cifar100; do
  data_path=$(folder $data)
  train vit_a_112 $data random
  selected vit_a_112 $data first_n
  for layers in uniform quadratic; do
    selected vit_a_112 $data $layers --layer_selection $layers
    greedy $data greedy_$layers $layers
  done
done
data_path=$DATA

# Linear probing: what are the features worth before any training?
recipe=linear_probe_flowers
train vit_a_112 flowers linear_probe_random
init=first_n selected vit_a_112 flowers linear_probe_first_n
for layers in uniform quadratic; do
  init=$layers selected vit_a_112 flowers linear_probe_$layers --layer_selection $layers
  greedy flowers linear_probe_greedy_$layers $layers
done
finish projection_depth projection_probe_depth
