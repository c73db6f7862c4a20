#!/usr/bin/env bash
# How few steps SAC needs compared with PPO: success over steps and over CPU time, for every checkpoint of a sweep.
#
#   bash benchmark/steps_and_time.sh              # every row, about three hours on two cores
#   ROWS="standard" SEEDS="1 2 3" bash benchmark/steps_and_time.sh
#
# ROWS   rows to run: standard, standard_ppo, precise, precise_jacobian, act (all of them)
# SEEDS  seeds to train (4001 to 4020; each row has its own number of them at most, see below)
# ACT    camera policy of the row act, which is skipped without it: the directory pretrained_model that
#        benchmark/lerobot_base.sh has trained. LeRobot must be installed in this environment.
# JOBS   number of processes at a time, one thread each (one per core)
# RUNS   directory of everything that is written (logs/benchmark/steps_and_time)
# OUT    directory of the report (benchmark/results/steps_and_time); empty: no report
#
# Finished parts are not repeated, so the same command continues an interrupted sweep.
set -euo pipefail
cd "$(dirname "$0")/.."

JOBS=${JOBS:-$(env -u OMP_NUM_THREADS nproc)} # nproc reports OMP_NUM_THREADS if it is set
ROWS=${ROWS:-standard standard_ppo precise precise_jacobian act} SEEDS=${SEEDS:-$(seq -s " " 4001 4020)}
export RUNS=${RUNS:-logs/benchmark/steps_and_time} ACT=${ACT:-} OMP_NUM_THREADS=1
OUT=${OUT-benchmark/results/steps_and_time}

run_seed() { # ROW SEED COMMAND...: train without evaluations, then evaluate every checkpoint on the held-out episodes
  local row=$1 seed=$2 dir=$RUNS/$1/seed_$2 run model
  shift 2
  if [ ! -e "$dir/done" ]; then
    rm -rf "$dir"
    mkdir -p "$dir"
    if ! {
      "$@" --seed "$seed" --log-dir "$dir" --run-name run --num-threads 1 --eval-every 0 &&
        for model in "$dir"/run/checkpoints/*.pt "$dir/run/final_model.pt"; do
          python eval_so101.py --model "$model" --episodes 200 --no-base --num-threads 1 --json "${model%.pt}.json" \
            ${ACT:+--allow "lerobot:$ACT"} || exit 1
        done && touch "$dir/done"
    } > "$dir/log.txt" 2>&1; then
      echo "$row: seed $seed FAILED, see $dir/log.txt"
      tail -n 1 "$dir/log.txt"
      return 1
    fi
  fi
  echo "$row: seed $seed done"
}
export -f run_seed

row() { # NAME COUNT COMMAND...: the first COUNT of the seeds
  local name=$1 count=$2
  shift 2
  case " $ROWS " in *" $name "*) ;; *) return 0 ;; esac
  tr -s ' ' '\n' <<< "$SEEDS" | head -n "$count" | xargs -P "$JOBS" -I{} bash -c 'run_seed "$@"' _ "$name" {} "$@"
}

PRECISE="--tape-margin 0.02 --train-episode-steps 150 --gamma 0.99 --arrival-yaw-weight 0.5 --total-timesteps 50000"
row standard 10 python -m so101.sac --total-timesteps 20000
row standard 20 python -m so101.sac --total-timesteps 10000 # the others
row standard_ppo 20 python ppo_residual_so101.py --total-timesteps 50000
row precise 5 python -m so101.sac $PRECISE
row precise_jacobian 10 python -m so101.sac $PRECISE --base-policy jacobian --observe-base
[ -z "$ACT" ] || row act 10 python -m so101.sac --base-policy "lerobot:$ACT" --units deg --chunk-steps 16 --observe-base \
  --train-episode-steps 300 --total-timesteps 20000
[ -z "$OUT" ] || python benchmark/steps_and_time.py --runs "$RUNS" --out "$OUT"
