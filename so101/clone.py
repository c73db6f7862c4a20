"""Clone demonstrations: a multilayer perceptron that predicts the joint targets of a recorded policy or person.

    python eval_so101.py --base-policy jacobian --record demos --episodes 200 --action-noise 0.25 --only-successes
    python bc_so101.py --demos demos
    python ppo_residual_so101.py --base-policy bc:logs/bc_so101_.../bc_model.pt

The clone sees the observation of the task and gives the absolute joint targets, as LeRobot datasets store them, of the
next steps at once: a chunk, which is carried out before it looks again.
"""

if __name__ == "__main__":  # Ctrl+C while importing ends the program, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

from so101_control import to_rad
from so101_dataset import read_dataset, read_info, unit_of
from so101_env import ACT_DIM, ACTION, ENVIRONMENT, STATE, BaseObservation, SO101Error, flat_observation
from so101_policies import (
    CLONE,
    BasePolicy,
    Features,
    follow_chunks,
    hash_weights,
    load_weights,
    new_chunks,
    restore_settings,
)
from so101_runs import check_flags, command_of, describe_run, make_run_dir, run_script, save_tensors, write_json

SCRIPT = Path(__file__).name


@dataclasses.dataclass
class Args:
    demos: str
    """LeRobotDataset v3.0 with observation.state, observation.environment_state and action"""
    units: str | None = None
    """unit of the joints, rad, deg or norm, where the dataset does not say"""
    seed: int = 1
    """seed of weights, minibatches, and of the choice of the validation episodes"""
    train_steps: int = 10_000
    """gradient steps"""
    batch_size: int = 256
    """frames per gradient step"""
    learning_rate: float = 1e-3
    """step size of AdamW at the start; it falls to zero along half a cosine"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    hidden_size: int = 128
    """units in each of the two hidden layers"""
    chunk_size: int = 4
    """control steps that are predicted at once and carried out before the next look; 1 looks at every step"""
    validation_share: float = 0.1
    """share of the episodes that are only used to measure the loss"""
    log_dir: str = "logs"
    """directory that gets one directory per run"""


RANGES = {
    "seed": (0, 2**32 - 1), "train_steps": (1, 10**8), "batch_size": (1, 2**20), "learning_rate": (1e-9, 10),
    "weight_decay": (0, 10), "hidden_size": (1, 4096), "chunk_size": (1, 1000), "validation_share": (1e-6, 0.999),
}  # fmt: skip


class Clone(nn.Module):
    """Absolute joint targets (N, chunk, 6) in rad of the next steps, for observations (N, 25).

    A multilayer perceptron on the trainer's features and mirror symmetry, which predicts how far the targets are from
    the measured joint positions.
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
        self.register_buffer("motion_scale_rad", torch.ones(ACT_DIM))

    def get_motion(self, x: torch.Tensor) -> torch.Tensor:
        """Motions (B, chunk, 6) in units of motion_scale_rad, of features (B, views, F)."""
        out = self.actor(x.flatten(0, 1)).view(len(x), -1, self.chunk_size, ACT_DIM)
        return (out * self.features.action_signs[:, None]).mean(1)

    def forward(self, obs: np.ndarray) -> torch.Tensor:
        """Absolute joint targets (N, chunk, 6), rad, for observations (N, 25)."""
        motion = self.get_motion(self.features(obs)) * self.motion_scale_rad
        return torch.from_numpy(obs[:, None, :ACT_DIM]) + motion


