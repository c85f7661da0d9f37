# What the scripts of tables, figures and experiments share: each sources it with its arguments, then lists its runs.
#
# A run is SETTING DATA NAME and a seed: the recipe recipes/SETTING.yaml:DATA, and a name for what is different about
# it. Its results are in $OUT/SETTING/DATA/NAME/SEED, so tables share runs. A finished run is skipped, an interrupted
# one goes on. Arguments choose runs by setting, data set or name: bash scripts/table02.sh vit_tiny flowers pets
#
# Variables before a call change it: teacher=NAME selects from another teacher, init=NAME starts from the selection of
# that name, distill="logit|feature TEACHER" distills, recipe=SECTION or FILE:SECTION takes another recipe, data_path=DIR
# names other data. A script that sets recipes=DIR takes all its recipes from there.
#
# From the environment, relative paths from the root of the repository:
#
#   DATA=data         the data sets, each as INSTALL.md says
#   IMAGENET          ImageNet's train/ and val/ (default: $DATA/imagenet)
#   OUT=results       where all results go
#   NPROC=1           processes, one per GPU, of which the recipe's total batch must be a multiple
#   SEEDS=0           such as "0 1 2"
#   TEACHERS          directory of NAME.safetensors, .pth or .npz of every teacher (default: from the hub)
#   MAIN_ARGS         more options for every run of main.py, such as "--batch_size 256 --num_workers 16"
#   LAUNCH            what starts main.py instead of NPROC processes here (scripts/slurm.sh sets it)
#   PYTHON            interpreter (default: .venv's if there is one, else python)
#   DRY_RUN=1         print the commands and do nothing
#   SMOKE=1           the same runs in minutes on a CPU: tiny models, tiny images, two epochs, in $OUT/smoke
set -euo pipefail

fail() {
  echo "$script: error: $1" >&2
  exit 2
}

list_chosen() { # WORD...: print those of the runs SETTING DATA NAME on stdin that the words ask for
  awk -v words="$*" '
    { line[NR] = $0; for (c = 1; c <= 3; c++) { field[NR, c] = $c; values[c, $c] } }
    END {
      count = split(words, word, " ")
      for (i = 1; i <= count; i++) {
        given[word[i]]
        for (c = 1; c <= 3; c++) if ((c, word[i]) in values) asked[c]
      }
      for (n = 1; n <= NR; n++) {
        fits = 1
        for (c = 1; c <= 3; c++) if ((c in asked) && !(field[n, c] in given)) fits = 0
        if (fits) { print line[n]; for (c = 1; c <= 3; c++) used[field[n, c]] }
      }
      for (i = 1; i <= count; i++) if (!(word[i] in used)) odd = odd " " word[i]
      if (odd) {
        for (n = 1; n <= NR; n++) print line[n] > "/dev/stderr"
        print substr(odd, 2)
        exit 2
      }
    }'
}

