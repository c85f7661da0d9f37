#!/usr/bin/env bash
# EfficientNet-Lite0 at half its width on Flowers-102, from random weights, weight selection and greedy projection.
#   bash experiments/convnets.sh DATA TEACHER OUT [options of main.py]
# DATA holds class folders train/ and val/, TEACHER is the file of the teacher's weights. OUT/ARM/facts.json says how good
# the features are before training, OUT/ARM/run/results.json how good the student is after it.
set -euo pipefail
data=$1 teacher=$2 out=$3
shift 3
cd "$(dirname "$0")/.."
# Batch normalisations of random and selected weights do not have the student's own statistics. So its features change when
# training begins, and a classifier that was fitted to them before is wrong.
declare -A classifier=([random]=random [selection]=random [greedy]=ridge)
for arm in selection greedy random; do
  options=(--config experiments/efficientnet_half.yaml:flowers --data_path "$data" --num_workers 0 "$@")
  if [ ! -e "$out/$arm" ]; then
    "${PYTHON:-python}" experiments/rivals/first_weights.py "$arm" "$out/$arm" --teacher tf_efficientnet_lite0 \
      --teacher_path "$teacher" -- "${options[@]}"
  fi
  "${PYTHON:-python}" main.py "${options[@]}" --initialize "$out/$arm/weights.pth" --classifier_init "${classifier[$arm]}" \
    --output_dir "$out/$arm/run" --overwrite true
done
