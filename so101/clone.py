"""Clone demonstrations: a multilayer perceptron that predicts the joint targets of a recorded policy or person.

    python -m so101.record --base-policy jacobian --dataset demos --episodes 200 --action-noise 0.25 --only-successes
    python -m so101.clone --dataset demos
    python ppo_residual_so101.py --base-policy bc:logs/CLONE_RUN/final_model.pt \\
      --log-std-init -1.5 --residual-penalty 0.05 --num-steps 256

The clone's input is the observation of the task. Its output is a chunk: the absolute joint targets of the next steps,
as LeRobot datasets store them. The chunk is carried out before the clone looks again.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from so101.base import BasePolicy, flat_observation, follow_chunks, new_chunks
from so101.checkpoints import CLONE, hash_weights, load_weights, save_tensors
from so101.cli import check_flags, command_of, parse, run_script
from so101.dataset import joints_rad, read_dataset, read_info
from so101.files import write_json
from so101.networks import Features
from so101.run_dirs import describe_run, new_run_dir, open_curves, writing
from so101.settings import restore_args
from so101.trust import allow_flags
from so101_env import ACT_DIM, ACTION, ENVIRONMENT, STATE, BaseObservation, SO101Error

SCRIPT = Path(__file__).name


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class Args:
    dataset: str
    """directory of a LeRobotDataset with observation.state, observation.environment_state and action"""
    units: str | None = None
    """unit of the joints, deg, deg-old, norm or rad, for a dataset that does not contain it"""
    seed: int = 1
    """seed of weights and minibatches, and of the choice of validation episodes"""
    train_steps: int = 10_000
    """gradient steps"""
    batch_size: int = 256
    """frames per gradient step"""
    learning_rate: float = 1e-3
    """initial step size of AdamW; it falls to zero along half a cosine"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    hidden_size: int = 128
    """units in each of the two hidden layers"""
    chunk_size: int = 4
    """control steps that are predicted at once and carried out before the clone looks again"""
    validation_share: float = 0.1
    """share of the episodes that are only used to measure the validation loss"""
    log_dir: str = "logs"
    """directory that gets one directory per run"""