script=$(basename "$(cd "$(dirname "$0")" && pwd)")/$(basename "$0")
NPROC=${NPROC:-1}
case $NPROC in 0 | *[!0-9]*) fail "NPROC=$NPROC: give the number of processes" ;; esac
if [ $# -gt 0 ]; then
  chosen=$(LISTING=1 bash "$0" | list_chosen "$@") || fail "$(tail -n 1 <<<"$chosen"): matches none of the runs above"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

unset teacher init distill recipe recipes data_path # the user's environment may have some of these names
OUT=${OUT:-results}
DATA=${DATA:-data}
SEEDS=${SEEDS:-0}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
read -ra main_args <<<"${MAIN_ARGS:-}"
if [ -n "${LAUNCH:-}" ]; then
  read -ra launch <<<"${LAUNCH//PYTHON/$PYTHON}"
elif [ "$NPROC" -gt 1 ]; then
  launch=("$PYTHON" -m torch.distributed.run --standalone "--nproc_per_node=$NPROC")
else
  launch=("$PYTHON")
fi
if [ -n "${SMOKE:-}" ]; then
  OUT=$OUT/smoke
  TEACHERS=$OUT/teachers
  export OMP_NUM_THREADS=1
fi
made=() # in a dry run: the files that a real run would have made by now

wanted() { # SETTING DATA NAME: do the arguments ask for it?
  if [ -n "${LISTING:-}" ]; then
    echo "$*"
    return 1
  fi
  [ -z "${chosen+set}" ] || grep -qxF "$*" <<<"$chosen"
}

run() {
  printf '%q ' "$@" | sed 's/ $/\n/'
  [ -n "${DRY_RUN:-}" ] || "$@"
}

make_once() { # PATH COMMAND...: make a file by a command, unless it is there; wait if another script is making it
  local path
  if [ -n "${DRY_RUN:-}" ]; then
    for path in ${made[@]+"${made[@]}"}; do
      [ "$path" != "$1" ] || return 0
    done
    made+=("$1")
    [ -e "$1" ] || run "${@:2}"
    return
  fi
  [ ! -e "$1" ] || return 0
  mkdir -p "$(dirname "$1")"
  (
    flock 9
    [ -e "$1" ] || run "${@:2}"
  ) 9>"$(dirname "$1")/.$(basename "$1").lock"
}

teacher_file() { # NAME: print the teacher's file in TEACHERS; nothing without TEACHERS
  [ -n "${TEACHERS:-}" ] || return 0
  if [ -n "${SMOKE:-}" ]; then
    echo "$TEACHERS/$1.pth"
    return
  fi
  local suffix
  for suffix in safetensors pth npz; do
    if [ -f "$TEACHERS/$1.$suffix" ]; then
      echo "$TEACHERS/$1.$suffix"
      return
    fi
  done
  fail "TEACHERS=$TEACHERS: holds no $1.safetensors, .pth or .npz; put it there, or unset TEACHERS to take it from the hub"
}

describe() { # SETTING: set student, and teacher unless the caller has set it
  case $1 in
    vit_tiny | vit_a)
      student=(--student "$1")
      teacher=${teacher:-vit_small_patch16_224.augreg_in21k}
      ;;
    convnext_femto)
      student=(--student convnext_femto)
      teacher=${teacher:-convnext_tiny.fb_in22k}
      ;;
    vit_half_112)
      student=(--student vit_tiny --student_kwargs embed_dim=96 num_heads=3 img_size=112)
      teacher=${teacher:-vit_tiny_patch16_224.augreg_in21k_ft_in1k}
      ;;
    vit_a_112)
      student=(--student vit_a --student_kwargs img_size=112)
      teacher=${teacher:-vit_tiny_patch16_224.augreg_in21k_ft_in1k}
      ;;
    *) fail "no student is known for the setting $1" ;;
  esac
}

select_weights() { # SETTING NAME [options of weight_selection.py]: into $OUT/init/SETTING/NAME
  local directory=$OUT/init/$1/$2 setting=$1 teacher=${teacher:-} student file tiny=()
  shift 2
  describe "$setting"
  file=$(teacher_file "$teacher")
  if [ -n "${SMOKE:-}" ]; then
    # shellcheck disable=SC2046  # words
    tiny=(--teacher_kwargs $(smoke_sizes teacher "$teacher") --student_kwargs $(smoke_sizes student "$setting"))
    case $setting in vit*) tiny+=(img_size=32) ;; esac
    smoke_made "$file" --teacher "$teacher" --teacher_kwargs $(smoke_sizes teacher "$teacher")
  fi
  make_once "$directory/${setting%%_*}.pth" \
    "$PYTHON" weight_selection.py --output_dir "$directory" --pretrained_model "$teacher" \
    ${file:+--pretrained_path "$file"} "${student[@]}" "$@" ${tiny[@]+"${tiny[@]}"}
}

