#!/usr/bin/env bash
# Camera policies from nothing: teachers, their students, and PPO from pixels; then the report.
#
#   bash benchmark/vision.sh                  # about 80 minutes on two cores; continues where it was stopped
#   PARTS="standard_visual" bash benchmark/vision.sh
#
# PARTS     students to distil, and PPO from pixels: standard, standard_visual, precise, rgb, rgb_visual (all of them)
# SEEDS     seeds of students and of PPO from pixels (401 402 403)
# EPISODES  episodes of every evaluation (200)
# RUNS      directory of the runs (logs/benchmark/vision)
# OUT       directory of the report (benchmark/results/vision)
#
# One distillation runs at a time, because it uses two cores by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
PARTS=${PARTS:-standard standard_visual precise rgb rgb_visual}
RUNS=${RUNS:-logs/benchmark/vision} out=${OUT:-benchmark/results/vision}
export SEEDS=${SEEDS:-401 402 403} EPISODES=${EPISODES:-200} OMP_NUM_THREADS=1
mkdir -p "$RUNS"

# teacher NAME FLAGS: train a policy that observes the sheet's pose
teacher() {
  [ ! -e "$RUNS/$1/training_summary.json" ] || return 0
  rm -rf "${RUNS:?}/$1"
  echo "$1"
  python ppo_residual_so101.py --log-dir "$RUNS" --run-name "$1" "${@:2}" > "$RUNS/$1.txt" 2>&1
}

# students NAME FLAGS: distil a student with each seed, and evaluate it and its teacher
students() {
  local dir
  for seed in $SEEDS; do
    dir=$RUNS/students/$1/seed_$seed
    [ ! -e "$dir/student.json" ] || continue
    rm -rf "$dir"
    python -m so101.distill --seed "$seed" --log-dir "$(dirname "$dir")" --run-name "seed_$seed" "${@:2}" 2> /dev/null
    python eval_so101.py --model "$dir/final_model.pt" --episodes "$EPISODES" --json "$dir/student.json"
  done
}

# rgb NAME FLAGS: a sweep of PPO from pixels
rgb() {
  NAME=$1 RUNS=$RUNS/$1 OUT=benchmark/results/$1 SCRIPT=so101/ppo_rgb.py JOBS=1 bash benchmark/ppo_residual_so101.sh "${@:2}"
}

standard=$RUNS/teacher_standard/best_model/best_model.pt precise=$RUNS/teacher_precise/best_model/best_model.pt
for part in $PARTS; do
  case $part in
    standard)
      teacher teacher_standard --total-timesteps 200000
      students standard --model "$standard"
      ;;
    standard_visual)
      teacher teacher_standard --total-timesteps 200000
      students standard_visual --model "$standard" --visual-randomization
      ;;
    precise)
      teacher teacher_precise --base-policy jacobian --tape-margin 0.02 --gamma 0.995 --gae-lambda 0.97 \
        --arrival-yaw-weight 1.5 --total-timesteps 300000 --num-steps 128 --minibatch-size 1024 \
        --train-episode-steps 400 --log-std-init -1
      students precise --model "$precise"
      ;;
    rgb) rgb rgb_200k ;;
    rgb_visual) rgb rgb_visual_200k --visual-randomization ;;
    *) echo "PARTS: no part $part" >&2 && exit 2 ;;
  esac
done
[ ! -d "$RUNS/students" ] || python benchmark/vision_report.py --runs "$RUNS/students" --out "$out"