RANGES = {
    "seed": (0, 2**32 - 1), "train_steps": (1, 10**8), "batch_size": (1, 2**20), "learning_rate": (1e-9, 10),
    "weight_decay": (0, 10), "hidden_size": (1, 4096), "chunk_size": (1, 1000), "validation_share": (1e-6, 0.999),
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range."""
    check_flags(args, RANGES)


# ---------------------------------------------------------------------------------------------------------------------
# the clone


class Clone(nn.Module):
    """Absolute joint targets (N, chunk, 6) in rad of the next steps, for observations (N, 25).

    A multilayer perceptron with the trainer's features and mirror symmetry. It predicts the motion: targets minus
    measured joint positions.
    """

    def __init__(self, hidden_size: int, chunk_size: int):
        super().__init__()
        self.features, self.chunk_size = Features(), chunk_size
        self.actor = nn.Sequential(
            nn.Linear(self.features.dim, hidden_size), nn.ReLU(), nn.Linear(hidden_size, hidden_size),
            nn.LayerNorm(hidden_size), nn.ReLU(), nn.Linear(hidden_size, chunk_size * ACT_DIM),
        )  # fmt: skip
        for layer, gain in ((0, np.sqrt(2)), (2, np.sqrt(2)), (5, 0.01)):
            nn.init.orthogonal_(self.actor[layer].weight, gain)
            nn.init.zeros_(self.actor[layer].bias)
        self.motion_scale_rad = nn.Parameter(torch.ones(ACT_DIM), requires_grad=False)  # measured, not learned

    def get_motion(self, x: torch.Tensor) -> torch.Tensor:
        """Motions (B, chunk, 6) in units of motion_scale_rad, for features (B, views, F)."""
        out = self.actor(x.flatten(0, 1)).view(len(x), -1, self.chunk_size, ACT_DIM)
        return (out * self.features.action_signs[:, None]).mean(1)

    def forward(self, obs: np.ndarray) -> torch.Tensor:
        """Absolute joint targets (N, chunk, 6), rad, for observations (N, 25)."""
        motion = self.get_motion(self.features(obs)) * self.motion_scale_rad
        return torch.from_numpy(obs[:, None, :ACT_DIM]) + motion


class ClonePolicy(BasePolicy):
    """A clone as base policy, `bc:PATH`: it plans absolute joint targets for a chunk of steps at a time.

    Args:
        saved: the content of the file, read by so101.checkpoints.load_file.
        path: the file, for messages.

    Raises:
        SO101Error: the file does not fit this script.
    """

    def __init__(self, saved: dict[str, Any], path: str):
        args = restore_args(Args, check_args, saved["args"], path)
        self.clone = Clone(args.hidden_size, args.chunk_size)
        load_weights(self.clone, saved["agent"], path)
        if not (self.clone.motion_scale_rad > 0).all():
            raise SO101Error(f"{path}: motion_scale_rad must be positive; take another clone")
        self.fingerprint, self.memory = hash_weights(saved["agent"]), {}

    def reset(self, mask: np.ndarray) -> None:
        """Discard the plans of the environments in mask, (N,) bool."""
        n, chunk = len(mask), self.clone.chunk_size
        if not self.memory or len(self.memory["step"]) != n:
            self.memory = new_chunks(n, chunk)
        self.memory["step"][mask] = 0

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): from the last commanded targets to the planned ones."""
        look = mask & (self.memory["step"] == 0)
        if look.any():
            with torch.inference_mode():
                self.memory["targets"][look] = self.clone(flat_observation(obs)[look]).numpy()
        return follow_chunks(self.memory, obs, mask)


# ---------------------------------------------------------------------------------------------------------------------
# training


def load_demos(args: Args) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Observations (T, 25) and motions (T, chunk, 6), rad, of every episode.

    A motion is the targets of a chunk minus the joint positions measured at its start. Chunks that reach beyond the end
    of an episode repeat its last target.
    """
    keys = (STATE, ENVIRONMENT, ACTION)
    info = read_info(Path(args.dataset), keys)
    episodes = read_dataset(Path(args.dataset), info, keys)
    if len(episodes) < 2:
        raise SO101Error(f"--dataset {args.dataset}: has one episode, but training and validation need one each")
    demos = []
    for number, episode in episodes.items():
        state, action = joints_rad(info, episode, args.units, f"{args.dataset}: episode {number}")
        obs = np.concatenate([state, episode[ENVIRONMENT]], axis=1)
        steps = np.arange(len(action))[:, None] + np.arange(args.chunk_size)
        motion = action[np.minimum(steps, len(action) - 1)] - state[:, None]
        demos.append((torch.tensor(obs, dtype=torch.float32), torch.tensor(motion, dtype=torch.float32)))
    return demos


def main() -> int:
    """Train; returns the exit code."""
    args = parse(Args, __doc__)
    check_args(args)
    demos = load_demos(args)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    order = torch.randperm(len(demos), generator=generator).tolist()
    num_validation = min(len(demos) - 1, max(1, round(args.validation_share * len(demos))))
    parts = [[demos[i] for i in order[num_validation:]], [demos[i] for i in order[:num_validation]]]
    (obs, motion), (valid_obs, valid_motion) = [[torch.cat(tensors) for tensors in zip(*part)] for part in parts]

    clone = Clone(args.hidden_size, args.chunk_size)
    # a lower bound on the scale: noise of a joint that hardly moves must not be amplified
    clone.motion_scale_rad.copy_(motion.square().mean((0, 1)).sqrt().clamp(min=1e-3))
    x, valid_x = clone.features(obs.numpy()), clone.features(valid_obs.numpy())
    target, valid_target = motion / clone.motion_scale_rad, valid_motion / clone.motion_scale_rad
    optimizer = torch.optim.AdamW(clone.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.train_steps)

    name = f"{Path(SCRIPT).stem}_{time.strftime('%Y%m%d-%H%M%S')}_s{args.seed}"
    run_dir = new_run_dir(Path(args.log_dir), name, "tensorboard")
    write_json(run_dir / "config.json", describe_run(SCRIPT, args))
    writer, start = open_curves(run_dir), time.perf_counter()
    valid_loss = 0.0
    for step in (bar := tqdm(range(1, args.train_steps + 1), unit="step", dynamic_ncols=True, disable=None)):
        rows = torch.randint(len(obs), (args.batch_size,), generator=generator)
        loss = (clone.get_motion(x[rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == args.train_steps:
            with torch.no_grad():
                valid_loss = (clone.get_motion(valid_x) - valid_target).square().mean().item()
            with writing(run_dir):
                writer.add_scalar("train/loss", loss.item(), step)
                writer.add_scalar("validation/loss", valid_loss, step)
            bar.set_postfix(loss=f"{loss.item():.4f}", validation=f"{valid_loss:.4f}")
        if not math.isfinite(total := loss.item() + valid_loss):  # the second sees what the last step has done
            raise SO101Error(f"--learning-rate {args.learning_rate}: the loss is {total} at step {step}; lower it")

    model, wall_time = run_dir / "final_model.pt", time.perf_counter() - start
    settings = dataclasses.asdict(args)
    save_tensors(model, {"format": CLONE, "script": SCRIPT, "args": settings, "agent": clone.state_dict()})
    summary = {
        "episodes": len(parts[0]), "frames": len(obs), "validation_episodes": len(parts[1]),
        "train_loss": loss.item(), "validation_loss": valid_loss, "wall_time_s": wall_time,
    }  # fmt: skip
    write_json(run_dir / "training_summary.json", summary)
    with writing(run_dir):
        writer.close()
    print(
        f"{len(parts[0])} episodes, {len(obs)} frames, {wall_time:.1f} s; validation loss {valid_loss:.4f} (variance 1)"
    )
    allow, base = allow_flags([SCRIPT]), shlex.quote(f"bc:{model}")
    print(f"evaluate:  {command_of('eval_so101.py')} --base-policy {base} --episodes 100{allow}")
    flags = "--log-std-init -1.5 --residual-penalty 0.05 --num-steps 256"
    print(f"reinforce: {command_of('ppo_residual_so101.py')} --base-policy {base} {flags}{allow}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
