"""Residual PPO from pixels on the SO-101 "paper in square" task, in one file: sibling of ppo_residual_so101.py.

    python ppo_residual_so101_rgb.py --total-timesteps 200000

The actor sees what a real arm has: cameras, joints, the gripper's tip, and what the base policy asks for. The critic,
which only training needs, sees where the sheet lies; and the actor's network is told so, while it learns, as something
to find in the pictures (`pose_coef`). Top to bottom: Args, Agent, rollout, advantages, loss, update, checkpoints, main.
Where the two files agree, they agree line by line.
"""

if __name__ == "__main__":  # Ctrl+C while importing ends the program, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import dataclasses
import json
import shlex
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from so101_env import (
    ACT_DIM,
    MAX_EPISODE_STEPS,
    MEASURED,
    OBS_DIM,
    OBSERVATION,
    BasePolicyError,
    SO101Error,
    SO101ResidualVectorEnv,
    Task,
)
from so101_policies import (
    CHECKPOINT,
    MEASURED_DIM,
    Checkpoint,
    Features,
    Server,
    SheetFinder,
    check_base,
    load_checkpoint,
    load_policy,
    load_weights,
    scaled_pose,
)
from so101_runs import (
    BEST_BY,
    EVAL_TAGS,
    FINALISTS,
    RIVAL_EPISODES,
    ROLLOUT_TAGS,
    VALIDATION_SEED,
    Interrupts,
    check_cameras,
    check_flags,
    check_run_name,
    command_of,
    copy_file,
    describe_run,
    episode_mean,
    evaluate,
    evaluate_agent,
    finalists_of,
    flag_of,
    flat_settings,
    log_best,
    make_run_dir,
    model_name,
    ranking,
    run_dir_of,
    run_script,
    save_tensors,
    to_numpy,
    to_plain,
    write_json,
)

SCRIPT = Path(__file__).name
LOG_2PI = float(np.log(2 * np.pi))
# Two halves of every minibatch, always, however many cores there are: so their sum is the same everywhere.
SHARDS = 2


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class PPO:
    """The algorithm."""

    num_envs: int = 32
    """environments simulated side by side"""
    num_steps: int = 64
    """steps per environment and rollout"""
    minibatch_size: int = 512
    """samples per gradient step"""
    update_epochs: int = 4
    """passes over each rollout"""
    learning_rate: float = 1e-3
    """step size of Adam at the start, for the actor"""
    critic_learning_rate: float = 5e-3
    """the same for the critic"""
    anneal_lr: bool = True
    """let the learning rates fall linearly to zero"""
    gamma: float = 0.98
    """discount factor"""
    gae_lambda: float = 0.9
    """lambda of the generalised advantage estimation"""
    clip_coef: float = 0.3
    """clipping range of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    pose_coef: float = 1.0
    """weight of the loss of the actor's estimate of the sheet's pose; 0: it learns to see from rewards alone"""
    max_grad_norm: float = 0.5
    """norm to which larger gradients are scaled down"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    shaping: bool = True
    """add the potential-based shaping term to the rewards that PPO learns from; logged returns are unshaped"""
    train_episode_steps: int = 150
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Networks:
    """Actor and critic."""

    actor_cameras: tuple[str, ...] = ("top",)
    """what the actor sees through: top, wrist"""
    actor_image_size: int = 64
    """side of its pictures, pixels"""
    hidden_size: int = 128
    """units in the actor's hidden layers"""
    critic_hidden_size: int = 64
    """units in each of the critic's two hidden layers"""
    log_std_init: float = -0.3
    """log standard deviation of the exploration noise at the start"""


@dataclasses.dataclass
class Base:
    """The policy that the residual corrects."""

    base_policy: str = "zero"
    """zero, jacobian (a scripted pusher), checkpoint:PATH, onnx:PATH, bc:PATH, server:HOST:PORT (LeRobot's or
    GR00T's), opencv:SPEC (SPEC told by OpenCV where the sheet lies), or MODULE:CLASS[:ARGUMENT] for your own class"""
    server: Server = dataclasses.field(default_factory=Server)


