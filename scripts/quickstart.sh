#!/usr/bin/env bash
# The whole story in minutes on a CPU: train a ViT on scikit-learn's digits, select weights of it for one of half the
# width, train that from the selection and from random weights over three seeds, compare.
# OUT chooses where the results go; default: runs/quickstart. Run again, it continues what is there.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
python=.venv/bin/python
out=${OUT:-runs/quickstart}
mkdir -p "$out"
SECONDS=0 # bash counts on from here: set-up is over
export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""  # these models are too small for more

larger="patch_size=4 embed_dim=128 depth=4 num_heads=4"
smaller="patch_size=4 embed_dim=64 depth=4 num_heads=2"
digits="img_size=16 num_classes=10"

echo "1. Train the larger model (log: $out/teacher.txt)"
$python main.py --config recipes/digits.yaml --model_kwargs $larger --epochs 40 --warmup_epochs 4 --eval_interval 10 \
  --output_dir "$out/teacher" >"$out/teacher.txt"
tail -n 1 "$out/teacher.txt"

echo "2. Select weights for a model of half its width"
$python weight_selection.py --output_dir "$out/selected" --overwrite \
  --pretrained_model vit_tiny --teacher_kwargs $larger $digits --pretrained_path "$out/teacher/checkpoint-best.pth" \
  --student vit_tiny --student_kwargs $smaller $digits

echo "3. Train the smaller model from random and from selected weights, seeds 0 to 2"
train() {
  $python main.py --config recipes/digits.yaml --model_kwargs $smaller --epochs 20 --warmup_epochs 2 --seed "$2" \
    --output_dir "$out/$1-$2" "${@:3}" >"$out/$1-$2.txt"
}
for seed in 0 1 2; do
  train random $seed &
  train selected $seed --initialize "$out/selected"
  wait $!
done

$python scripts/plot_curves.py --title "Digits: a ViT from random and from selected weights" \
  --output "$out/curves.png" random "$out"/random-? selected "$out"/selected-?
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s on $(getconf _NPROCESSORS_ONLN) cores, set-up not counted"
