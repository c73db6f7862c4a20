#!/usr/bin/env bash
# A residual on a camera policy of LeRobot, end to end: record demonstrations, train a small ACT on their videos with
# lerobot-train, serve it, train residuals on it, and train another ACT on demonstrations of one of them.
#
#   bash benchmark/lerobot_base.sh        # about 70 minutes on two cores, no GPU
#
# LEROBOT  LeRobot's environment (this one if it has LeRobot; otherwise .venv-lerobot, created if it does not exist)
# RUNS     directory of everything that is written (logs/benchmark/lerobot); finished parts are not repeated
# PORT     port of the policy server (5555)
#
# Works with LeRobot 0.6.1 and 0.4.4; the published figures are those of 0.4.4. With Python 3.12, install as in
# docs/cameras_and_servers.md: everything runs in one environment. With Python 3.11, install ".[data,server]" here:
# LeRobot gets its own environment. Also needs FFmpeg's libraries, with which LeRobot reads videos (Debian: apt-get
# install ffmpeg).
set -euo pipefail
cd "$(dirname "$0")/.."
if python3 -c "import lerobot" 2> /dev/null; then
  LEROBOT=${LEROBOT:-$(python3 -c "import sys; print(sys.prefix)")}
fi
LEROBOT=${LEROBOT:-.venv-lerobot} RUNS=${RUNS:-logs/benchmark/lerobot} PORT=${PORT:-5555}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
mkdir -p "$RUNS"

# -- LeRobot's environment

if [ ! -x "$LEROBOT/bin/lerobot-train" ]; then
  python3 -m venv "$LEROBOT"
  "$LEROBOT/bin/pip" install -q -r requirements-lerobot.txt
  if ! "$LEROBOT/bin/python" -c "import lerobot" 2> /dev/null; then # Python 3.11
    "$LEROBOT/bin/pip" install -q --no-deps lerobot==0.4.4 torchcodec==0.13.0
  fi
fi
version=$("$LEROBOT/bin/python" -c "import importlib.metadata; print(importlib.metadata.version('lerobot'))")
case $version in
  0.4.*) no_evaluation=--eval_freq=0 ;;
  *) no_evaluation=--env_eval_freq=0 ;;
esac
if ! "$LEROBOT/bin/python" -c "import torchvision" 2> /dev/null; then
  # PyTorch for the CPU cannot load the operators of a torchvision for CUDA, and ACT uses none of them
  site=$("$LEROBOT/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
  echo "import sys, types; sys.modules['torchvision._meta_registrations'] = types.ModuleType('none')" \
    > "$site/torchvision_cpu.pth"
fi
if ! "$LEROBOT/bin/python" -c "import torchcodec" 2> /dev/null; then
  echo "LeRobot cannot read videos: FFmpeg's libraries are missing (Debian: apt-get install ffmpeg)" >&2
  exit 1
fi

# -- steps that are used more than once

# record DIRECTORY FLAGS: record demonstrations with both cameras, without the sheet's pose
record() {
  [ -d "$1" ] || python -m so101.record --dataset "$1" --cameras top wrist --image-size 96 --episodes 200 \
    --only-successes "${@:2}"
}

# train_act DATASET DIRECTORY: train a small ACT from scratch, 2,000 steps
train_act() {
  [ ! -d "$2/checkpoints/last" ] || return 0
  rm -rf "$2"
  OMP_NUM_THREADS=2 "$LEROBOT/bin/lerobot-train" --dataset.repo_id=local/demos --dataset.root="$1" --output_dir="$2" \
    --steps=2000 --save_freq=2000 --log_freq=200 "$no_evaluation" --batch_size=8 --num_workers=0 --seed=1 \
    --wandb.enable=false --policy.push_to_hub=false --policy.device=cpu --policy.type=act \
    --policy.pretrained_backbone_weights=null --policy.optimizer_lr=1e-4 --policy.optimizer_lr_backbone=1e-4 \
    --policy.chunk_size=16 --policy.n_action_steps=16 --policy.use_vae=false --policy.n_encoder_layers=2 \
    --policy.dim_model=128 --policy.n_heads=4 --policy.dim_feedforward=512 > "$2.log" 2>&1 ||
    { tail -n 3 "$2.log" >&2 && return 1; }
}

# evaluate FILE: evaluate the served policy alone
evaluate() {
  [ -e "$1" ] || python eval_so101.py "${base[@]}" --chunk-steps 16 --episodes 100 --json "$1"
}

# serve DIRECTORY: serve the ACT of a directory until this script ends or serves another one
serve() {
  [ -z "${server:-}" ] || { kill "$server"; wait "$server" || true; }
  : > "$RUNS/server.log"
  "$LEROBOT/bin/python" -m so101.serve --model "$1/checkpoints/last/pretrained_model" --port "$PORT" --num-threads 1 \
    > "$RUNS/server.log" 2>&1 &
  server=$!
  for _ in $(seq 120); do
    ! grep -q "steps a chunk" "$RUNS/server.log" || return 0
    kill -0 "$server" 2> /dev/null || break
    sleep 1
  done
  cat "$RUNS/server.log" >&2
  return 1
}
trap '[ -z "${server:-}" ] || kill "$server"' EXIT

# -- the base policy, residuals on it, and an ACT trained on demonstrations of a residual

record "$RUNS/demos" --base-policy jacobian --action-noise 0.25
train_act "$RUNS/demos" "$RUNS/act"
serve "$RUNS/act"
base=(--base-policy "server:127.0.0.1:$PORT" --units deg)
evaluate "$RUNS/act_alone.json"

# these flags were chosen on seed 1
residual=("${base[@]}" --chunk-steps 16 --observe-base --act-scale 0.04 --log-std-init -1 --residual-penalty 0.01)
NAME=lerobot_act_50k SEEDS="2 3 4 5 6" RUNS="$RUNS/50k" bash benchmark/ppo_residual_so101.sh "${residual[@]}"
NAME=lerobot_act_200k SEEDS="2 3" RUNS="$RUNS/200k" bash benchmark/ppo_residual_so101.sh "${residual[@]}" \
  --total-timesteps 200000 --eval-every 50000

record "$RUNS/corrected_demos" --model "$(echo "$RUNS"/200k/seed_2/*/final_model.pt)" --allow "${base[1]}"
train_act "$RUNS/corrected_demos" "$RUNS/corrected_act"
serve "$RUNS/corrected_act"
evaluate "$RUNS/corrected_act_alone.json"