@dataclasses.dataclass
class Run:
    """What is written, how often, and where."""

    log_dir: str = "logs"
    """directory that gets one directory per run; with --resume, by default, the one that the resumed run lies in"""
    run_name: str | None = None
    """name of that directory, and of the run at Weights & Biases (default: the script's name, the time and the seed)"""
    num_threads: int | None = None
    """physics threads (default: every core); the results do not depend on it"""
    checkpoint_every: int = 10_000
    """steps between checkpoints"""
    eval_every: int = 10_000
    """steps between evaluations, which also choose the best model; 0 for none"""
    eval_episodes: int = 16
    """episodes per evaluation, on fixed held-out seeds; 16 take about a fifth of the time of a default run"""
    final_eval_episodes: int = 64
    """episodes on which the best models are compared at the end if an evaluation's cannot tell them apart"""
    resume: str | None = None
    """checkpoint to continue, to the bit, with the settings it was started with"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project_name: str = "ppo-residual-so101"
    """project of --track"""
    capture_video: bool = False
    """save a video of the first episode of every evaluation"""


@dataclasses.dataclass
class Args:
    seed: int = 1
    """seed of everything: weights, exploration, minibatches, environments"""
    total_timesteps: int = 200_000
    """environment steps in all; never exceeded"""
    ppo: PPO = dataclasses.field(default_factory=PPO)
    networks: Networks = dataclasses.field(default_factory=Networks)
    base: Base = dataclasses.field(default_factory=Base)
    task: Task = dataclasses.field(default_factory=Task)
    run: Run = dataclasses.field(default_factory=Run)


RANGES = {
    "seed": (0, 2**32 - 1), "total_timesteps": (1, 10**10), "num_envs": (1, 4096), "num_steps": (1, 2**16),
    "minibatch_size": (1, 2**22), "update_epochs": (1, 1000), "learning_rate": (1e-9, 10),
    "critic_learning_rate": (1e-9, 10), "gamma": (0, 1), "gae_lambda": (0, 1), "clip_coef": (1e-6, 100),
    "ent_coef": (0, 100), "vf_coef": (0, 100), "pose_coef": (0, 1e3), "max_grad_norm": (1e-6, 1e6),
    "train_episode_steps": (1, 10**6), "actor_image_size": (16, 512), "hidden_size": (1, 4096),
    "critic_hidden_size": (1, 4096), "log_std_init": (-10, 2), "num_threads": (1, 1024),
    "checkpoint_every": (1, 10**10), "eval_every": (0, 10**10), "eval_episodes": (1, 4096),
    "final_eval_episodes": (0, 100_000), **Task.RANGES, **Server.RANGES,
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range, or contradicts another."""
    for settings in (args, args.ppo, args.networks, args.base.server, args.task, args.run):
        check_flags(settings, RANGES)
    check_run_name(args.run.run_name)
    # a budget below one rollout shortens the rollout, and below num_envs takes fewer environments
    samples = args.ppo.num_envs * args.ppo.num_steps
    if samples > 2**22:
        raise SO101Error(f"--num-steps {args.ppo.num_steps}: {samples} samples a rollout are too many, at most {2**22}")
    if args.ppo.minibatch_size > samples:
        raise SO101Error(
            f"--minibatch-size {args.ppo.minibatch_size} exceeds a rollout of num_envs * num_steps = {samples} "
            "samples: lower it or raise --num-steps"
        )
    if args.task.full_randomization and not args.task.randomize:
        raise SO101Error("--full-randomization contradicts --no-randomize: drop one of them")
    check_cameras("--actor-cameras", args.networks.actor_cameras)


def make_envs(args: Args, num_envs: int, evaluation: bool = False, num_threads: int | None = None):
    """The task as args describe it, a SO101ResidualVectorEnv: for training, or for `evaluate`."""
    return SO101ResidualVectorEnv(
        num_envs,
        load_policy(args.base.base_policy, args.base.server),
        args.task,
        max_episode_steps=MAX_EPISODE_STEPS if evaluation else args.ppo.train_episode_steps,
        shaping_gamma=args.ppo.gamma if args.ppo.shaping else None,
        observe="pixels",
        observe_base=args.base.base_policy != "zero",
        cameras=args.networks.actor_cameras,
        image_size=(args.networks.actor_image_size, args.networks.actor_image_size),
        num_threads=num_threads or args.run.num_threads,
        autoreset_mode=AutoresetMode.DISABLED if evaluation else AutoresetMode.SAME_STEP,
    )


# ---------------------------------------------------------------------------------------------------------------------
# agent


