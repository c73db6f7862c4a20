#!/usr/bin/env bash
# A residual on a camera policy of LeRobot, end to end: record demonstrations, train a small ACT on their videos with
# lerobot-train, and train residuals on it.
#
#   bash benchmark/lerobot_base.sh                  # about two hours on two cores, no GPU; continues where it was stopped
#   ROWS=lerobot_act_50k bash benchmark/lerobot_base.sh
#
# ROWS   rows to train on the ACT: lerobot_act_50k, lerobot_act_200k (both)
# SEEDS  seeds of the residuals (401 to 410)
# RUNS   directory of everything that is written (logs/benchmark/lerobot)
#
# Needs Python 3.12 with LeRobot 0.6.1 in this environment, and FFmpeg's libraries: see docs/lerobot.md.
set -euo pipefail
cd "$(dirname "$0")/.."
RUNS=${RUNS:-logs/benchmark/lerobot} ROWS=${ROWS:-lerobot_act_50k lerobot_act_200k}
export SEEDS=${SEEDS:-$(seq -s " " 401 410)} HF_HUB_OFFLINE=1
if ! python -c "import lerobot, torchcodec" 2> /dev/null; then
  echo "LeRobot 0.6.1 or FFmpeg's libraries are missing in this environment: see docs/lerobot.md" >&2
  exit 2
fi
mkdir -p "$RUNS"

if [ ! -d "$RUNS/demos" ]; then # with both cameras, without the sheet's pose
  python -m so101.record --dataset "$RUNS/demos" --cameras top wrist --image-size 96 --episodes 200 --only-successes \
    --base-policy jacobian --action-noise 0.25
fi
if [ ! -d "$RUNS/act/checkpoints/last" ]; then # from scratch, 2,000 steps
  rm -rf "$RUNS/act"
  OMP_NUM_THREADS=2 lerobot-train --dataset.repo_id=local/demos --dataset.root="$RUNS/demos" --output_dir="$RUNS/act" \
    --steps=2000 --save_freq=2000 --log_freq=200 --env_eval_freq=0 --batch_size=8 --num_workers=0 --seed=1 \
    --wandb.enable=false --policy.push_to_hub=false --policy.device=cpu --policy.type=act \
    --policy.pretrained_backbone_weights=null --policy.optimizer_lr=1e-4 --policy.optimizer_lr_backbone=1e-4 \
    --policy.chunk_size=16 --policy.n_action_steps=16 --policy.use_vae=false --policy.n_encoder_layers=2 \
    --policy.dim_model=128 --policy.n_heads=4 --policy.dim_feedforward=512 > "$RUNS/act.log" 2>&1 ||
    { tail -n 3 "$RUNS/act.log" >&2 && exit 1; }
fi

# the base policy alone and residuals on it; these flags were chosen on seeds 1 and 201 to 203, with version 0.5.0
residual=(--base-policy "lerobot:$RUNS/act/checkpoints/last/pretrained_model" --units deg --chunk-steps 16)
residual+=(--observe-base --act-scale 0.04 --log-std-init -1 --residual-penalty 0.01)
for row in $ROWS; do
  case $row in
    lerobot_act_50k) flags=(--eval-every 25000) ;;
    lerobot_act_200k) flags=(--total-timesteps 200000 --eval-every 100000) ;;
    *) echo "ROWS: no row $row" >&2 && exit 2 ;;
  esac
  NAME=$row RUNS=$RUNS/$row bash benchmark/ppo_residual_so101.sh "${residual[@]}" "${flags[@]}"
done
