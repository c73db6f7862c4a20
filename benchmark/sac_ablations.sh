#!/usr/bin/env bash
# What decides how much SAC learns in few steps: one change at a time, success after 5,000 steps.
#
#   bash benchmark/sac_ablations.sh              # every row, ten seeds each: about 90 minutes on two cores
#   ROWS="default n_step_1" SEEDS="5101 5102" bash benchmark/sac_ablations.sh
#
# ROWS   rows to run (all of them)
# SEEDS  seeds to train (5101 to 5110, on which no setting was chosen before)
# STEPS, EPISODES  of every training (5000) and evaluation (200)
# JOBS   number of processes at a time, one thread each (one per core)
# RUNS   directory of everything that is written (logs/benchmark/sac_ablations)
# OUT    directory of the report (benchmark/results/sac_ablations); empty: no report
#
# The episodes are 200 that are not the held-out ones. Finished seeds are not run again.
set -euo pipefail
cd "$(dirname "$0")/.."

JOBS=${JOBS:-$(env -u OMP_NUM_THREADS nproc)} # nproc reports OMP_NUM_THREADS if it is set
SEEDS=${SEEDS:-$(seq -s " " 5101 5110)}
export RUNS=${RUNS:-logs/benchmark/sac_ablations} STEPS=${STEPS:-5000} EPISODES=${EPISODES:-200} OMP_NUM_THREADS=1
OUT=${OUT-benchmark/results/sac_ablations}

# row | command | flags
pusher="--tape-margin 0.02 --base-policy jacobian --observe-base"
all="default|-m so101.sac|
pusher|-m so101.sac|$pusher
pusher_arrival_yaw|-m so101.sac|$pusher --arrival-yaw-weight 0.5
pusher_episodes_300|-m so101.sac|$pusher --train-episode-steps 300
pusher_half|-m so101.sac|$pusher --alpha 0.35
pusher_no_demonstrations|-m so101.sac|$pusher --base-batch 0
updates_4|-m so101.sac|--updates-per-step 4
n_step_1|-m so101.sac|--n-step 1
n_step_10|-m so101.sac|--n-step 10
critics_4|-m so101.sac|--num-critics 4
no_layer_norm|-m so101.sac|--no-layer-norm
no_symmetry|-m so101.sac|--no-symmetry
no_load|-m so101.sac|--no-observe-load
sparse|benchmark/sparse_sac.py|--no-shaping
pusher_updates_4|-m so101.sac|$pusher --updates-per-step 4"

run_seed() { # ROW SEED COMMAND FLAGS
  local row=$1 seed=$2 dir=$RUNS/$1/seed_$2 command flags
  read -ra command <<< "$3"
  read -ra flags <<< "$4"
  if [ ! -e "$dir/final_model.json" ]; then
    rm -rf "$dir"
    mkdir -p "$dir"
    if ! {
      python "${command[@]}" --total-timesteps "$STEPS" --seed "$seed" --log-dir "$dir" --run-name run --num-threads 1 \
        --eval-every 0 "${flags[@]}" &&
        python eval_so101.py --model "$dir/run/final_model.pt" --episodes "$EPISODES" --seed 7 --no-base --num-threads 1 \
          --json "$dir/final_model.json"
    } > "$dir/log.txt" 2>&1; then
      echo "$row: seed $seed FAILED, see $dir/log.txt"
      return 1
    fi
  fi
  echo "$row: seed $seed done"
}
export -f run_seed

while IFS="|" read -r row command flags; do
  case " ${ROWS:-$row} " in *" $row "*) ;; *) continue ;; esac
  for seed in $SEEDS; do printf '%s\0%s\0%s\0%s\0' "$row" "$seed" "$command" "$flags"; done
done <<< "$all" | xargs -0 -n 4 -P "$JOBS" bash -c 'run_seed "$@"' _
[ -z "$OUT" ] || python benchmark/sac_ablations.py --runs "$RUNS" --out "$OUT"