def layer_init(layer: nn.Linear, std: float = np.sqrt(2)) -> nn.Linear:
    """Orthogonal weights of gain std, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class Agent(nn.Module):
    """Gaussian actor that sees, and critic that knows.

    From what the actor finds in the pictures, what the arm measures and what the base policy asks for, the residual.
    """

    def __init__(self, args: Args):
        super().__init__()
        net, moves = args.networks, args.base.base_policy != "zero"
        width, size = net.hidden_size, net.actor_image_size
        self.cameras, self.image_size = net.actor_cameras, (size, size)
        self.finder = SheetFinder(len(net.actor_cameras), size, MEASURED_DIM, width)
        self.actor_mean = nn.Sequential(
            nn.Linear(MEASURED_DIM + ACT_DIM * moves + SheetFinder.DIM, width), nn.ReLU(), nn.Linear(width, width),
            nn.LayerNorm(width), nn.ReLU(),
            # with a base policy to start from, the residual starts at exactly zero
            layer_init(nn.Linear(width, ACT_DIM), std=0.0 if moves else 0.01),
        )  # fmt: skip
        self.actor_logstd = nn.Parameter(torch.full((1, ACT_DIM), net.log_std_init))
        self.features, hidden = Features(), net.critic_hidden_size
        self.critic = nn.Sequential(
            layer_init(nn.Linear(self.features.dim, hidden)), nn.ReLU(), layer_init(nn.Linear(hidden, hidden)),
            nn.LayerNorm(hidden), nn.ReLU(), layer_init(nn.Linear(hidden, 1), std=1.0),
        )  # fmt: skip
        parts = [OBSERVATION[name] for name in MEASURED]
        mean, scale = (
            np.concatenate([np.broadcast_to(getattr(part, key), len(part.names)) for part in parts])
            for key in ("mean", "scale")
        )
        if moves:  # the base policy's deltas come last
            mean, scale = np.append(mean, np.zeros(ACT_DIM)), np.append(scale, np.full(ACT_DIM, args.task.act_scale))
        for name, array in {"state_mean": mean, "state_scale": scale}.items():
            self.register_buffer(name, torch.tensor(array, dtype=torch.float32))

    def normalize(self, state: torch.Tensor) -> torch.Tensor:
        """Measurements (B, 15 or 21) as the networks see them."""
        return ((state - self.state_mean) / self.state_scale).clamp(-10, 10)

    def get_gaussian(
        self, images: list[torch.Tensor], state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean action (B, 6), unclipped, its log standard deviation (1, 6), and the sheet's pose (B, 3).

        Args:
            images: (B, H, W, 3) uint8 for each camera.
            state: normalised, (B, 15 or 21).
        """
        found, pose = self.finder(images, state[:, :MEASURED_DIM])
        return self.actor_mean(torch.cat([state, found], dim=1)), self.actor_logstd, pose

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        """Value (B,) of the shaped reward, for features (B, views, F) of what the critic knows."""
        return self.critic(x.flatten(0, 1)).view(len(x), -1).mean(1)

    @torch.inference_mode()
    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """The policy without exploration: residuals (N, 6) in [-1, 1]."""
        return self.get_gaussian(*self.tensors(obs))[0].clamp(-1, 1).numpy()

    def tensors(self, obs: dict[str, np.ndarray]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Pictures and normalised measurements of the environment's observations."""
        images = [torch.from_numpy(obs[f"pixels_{camera}"]) for camera in self.cameras]
        return images, self.normalize(torch.from_numpy(obs["state"]))


def log_density(mean: torch.Tensor, logstd: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Log-density (B,) of unclipped actions (B, 6)."""
    z = (action - mean) * torch.exp(-logstd)
    return -0.5 * z.square().sum(-1) - logstd.sum(-1) - 0.5 * ACT_DIM * LOG_2PI


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def rollout(
    agent: Agent, envs: SO101ResidualVectorEnv, next_obs: dict[str, np.ndarray], next_full: np.ndarray,
    num_steps: int, generator: torch.Generator,
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], np.ndarray, list[dict[str, float]]]:  # fmt: skip
    """Act for num_steps with exploration.

    Returns the buffers (num_steps, num_envs, ...), the next observation and what the critic knows then (num_envs, 25),
    and one dict (success, return, length, failure) per finished episode.
    """
    n, obs = envs.num_envs, {key: np.zeros((num_steps, *array.shape), array.dtype) for key, array in next_obs.items()}
    buffers = {
        "full": np.zeros((num_steps, n, OBS_DIM), np.float32),  # what the critic knows
        "real_next_full": np.zeros((num_steps, n, OBS_DIM), np.float32),  # the final one where an episode ended
        "actions": np.zeros((num_steps, n, ACT_DIM), np.float32),  # unclipped
        "logprobs": np.zeros((num_steps, n), np.float32),
        "rewards": np.zeros((num_steps, n), np.float32),
        "terminations": np.zeros((num_steps, n), np.float32),
        "dones": np.zeros((num_steps, n), np.float32),  # terminated or truncated
    }
    episodes = []
    noise = torch.randn(num_steps, n, ACT_DIM, generator=generator)
    with torch.inference_mode():
        for step in range(num_steps):
            mean, logstd, _ = agent.get_gaussian(*agent.tensors(next_obs))
            action = mean + noise[step] * logstd.exp()
            for key, array in obs.items():
                array[step] = next_obs[key]
            buffers["full"][step], buffers["actions"][step] = next_full, action
            buffers["logprobs"][step] = log_density(mean, logstd, action)
            next_obs, reward, terminations, truncations, infos = envs.step(
                action.numpy()
            )  # which clips it and adds it to the base
            next_full = infos["full_observation"]
            buffers["real_next_full"][step], buffers["rewards"][step] = next_full, reward
            if "final_info" in infos:
                done, final = infos["_final_info"], infos["final_info"]
                buffers["real_next_full"][step][done] = final["full_observation"][done]
                buffers["terminations"][step], buffers["dones"][step] = terminations, done
                for i in np.flatnonzero(done):
                    episodes.append({
                        "success": float(final["is_success"][i]),
                        "return": float(final["episode_summary"]["return"][i]),
                        "length": float(final["episode_summary"]["length"][i]),
                        "failure": float(final["non_finite"][i] or final["out_of_reach"][i]),
                    })  # fmt: skip
    for name in ("full", "real_next_full", "rewards"):
        if not np.isfinite(buffers[name]).all():
            raise FloatingPointError(f"{name.replace('_', ' ')} of the environments")
    return {name: torch.from_numpy(array) for name, array in {**obs, **buffers}.items()}, next_obs, next_full, episodes


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, real_next_values: torch.Tensor,
    terminations: torch.Tensor, dones: torch.Tensor, gamma: float, gae_lambda: float,
) -> torch.Tensor:  # fmt: skip
    """Advantages (num_steps, num_envs), the shape of every tensor here.

    A truncated episode bootstraps from the value of its final observation, a terminated one from zero; the sum over
    lambda stops at both.
    """
    deltas = (rewards + gamma * real_next_values * (1.0 - terminations) - values).numpy()
    decay = (gamma * gae_lambda * (1.0 - dones)).numpy()
    advantages = np.zeros_like(deltas)
    lastgaelam = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = lastgaelam = deltas[t] + decay[t] * lastgaelam
    return torch.from_numpy(advantages)


def ppo_loss(
    agent: Agent, mb: dict[str, Any], critic_view: int, args: PPO
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """Loss of one shard of a minibatch, (B, ...) each, and the metrics to log.

    The critic learns from one view only, the scene or its mirror image: taking turns teaches as much, at half the cost.
    """
    mean, logstd, pose = agent.get_gaussian(mb["images"], mb["state"])
    logratio = log_density(mean, logstd, mb["actions"]) - mb["logprobs"]
    ratio, entropy = logratio.exp(), logstd.sum(-1).mean() + 0.5 * ACT_DIM * (1.0 + LOG_2PI)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(-mb["advantages"] * ratio, -mb["advantages"] * clipped_ratio).mean()
    v_loss = 0.5 * (agent.get_value(mb["x"][:, critic_view : critic_view + 1]) - mb["returns"]).square().mean()
    pose_error = (pose - mb["pose"]).abs()
    loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss + args.pose_coef * pose_error.mean()
    with torch.no_grad():
        error = pose_error * agent.finder.pose_scale
        metrics = {
            "approx_kl": ((ratio - 1) - logratio).mean(),  # http://joschu.net/blog/kl-approx.html
            "clip_fraction": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
            "entropy_loss": -entropy,
            "policy_gradient_loss": pg_loss,
            "value_loss": v_loss,
            "position_error_m": error[:, :2].norm(dim=1).mean(),
            "yaw_error_rad": error[:, 2].mean(),
        }
    return loss, {key: float(value.detach()) for key, value in metrics.items()}


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor], args: PPO,
    generator: torch.Generator, pool: ThreadPoolExecutor,
) -> dict[str, float]:  # fmt: skip
    """Improve the agent on one rollout; returns the metrics averaged over all minibatches."""
    groups = [group["params"] for group in optimizer.param_groups]  # of the actor, and of the critic
    parameters, (num_steps, n) = [*groups[0], *groups[1]], buffers["rewards"].shape
    with torch.no_grad():
        full = buffers["full"].flatten(0, 1).numpy()
        b_x = agent.features(full)  # (num_steps * num_envs, views, F)
        b_values = agent.get_value(b_x)
        real_next_x = agent.features(buffers["real_next_full"].flatten(0, 1).numpy())
        real_next_values = agent.get_value(real_next_x).view(num_steps, n)
        advantages = compute_gae(
            buffers["rewards"], b_values.view(num_steps, n), real_next_values,
            buffers["terminations"], buffers["dones"], args.gamma, args.gae_lambda,
        )  # fmt: skip
    b_advantages = advantages.flatten()
    b_returns, b_actions = b_advantages + b_values, buffers["actions"].flatten(0, 1)
    b_images = [buffers[f"pixels_{camera}"].flatten(0, 1) for camera in agent.cameras]
    b = {
        "state": agent.normalize(buffers["state"].flatten(0, 1)), "x": b_x, "actions": b_actions,
        "logprobs": buffers["logprobs"].flatten(), "returns": b_returns,
        "pose": torch.from_numpy(scaled_pose(full)),
    }  # fmt: skip

    def gradient(rows: torch.Tensor, advantages: torch.Tensor, critic_view: int) -> tuple[Any, dict[str, float]]:
        mb = {name: tensor[rows] for name, tensor in b.items()}
        mb |= {"images": [images[rows] for images in b_images], "advantages": advantages}
        loss, metrics = ppo_loss(agent, mb, critic_view, args)
        if not torch.isfinite(loss):
            raise FloatingPointError("loss (" + ", ".join(f"{k} {v:.3g}" for k, v in metrics.items()) + ")")
        return torch.autograd.grad(loss, parameters), metrics

    # minibatches of equal size, at most minibatch_size: a shortened rollout leaves no tiny rest
    num_minibatches, sums = -(-len(b_x) // args.minibatch_size), {}
    for epoch in range(args.update_epochs):
        order = torch.randperm(len(b_x), generator=generator)
        for rows in order.tensor_split(num_minibatches):
            mb_advantages = b_advantages[rows]
            if args.norm_adv and len(rows) > 1:
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            shards = [
                part for part in zip(rows.tensor_split(SHARDS), mb_advantages.tensor_split(SHARDS)) if len(part[0])
            ]
            weights = [len(part) / len(rows) for part, _ in shards]
            results = list(pool.map(gradient, *zip(*shards), [epoch % b_x.shape[1]] * SHARDS))
            for parameter, *parts in zip(parameters, *(gradients for gradients, _ in results)):
                parameter.grad = sum(weight * part for weight, part in zip(weights, parts))
            # each by itself: the critic's large gradients would scale down the actor's
            norms = [nn.utils.clip_grad_norm_(group, args.max_grad_norm) for group in groups]
            if not all(torch.isfinite(norm) for norm in norms):
                raise FloatingPointError("gradient")
            optimizer.step()
            for weight, (_, metrics) in zip(weights, results):
                sums = {key: sums.get(key, 0.0) + weight * value for key, value in metrics.items()}
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise FloatingPointError("weights")
    metrics = {key: value / (args.update_epochs * num_minibatches) for key, value in sums.items()}
    variance = b_returns.var(correction=0)
    metrics["explained_variance"] = float(1 - (b_returns - b_values).var(correction=0) / variance) if variance else 0.0
    metrics["residual_magnitude"] = float(b_actions.clamp(-1, 1).norm(dim=-1).mean())
    return metrics


def choose_best(
    finalists: list[dict[str, Any]], run_dir: Path, eval_envs: SO101ResidualVectorEnv, run: Run
) -> dict[str, Any]:
    """The best of the finalists, with its means over final_eval_episodes, those of its evaluation and more."""
    more = [VALIDATION_SEED + i for i in range(run.eval_episodes, run.final_eval_episodes)]
    needed = finalists[0]["success_rate"] - RIVAL_EPISODES / run.eval_episodes
    rivals = [finalist for finalist in finalists if finalist["success_rate"] >= needed]
    if not more or len(rivals) < 2:
        return {**finalists[0], "episodes": run.eval_episodes}
    share, compared = len(more) / run.final_eval_episodes, []
    for finalist in rivals:
        model = run_dir / "best_model" / model_name(finalist["step"])
        results = evaluate(load_checkpoint(model).agent(model).act, eval_envs, more)
        means = {"success_rate": episode_mean(results, "success"), "mean_return": episode_mean(results, "return")}
        compared.append({key: (1 - share) * finalist[key] + share * means[key] for key in BEST_BY})
        compared[-1] |= {"step": finalist["step"], "episodes": run.final_eval_episodes}
    return max(compared, key=ranking)


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: all that a run needs to go on to the bit


# flags that may differ from the run that is resumed: none of them changes what is learned, but a longer budget
RESUMABLE = {
    "resume", "log_dir", "run_name", "num_threads", "total_timesteps", "track", "wandb_project_name", "capture_video",
}  # fmt: skip


def parse_args() -> tuple[Args, Checkpoint | None]:
    """Command line to Args; with --resume, also the checkpoint, whose settings are then the defaults.

    Raises SO101Error for flags that cannot be used.
    """
    config = (tyro.conf.OmitArgPrefixes,)
    args = tyro.cli(Args, description=__doc__, config=config)
    if args.run.resume is None:
        check_args(args)
        return args, None
    path, checkpoint = args.run.resume, load_checkpoint(args.run.resume)
    if checkpoint.saved["script"] != SCRIPT:
        raise SO101Error(f"--resume {path}: written by {checkpoint.saved['script']}; resume it with that script")
    saved = dataclasses.replace(checkpoint.args)
    saved.run = dataclasses.replace(
        saved.run, resume=None, log_dir=str(run_dir_of(path).parent), run_name=None, num_threads=None, track=False,
        capture_video=False,
    )  # fmt: skip
    args = tyro.cli(Args, description=__doc__, config=config, default=saved)
    before, after = flat_settings(dataclasses.asdict(saved)), flat_settings(dataclasses.asdict(args))
    for name, new in after.items():
        moved = name == "base_policy" and all(str(each[name]).startswith("server:") for each in (before, after))
        if new != before[name] and name not in RESUMABLE and not moved:  # a server may listen elsewhere now
            raise SO101Error(f"{flag_of(name)} {new}: {path} was trained with {before[name]}; drop the flag")
    if args.total_timesteps < (steps := checkpoint.saved["global_step"]):
        raise SO101Error(f"--total-timesteps {args.total_timesteps}: {path} has {steps} steps already")
    check_args(args)
    return args, checkpoint


def restore(
    checkpoint: Checkpoint, path: str, agent: Agent, optimizer: torch.optim.Optimizer, generator: torch.Generator,
    envs: SO101ResidualVectorEnv,
) -> tuple[np.ndarray, int, list[dict[str, Any]], list[dict[str, float]]]:  # fmt: skip
    """Put everything back as it was; returns next_full, global_step, the finalists and the last 100 episodes.

    Raises SO101Error if the checkpoint does not fit.
    """
    saved = checkpoint.saved
    check_base(saved, checkpoint.args.base.base_policy, envs.base_policy, path)
    load_weights(agent, saved["agent"], path)
    next_full = saved["next_obs"].numpy()
    try:
        envs.set_state(to_numpy(saved["envs"]))
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        if next_full.shape != (envs.num_envs, OBS_DIM) or next_full.dtype != np.float32:
            raise ValueError(f"next_obs of shape {next_full.shape}")
        for parameter, state in optimizer.state.items():
            if any(state[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimiser's state has other shapes")
        if any(set(episode) != {"success", "return", "length", "failure"} for episode in saved["recent_episodes"]):
            raise ValueError("recent_episodes has other keys")
        finalists = [{key: finalist[key] for key in ("step", *BEST_BY)} for finalist in saved["finalists"]]
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SO101Error(f"{path}: cannot be continued ({error}); resume another checkpoint") from error
    if missing := [model for model in finalists_of(path, finalists) if not model.is_file()]:
        raise SO101Error(f"{path}: one of the best models of its run, {missing[0]}, is missing; put it back to go on")
    return next_full, saved["global_step"], finalists, saved["recent_episodes"]


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Train; returns the exit code."""
    args, resumed = parse_args()
    start_time, start_cpu = time.perf_counter(), time.process_time()
    num_envs = resumed.saved["num_envs"] if resumed else min(args.ppo.num_envs, args.total_timesteps)
    print(
        f"from step {resumed.saved['global_step']} to" if resumed else "training for",
        f"{args.total_timesteps} steps in {num_envs} environments, tape margin {1000 * args.task.tape_margin:.0f} mm,",
        f"base policy {args.base.base_policy}, seed {args.seed}", flush=True,
    )  # fmt: skip
    torch.set_num_threads(1)  # and two that learn, each from its half of a minibatch: they add up in one order
    pool = ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging, at 3 % of an update
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # exploration and minibatches

    agent = Agent(args)
    critic = list(agent.critic.parameters())
    actor = [parameter for parameter in agent.parameters() if all(parameter is not other for other in critic)]
    rates = [args.ppo.learning_rate, args.ppo.critic_learning_rate]
    groups = [{"params": part, "lr": rate} for part, rate in zip((actor, critic), rates)]
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    envs = make_envs(args, num_envs)
    # as wide as the widest batch of episodes that are run at once
    width = max(args.run.eval_episodes, args.run.final_eval_episodes - args.run.eval_episodes)
    eval_envs = make_envs(args, width, evaluation=True)
    if args.run.track:
        try:
            import wandb
        except ImportError as error:
            raise SO101Error("--track needs Weights & Biases: pip install wandb") from error
    recent: deque[dict[str, float]] = deque(maxlen=100)  # episodes
    if resumed:
        next_full, global_step, finalists, episodes = restore(
            resumed, args.run.resume, agent, optimizer, generator, envs
        )
        next_obs = envs.observation
        recent.extend(episodes)
    else:
        seeds = np.random.SeedSequence(args.seed).generate_state(envs.num_envs) % VALIDATION_SEED
        next_obs, infos = envs.reset(seed=[int(seed) for seed in seeds])
        next_full, global_step, finalists = infos["full_observation"], 0, []
    name = args.run.run_name or (
        f"{Path(SCRIPT).stem.removesuffix('_so101')}_{time.strftime('%Y%m%d-%H%M%S')}_s{args.seed}"
    )
    run_dir = make_run_dir(args.run.log_dir, name, "checkpoints", "best_model", "eval_results", "tensorboard")
    for model in reversed(finalists_of(args.run.resume, finalists) if resumed else []):  # the best one last
        for file in (model.name, "best_model.pt"):
            copy_file(model, run_dir / "best_model" / file)
    interrupts = Interrupts()
    try:
        print(f"everything goes to {run_dir}", flush=True)
    except BrokenPipeError:
        interrupts.on_broken_pipe()
    settings = flat_settings(dataclasses.asdict(args))
    if args.run.track:
        wandb.init(
            project=args.run.wandb_project_name, name=run_dir.name, config=settings, sync_tensorboard=True,
        )  # fmt: skip
    from torch.utils.tensorboard import SummaryWriter  # after wandb, which patches it; and slow to import

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    write_json(run_dir / "config.json", describe_run(SCRIPT, args))
    writer.add_text("command", shlex.join(["python", *sys.argv]))
    table = "".join(f"|{key}|{value}|\n" for key, value in settings.items())
    writer.add_text("hyperparameters", f"|setting|value|\n|-|-|\n{table}")

    def checkpoint() -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        settings = dataclasses.asdict(args)
        settings["run"]["resume"] = None
        return {
            "format": CHECKPOINT, "script": SCRIPT, "args": settings, "num_envs": envs.num_envs,
            "base_fingerprint": envs.base_policy.fingerprint if envs.base_policy else "", "global_step": global_step,
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
            "envs": to_plain(envs.get_state()), "next_obs": torch.from_numpy(next_full),
            "recent_episodes": list(recent), "finalists": finalists,
        }  # fmt: skip

    def eval_and_log() -> dict[str, float]:
        """Evaluate, log it, and keep the model if it is among the best so far."""
        nonlocal finalists, base_success, eval_time
        eval_start = time.perf_counter()
        film = run_dir / "eval_results" / f"step_{global_step}.mp4" if args.run.capture_video else None
        show_progress("evaluating")
        result = evaluate_agent(agent, eval_envs, args.run.eval_episodes, base_success, film)
        base_success = result["base_success_rate"]
        for name, value in result.items():
            writer.add_scalar(f"eval/{EVAL_TAGS.get(name, name)}", value, global_step)
        result = {"step": global_step, **result}
        with open(run_dir / "eval_results" / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        if args.run.track and film:
            wandb.log({"eval/video": wandb.Video(str(film), format="mp4"), "global_step": global_step})
        own = {key: result[key] for key in ("step", *BEST_BY)}
        others = [each for each in finalists if each["step"] != global_step]  # a resumed run may evaluate a step again
        best = sorted([*others, own], key=ranking, reverse=True)[:FINALISTS]
        if own in best:
            finalists, model = best, run_dir / "best_model" / model_name(global_step)
            save_tensors(model, checkpoint())
            if own == best[0]:
                copy_file(model, run_dir / "best_model" / "best_model.pt")
        eval_time += time.perf_counter() - eval_start
        return result

    def show_progress(doing: str = "", steps: int = 0) -> None:
        """Say on the progress bar what is being done, or how good the agent is, and steps that were done."""
        text = doing or (f"success {means['success']:.2f}" if means else "training")
        text += f", evaluation {result['success_rate']:.2f}" if result and not doing else ""
        try:
            bar.set_description_str(text, refresh=False)
            bar.update(steps) if steps else bar.refresh()
        except BrokenPipeError:
            interrupts.on_broken_pipe()

    first_step, eval_time, metrics, means = global_step, 0.0, {}, {}
    result = None  # of the last evaluation
    # an arm that rests moves nothing, and no sheet starts inside the tape
    base_success = 0.0 if envs.base_policy is None else None
    before_failure = None if envs.base_policy is None else copy.deepcopy(checkpoint())
    # the delay: nothing is drawn before show_progress, which knows what to do if nobody reads it
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True, delay=1e-3)
    try:
        if args.run.eval_every and not finalists:
            result = eval_and_log()
        while args.total_timesteps - global_step >= envs.num_envs and not interrupts.signum:
            if args.ppo.anneal_lr:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * (1.0 - global_step / args.total_timesteps)
            num_steps = min(args.ppo.num_steps, (args.total_timesteps - global_step) // envs.num_envs)
            if envs.base_policy is not None:  # it can fail at any step: then this pass of the loop is done again
                before_failure = copy.deepcopy(checkpoint())
            buffers, next_obs, next_full, episodes = rollout(agent, envs, next_obs, next_full, num_steps, generator)
            metrics = update(agent, optimizer, buffers, args.ppo, generator, pool)
            before, global_step = global_step, global_step + num_steps * envs.num_envs

            recent.extend(episodes)
            means = {key: episode_mean(recent, key) for key in ROLLOUT_TAGS} if recent else {}
            fps = (global_step - first_step) / (time.perf_counter() - start_time)
            scalars = {f"train/{key}": value for key, value in metrics.items()}
            scalars |= {"train/learning_rate": optimizer.param_groups[0]["lr"], "time/fps": fps}
            scalars |= {f"rollout/{ROLLOUT_TAGS[key]}": value for key, value in means.items()}
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, global_step)
            show_progress(steps=global_step - before)

            # the evaluation first, so that a checkpoint of the same step knows the best model
            if args.run.eval_every and global_step // args.run.eval_every > before // args.run.eval_every:
                result = eval_and_log()
            if global_step // args.run.checkpoint_every > before // args.run.checkpoint_every:
                save_tensors(run_dir / "checkpoints" / model_name(global_step), checkpoint())
        evaluated = result is not None and result["step"] == global_step
        if args.run.eval_every and not evaluated and not interrupts.signum:
            result = eval_and_log()
        best = {**finalists[0], "episodes": args.run.eval_episodes} if finalists else None
        if best and not interrupts.signum:
            show_progress("choosing the best model")
            start = time.perf_counter()
            best = choose_best(finalists, run_dir, eval_envs, args.run)
            copy_file(run_dir / "best_model" / model_name(best["step"]), run_dir / "best_model" / "best_model.pt")
            eval_time += time.perf_counter() - start
            log_best(writer, settings, best)
        show_progress()
        model = run_dir / ("interrupted_model.pt" if interrupts.signum else "final_model.pt")
        save_tensors(model, checkpoint())
    except BasePolicyError as error:
        model = run_dir / "interrupted_model.pt"
        save_tensors(model, before_failure)
        way_out = f"resume {before_failure['global_step']} steps with --resume {model}"
        raise SO101Error(f"--base-policy {args.base.base_policy}: {error}; {way_out}") from error
    except FloatingPointError as error:
        print(
            f"{SCRIPT}: error: NaN or Inf in the {error} after {global_step} steps; "
            f"the checkpoints in {run_dir} are from before; try a lower --learning-rate",
            file=sys.stderr,
        )
        return 1
    finally:
        bar.close()
        writer.close()
        envs.close()
        eval_envs.close()
        pool.shutdown()

    wall_time = time.perf_counter() - start_time
    best_model = run_dir / "best_model" / "best_model.pt" if best else model
    summary = {
        "total_timesteps": global_step,
        "wall_time_s": wall_time,
        "cpu_time_s": time.process_time() - start_cpu,
        "steps_per_second": (global_step - first_step) / wall_time,
        "eval_time_s": eval_time,
        "base_time_s": envs.base_time_s + eval_envs.base_time_s,
        "interrupted": bool(interrupts.signum),
        "success_rate_100": means.get("success"),
        "mean_return_100": means.get("return"),
        "mean_length_100": means.get("length"),
        "residual_magnitude": metrics.get("residual_magnitude"),
        "final_eval_success_rate": result["success_rate"] if result else None,
        "final_eval_mean_return": result["mean_return"] if result else None,
        "base_eval_success_rate": base_success,
        "best_eval_success_rate": best["success_rate"] if best else None,
        "best_eval_step": best["step"] if best else None,
        "best_eval_episodes": best["episodes"] if best else None,
        "best_checkpoint": str(best_model),
    }
    write_json(run_dir / "training_summary.json", summary)
    speed = f"{summary['steps_per_second']:.0f} steps/s"
    if envs.base_policy is not None:
        speed += f", {summary['base_time_s'] / wall_time:.0%} of the time for the base policy"
    print(f"{global_step} steps in {wall_time:.1f} s ({speed}), saved in {run_dir}")
    if interrupts.signum:
        print(f"resume:   {command_of(SCRIPT)} --resume {model}")
        return 128 + interrupts.signum
    if best:
        seen = f"step {best['step']}, {best['episodes']} episodes"
        print(f"success: best model ({seen}) {best['success_rate']:.2f}", end="")
        print((f", last {result['success_rate']:.2f}" if result else "") + f", base policy alone {base_success:.2f}")
    print(f"evaluate: {command_of('eval_so101.py')} --model {best_model}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
