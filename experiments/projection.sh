#!/usr/bin/env bash
# Projection beside selection (docs/results.md): a small ViT, 112 pixels, short training, on a CPU in minutes a run.
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

# Like selected, by a RULE that needs calibration; INIT names the selection.
fitted() { # SETTING DATA NAME RULE INIT [options of weight_selection.py] [-- options of main.py]
  local calibration=${calibration:-$(images "$2")}
  # shellcheck disable=SC2086  # words
  init=$5 selected "$1" "$2" "$3" --element_selection "$4" $calibration "${@:6}"
}

# Half the width.
for data in flowers cifar100; do
  data_path=$(folder $data)
  train vit_half_112 $data random
  selected vit_half_112 $data selected
  selected vit_half_112 $data consecutive --element_selection consecutive
  drawn vit_half_112 $data random_consistent --element_selection random
  for rule in project greedy; do
    fitted vit_half_112 $data $rule $rule ${data}_$rule
  done
done
data_path=$DATA

# How long?
for epochs in 5 10 40 80; do
  length=(--epochs $epochs --warmup_epochs $((epochs / 10 + 1)) --eval_interval $epochs)
  train vit_half_112 flowers random_$epochs "${length[@]}"
  init=selected selected vit_half_112 flowers selected_$epochs -- "${length[@]}"
  for rule in project greedy; do
    fitted vit_half_112 flowers ${rule}_$epochs $rule flowers_$rule -- "${length[@]}"
  done
done

# Which images, and how many?
for rule in project greedy; do
  calibration="--calibration noise" fitted vit_half_112 flowers ${rule}_noise $rule noise_$rule
  calibration=$(images cifar100) fitted vit_half_112 flowers ${rule}_cifar100 $rule cifar100_$rule
done
for count in 16 64; do
  fitted vit_half_112 flowers project_${count}_images project flowers_project_${count}_images --calibration_images $count
done

# What does each part bring?
for part in least_squares frame units heads; do
  selector="experiments/ablate_projection.py $part" \
    fitted vit_half_112 flowers project_without_$part project flowers_project_without_$part
done
for part in least_squares coordinates weights; do
  selector="experiments/ablate_projection.py $part" \
    fitted vit_half_112 flowers greedy_without_$part greedy flowers_greedy_without_$part
done

# Half the depth.
for data in flowers cifar100; do
  data_path=$(folder $data)
  train vit_a_112 $data random
  selected vit_a_112 $data first_n
  for layers in uniform quadratic; do
    selected vit_a_112 $data $layers --layer_selection $layers
    fitted vit_a_112 $data greedy_$layers greedy ${data}_greedy_$layers --layer_selection $layers
  done
done
data_path=$DATA

# Linear probing of both halves: what are the features worth before any training?
recipe=linear_probe_flowers
train vit_half_112 flowers linear_probe_random
init=selected selected vit_half_112 flowers linear_probe_selected
for rule in project greedy; do
  fitted vit_half_112 flowers linear_probe_$rule $rule flowers_$rule
done
train vit_a_112 flowers linear_probe_random
init=first_n selected vit_a_112 flowers linear_probe_first_n
for layers in uniform quadratic; do
  init=$layers selected vit_a_112 flowers linear_probe_$layers --layer_selection $layers
  fitted vit_a_112 flowers linear_probe_greedy_$layers greedy flowers_greedy_$layers --layer_selection $layers
done
finish projection_half projection_length projection_images projection_parts projection_depth projection_probe projection_probe_depth
