#!/usr/bin/env bash
# What practice on an arm mends: the simulated arm with one thing wrong, before and after 20 minutes of arm time.
#
#   bash benchmark/practice.sh                 # five seeds of each row, in virtual time: about five hours on two cores
#   SEEDS="1" ROWS="gain backlash" bash benchmark/practice.sh
#
# MODEL     policy to start from, a checkpoint (default: one that has seen no such arms in training,
#           unlike the included one; it is trained first)
# SEEDS     seeds of the practice (1 to 5)
# ROWS      rows to run: nothing, lift, gain, backlash, finger, table (all of them)
# MINUTES   arm time of the practice (20)
# EPISODES  episodes of every evaluation (40), whose seeds are not those of the practice
# JOBS      number of runs at a time, each with a learner's process (one per core)
# RUNS      directory of everything that is written (logs/benchmark/practice)
# OUT       directory of the report (benchmark/results/practice); empty: no report
#
# Finished parts are not repeated, so the same command continues an interrupted benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."

JOBS=${JOBS:-$(env -u OMP_NUM_THREADS nproc)} # nproc reports OMP_NUM_THREADS if it is set
ROWS=${ROWS:-nothing lift gain backlash finger table} SEEDS=${SEEDS:-1 2 3 4 5} OUT=${OUT-benchmark/results/practice}
export MODEL=${MODEL:-${RUNS:-logs/benchmark/practice}/naive/run/final_model.pt}
export MINUTES=${MINUTES:-20} EPISODES=${EPISODES:-40} RUNS=${RUNS:-logs/benchmark/practice} OMP_NUM_THREADS=1

# row | its name in benchmark/reality_gap.py | flags of so101.practice that make the same arm
all="nothing|nothing|
lift|shoulder_lift -3 degrees|--joint-offset-deg 0 -3 0 0 0 0
gain|servo gain x0.7|--gain 0.7
backlash|backlash 3 degrees|--backlash-deg 3
finger|finger friction 0.3|--finger-friction 0.3
table|finger friction 0.4, table 0.4|--finger-friction 0.4 --table-friction 0.4"

run() { # ROW NAME SEED FLAGS...: the included policy before, or after practice with a seed
  local row=$1 name=$2 seed=$3 dir=$RUNS/$1
  shift 3
  mkdir -p "$dir"
  if [ "$seed" = before ]; then
    [ -e "$dir/before.json" ] || python benchmark/reality_gap.py --model "$MODEL" --rows "$name" \
      --episodes "$EPISODES" --json "$dir/before.json" > "$dir/before.txt" 2>&1 || { echo "$row: FAILED, see $dir/before.txt" && return 1; }
  elif [ ! -e "$dir/seed_$seed.json" ]; then
    rm -rf "$dir/seed_$seed"
    if ! {
      python -m so101.practice --virtual-time --base-policy "checkpoint:$MODEL" "$@" --seed "$seed" --minutes "$MINUTES" --log-dir "$dir" \
        --run-name "seed_$seed" &&
        python benchmark/reality_gap.py --model "$dir/seed_$seed/practice_model.pt" --rows "$name" \
          --episodes "$EPISODES" --json "$dir/seed_$seed.json"
    } > "$dir/seed_$seed.txt" 2>&1; then
      echo "$row: seed $seed FAILED, see $dir/seed_$seed.txt"
      return 1
    fi
  fi
  echo "$row: $seed done"
}
export -f run

if [ ! -e "$MODEL" ]; then # three minutes
  rm -rf "$RUNS/naive"
  python ppo_residual_so101.py --full-randomization --firmware-p 16 --total-timesteps 300000 --eval-every 0 --seed 1 \
    --log-dir "$RUNS/naive" --run-name run
fi
for seed in $SEEDS before; do
  while IFS="|" read -r row name flags; do
    case " $ROWS " in *" $row "*) printf '%s\0%s\0%s\0%s\0' "$row" "$name" "$seed" "$flags" ;; esac
  done <<< "$all"
done | xargs -0 -n 4 -P "$JOBS" bash -c 'read -ra flags <<< "$4"; run "$1" "$2" "$3" "${flags[@]}"' _
[ -z "$OUT" ] || python benchmark/practice_report.py --runs "$RUNS" --out "$OUT"