class ClonePolicy(BasePolicy):
    """A clone as base policy: it asks for absolute joint targets, a chunk of steps at a time.

    saved is what so101_policies.load_file read from path; `bc:PATH` makes one. Raises SO101Error if it does not fit.
    """

    def __init__(self, saved: dict[str, Any], path: str):
        args = restore_settings(Args, saved["args"], path)
        check_args(args)
        self.clone = Clone(args.hidden_size, args.chunk_size)
        load_weights(self.clone, saved["clone"], path)
        self.fingerprint, self.memory = hash_weights(saved["clone"]), {}

    def reset(self, mask: np.ndarray) -> None:
        """Look again before the next step."""
        n, chunk = len(mask), self.clone.chunk_size
        if not self.memory or len(self.memory["step"]) != n:
            self.memory = new_chunks(n, chunk)
        self.memory["step"][mask] = 0

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): from the last commanded targets to the clone's."""
        look = mask & (self.memory["step"] == 0)
        if look.any():
            with torch.inference_mode():
                self.memory["targets"][look] = self.clone(flat_observation(obs)[look]).numpy()
        return follow_chunks(self.memory, obs, mask)


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range."""
    check_flags(args, RANGES)


def load_demos(args: Args) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Observations (T, 25) and motions (T, chunk, 6) of every episode: targets minus measured joint positions, rad.

    Towards the end of an episode its last target fills the chunk.
    """
    keys = (STATE, ENVIRONMENT, ACTION)
    info = read_info(Path(args.demos), keys)
    episodes = read_dataset(Path(args.demos), info, keys)
    if len(episodes) < 2:
        raise SO101Error(f"--demos {args.demos}: needs two episodes or more, one to learn from and one to validate on")
    units = [unit_of(info, key, args.units) for key in (STATE, ACTION)]
    demos = []
    for episode in episodes:
        state, action = (to_rad(episode[key], unit) for key, unit in zip((STATE, ACTION), units))
        obs = np.concatenate([state, episode[ENVIRONMENT]], axis=1)
        steps = np.arange(len(action))[:, None] + np.arange(args.chunk_size)
        motion = action[np.minimum(steps, len(action) - 1)] - state[:, None]
        demos.append((torch.tensor(obs, dtype=torch.float32), torch.tensor(motion, dtype=torch.float32)))
    return demos


def main() -> int:
    """Train; returns the exit code."""
    args = tyro.cli(Args, description=__doc__)
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
    # joints that keep still have a scale, too: what hardly varies must not be blown up
    clone.motion_scale_rad.copy_(motion.square().mean((0, 1)).sqrt().clamp(min=1e-3))
    x, valid_x = clone.features(obs.numpy()), clone.features(valid_obs.numpy())
    target, valid_target = motion / clone.motion_scale_rad, valid_motion / clone.motion_scale_rad
    optimizer = torch.optim.AdamW(clone.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.train_steps)

    run_dir = make_run_dir(
        args.log_dir, f"{Path(SCRIPT).stem}_{time.strftime('%Y%m%d-%H%M%S')}_s{args.seed}", "tensorboard"
    )
    write_json(run_dir / "config.json", describe_run(SCRIPT, args))
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    writer, start = SummaryWriter(str(run_dir / "tensorboard")), time.perf_counter()
    valid_loss = float("nan")
    for step in (bar := tqdm(range(1, args.train_steps + 1), unit="step", dynamic_ncols=True)):
        rows = torch.randint(len(obs), (args.batch_size,), generator=generator)
        loss = (clone.get_motion(x[rows]) - target[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if not torch.isfinite(loss):
            raise SO101Error(f"the loss is {loss.item()} at step {step}: lower --learning-rate {args.learning_rate}")
        if step % 500 == 0 or step == args.train_steps:
            with torch.no_grad():
                valid_loss = (clone.get_motion(valid_x) - valid_target).square().mean().item()
            writer.add_scalar("train/loss", loss.item(), step)
            writer.add_scalar("validation/loss", valid_loss, step)
            bar.set_postfix(loss=f"{loss.item():.4f}", validation=f"{valid_loss:.4f}")
    writer.close()

    model, wall_time = run_dir / "bc_model.pt", time.perf_counter() - start
    settings = dataclasses.asdict(args)
    save_tensors(model, {"format": CLONE, "script": SCRIPT, "args": settings, "clone": clone.state_dict()})
    summary = {
        "episodes": len(parts[0]), "frames": len(obs), "validation_episodes": len(parts[1]),
        "train_loss": loss.item(), "validation_loss": valid_loss, "wall_time_s": wall_time,
    }  # fmt: skip
    write_json(run_dir / "training_summary.json", summary)
    print(
        f"{len(parts[0])} episodes, {len(obs)} frames, {wall_time:.1f} s; validation loss {valid_loss:.4f} (variance 1)"
    )
    print(f"evaluate:  {command_of('eval_so101.py')} --base-policy bc:{model} --episodes 100")
    print(f"reinforce: {command_of('ppo_residual_so101.py')} --base-policy bc:{model}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
