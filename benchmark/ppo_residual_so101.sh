#!/usr/bin/env bash
# Train a sweep of seeds, evaluate each of them on the held-out episodes, and write the report.
#
#   bash benchmark/ppo_residual_so101.sh                                                # seeds 401 to 420, the defaults
#   NAME=standard_200k bash benchmark/ppo_residual_so101.sh --total-timesteps 200000    # other flags of the trainer
#   NAME=trial SEEDS="1 2 3" bash benchmark/ppo_residual_so101.sh --gamma 0.99
#   SCRIPT=my_ppo.py NAME=mine bash benchmark/ppo_residual_so101.sh                      # a changed copy of the trainer
#   SCRIPT=so101/ppo_rgb.py NAME=rgb bash benchmark/ppo_residual_so101.sh                # another trainer
#
# SCRIPT    trainer: a script at the root, or one in so101/ (ppo_residual_so101.py)
# NAME      name of the sweep (standard_50k)
# SEEDS     seeds to train (401 to 420)
# JOBS      number of processes at a time, one thread each (one per core)
# EPISODES  episodes of every evaluation (200)
# RUNS      directory of the runs (logs/benchmark/NAME)
# OUT       directory of the report (benchmark/results/NAME); empty: no report
#
# Finished seeds are not run again, so the same command continues an interrupted sweep.
set -euo pipefail
cd "$(dirname "$0")/.."

JOBS=${JOBS:-$(env -u OMP_NUM_THREADS nproc)} # nproc reports OMP_NUM_THREADS if it is set
export SCRIPT=${SCRIPT:-ppo_residual_so101.py}
export NAME=${NAME:-standard_50k} SEEDS=${SEEDS:-$(seq -s " " 401 420)} EPISODES=${EPISODES:-200} OMP_NUM_THREADS=1
# the base policy alone is also evaluated, with the first seed, unless it is zero
case " $* " in *" --base-policy "*) BASE=--base ;; *) BASE=--no-base ;; esac
export BASE RUNS=${RUNS:-logs/benchmark/$NAME} OUT=${OUT-benchmark/results/$NAME}
mkdir -p "$RUNS"

run_seed() {
  local seed=$1 dir=$RUNS/seed_$1 run command=(python "$SCRIPT") word before="" base=--no-base
  local allow=(--allow "$(basename "$SCRIPT")") # the evaluation may use the script and the base policy of this command
  shift
  [ "$seed" != "${SEEDS%% *}" ] || base=$BASE
  for word in "$@"; do
    [ "$before" != --base-policy ] || allow+=("$word")
    before=$word
  done
  [[ $SCRIPT != so101/* ]] || command=(python -m "so101.$(basename "$SCRIPT" .py)")
  if [ ! -e "$dir/best_model.json" ]; then # the last file to be written
    rm -rf "$dir"
    mkdir -p "$dir"
    if ! {
      "${command[@]}" --seed "$seed" --log-dir "$dir" --num-threads 1 "$@" &&
        run=$(dirname "$dir"/*/final_model.pt) &&
        python eval_so101.py --model "$run/final_model.pt" --episodes "$EPISODES" "$base" --num-threads 1 \
          --json "$dir/final_model.json" "${allow[@]}" &&
        python eval_so101.py --model "$run/best_model/best_model.pt" --episodes "$EPISODES" --no-base --num-threads 1 \
          --json "$dir/best_model.json" "${allow[@]}"
    } > "$dir/log.txt" 2>&1; then
      echo "$NAME: seed $seed FAILED, see $dir/log.txt"
      tail -n 1 "$dir/log.txt"
      return 1
    fi
  fi
  printf '%s: seed %s done, %s of %s; success %s\n' "$NAME" "$seed" "$(find "$RUNS" -mindepth 2 -maxdepth 2 -name best_model.json | wc -l)" \
    "$(wc -w <<< "$SEEDS")" "$(python -c "import json; print(json.load(open('$dir/final_model.json'))['success_rate'])")"
}
export -f run_seed

if ! tr -s ' ' '\n' <<< "$SEEDS" | xargs -P "$JOBS" -I{} bash -c 'run_seed "$@"' _ {} "$@"; then
  for seed in $SEEDS; do
    [ -e "$RUNS/seed_$seed/best_model.json" ] || failed="${failed:-} $seed"
  done
  echo "$NAME: failed seeds:${failed:-}; the same command runs them again" >&2
  exit 1
fi
if [ -n "$OUT" ]; then
  python benchmark/report.py --runs "$RUNS" --out "$OUT" --name "$NAME" --allow "$(basename "$SCRIPT")"
fi