train_seed() { # SETTING DATA NAME SEED [options of main.py]
  local directory=$OUT/$1/$2/$3/$4 setting=$1 data_path=${data_path:-$DATA} recipe=${recipe:-$2} options kind name file tiny=()
  case $2 in imagenet*) data_path=${IMAGENET:-$DATA/imagenet} ;; esac
  if [ -f "$directory/results.json" ]; then
    echo "done: $directory"
    return
  fi
  case $recipe in *:*) ;; *) recipe=${recipes:-recipes}/$1.yaml:$recipe ;; esac
  options=(--config "$recipe" --data_path "$data_path" --seed "$4" --output_dir "$directory")
  shift 4
  if [ -n "${SMOKE:-}" ]; then
    smoke_made "$OUT/images"
    # shellcheck disable=SC2046  # words
    tiny=(--model_kwargs $(smoke_sizes student "$setting") --input_size 32 --data_set image_folder)
    tiny+=(--data_path "$OUT/images" --epochs 2 --warmup_epochs 1 --total_batch_size 8)
    tiny+=(--num_workers 0 --device cpu --use_amp false)
  fi
  if [ -n "${distill:-}" ]; then
    read -r kind name <<<"$distill"
    file=$(teacher_file "$name")
    options+=(--distillation "$kind" --teacher "$name" ${file:+--teacher_path "$file"})
    # shellcheck disable=SC2046
    if [ -n "${SMOKE:-}" ]; then
      smoke_made "$file" --teacher "$name" --teacher_kwargs $(smoke_sizes teacher "$name")
      tiny+=(--teacher_kwargs $(smoke_sizes teacher "$name"))
    fi
  fi
  run "${launch[@]}" main.py "${options[@]}" "$@" ${main_args[@]+"${main_args[@]}"} ${tiny[@]+"${tiny[@]}"}
}

train() { # SETTING DATA NAME [options of main.py]: one run per seed
  wanted "$1" "$2" "$3" || return 0
  local seed
  for seed in $SEEDS; do
    train_seed "$1" "$2" "$3" "$seed" "${@:4}"
  done
}

selected() { # SETTING DATA NAME [options of weight_selection.py] [-- options of main.py]: select, then train from it
  wanted "$1" "$2" "$3" || return 0
  local setting=$1 data=$2 name=$3 seed selection=()
  shift 3
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    selection+=("$1")
    shift
  done
  shift $(($# > 0))
  select_weights "$setting" "${init:-$name}" ${selection[@]+"${selection[@]}"}
  for seed in $SEEDS; do
    train_seed "$setting" "$data" "$name" "$seed" --initialize "$OUT/init/$setting/${init:-$name}" "$@"
  done
}

drawn() { # like selected, but each of three seeds draws a random selection of its own; the paper has their median
  local seed
  for seed in 0 1 2; do
    SEEDS=$seed init=$3-$seed selected "$1" "$2" "$3" --seed $seed "${@:4}"
  done
}

finish() { # [TABLE ...]: print the tables from the runs that are finished
  [ -z "${LISTING:-}" ] || exit 0
  local table
  for table in "$@"; do
    run "$PYTHON" scripts/collect_results.py "$table" "$OUT" | sed "s|^OUT=\(.*\)/smoke bash|SMOKE=1 OUT=\1 bash|"
  done
}

there() { # PATTERN: do such files exist, or is it a dry run?
  [ -n "${DRY_RUN:-}" ] || compgen -G "$1" >/dev/null
}

# ---------------------------------------------------------------------------------------------------------
# SMOKE=1 makes models and images small by these options, which come last and so win.

smoke_sizes() { # teacher|student MODEL or SETTING: print the arguments of a tiny model
  case $1:$2 in
    *:convnext) echo "depths=(1,1,1,1) dims=(16,32,48,64)" ;;
    teacher:convnext*) echo "depths=(2,2,2,2) dims=(16,32,48,64)" ;;
    student:convnext*) echo "depths=(1,1,1,1) dims=(8,16,24,32)" ;;
    *:resnet18d_half) echo "stem_width=4 channels=(8,16,24,32)" ;;
    *:resnet18d) echo "stem_width=8 channels=(16,32,48,64)" ;;
    *:mixer_half) echo "embed_dim=24 num_blocks=2 patch_size=8" ;;
    *:mixer) echo "embed_dim=48 num_blocks=2 patch_size=8" ;;
    teacher:*) echo "embed_dim=48 num_heads=6 depth=4 patch_size=8" ;;
    student:vit_a*) echo "embed_dim=24 num_heads=3 depth=2 patch_size=8" ;;
    student:*) echo "embed_dim=24 num_heads=3 depth=4 patch_size=8" ;;
  esac
}

smoke_made() { # PATH [options of scripts/smoke.py]: make it once
  make_once "$1" "$PYTHON" scripts/smoke.py "$@"
}
