#!/usr/bin/env bash
# Camera policies from nothing: teachers, their students, and PPO from pixels; then the report.
#
#   bash benchmark/vision.sh                  # about 80 minutes on two cores; continues where it was stopped
#   PARTS=students bash benchmark/vision.sh   # or PARTS=rgb
#
# SEEDS     seeds of students and of PPO from pixels (401 402 403)
# EPISODES  episodes of every evaluation (200)
# RUNS      directory of the runs (logs/benchmark/vision)
# OUT       directory of the report (benchmark/results/vision)
#
# One distillation runs at a time, because it uses two cores by itself.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-401 402 403} EPISODES=${EPISODES:-200} RUNS=${RUNS:-logs/benchmark/vision} PARTS=${PARTS:-students rgb}
OUT=${OUT:-benchmark/results/vision}
export OMP_NUM_THREADS=1
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

if [[ $PARTS == *students* ]]; then
  teacher teacher_standard --total-timesteps 200000
  teacher teacher_precise --base-policy jacobian --tape-margin 0.02 --gamma 0.995 --gae-lambda 0.97 \
    --arrival-yaw-weight 1.5 --total-timesteps 300000 --num-steps 128 --minibatch-size 1024 --train-episode-steps 400 \
    --log-std-init -1
  standard=$RUNS/teacher_standard/best_model/best_model.pt precise=$RUNS/teacher_precise/best_model/best_model.pt
  students standard --model "$standard"
  students standard_visual --model "$standard" --visual-randomization
  students precise --model "$precise"
  python benchmark/vision_report.py --runs "$RUNS/students" --out "$OUT"
fi
if [[ $PARTS == *rgb* ]]; then
  export SCRIPT=so101/ppo_rgb.py JOBS=1 SEEDS EPISODES
  NAME=rgb_200k RUNS=$RUNS/rgb_200k bash benchmark/ppo_residual_so101.sh
  NAME=rgb_visual_200k RUNS=$RUNS/rgb_visual_200k bash benchmark/ppo_residual_so101.sh --visual-randomization
fi
