"""Residual PPO from pixels on the SO-101 "paper in square" task, in one file: sibling of ppo_residual_so101.py.

    python -m so101.ppo_rgb --total-timesteps 200000

The actor sees what a real arm has: camera pictures, joints, the gripper's tip, and the base policy's action. The
critic, which is used in training only, sees the true state. While it learns, the actor's network is also trained to
estimate the sheet's pose from the pictures (`pose_coef`). Top to bottom: Args, Agent, rollout, advantages, loss,
update, main.
Where the two files agree, they agree line by line. A copy works like the original: `cp so101/ppo_rgb.py my_rgb.py`.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode

from so101.checkpoints import CHECKPOINT, check_base, load_weights, restore_optimizer, restoring
from so101.cli import check_cameras, check_flags, parse_run, run_script
from so101.distributed import World
from so101.evaluation import training_seeds
from so101.files import to_numpy, to_plain
from so101.networks import MEASURED_DIM, Features, SheetFinder, scaled_pose
from so101.optimizer import Adam
from so101.policies import load_policy
from so101.recorder import Recorder, Run
from so101.server import Server
from so101_env import MAX_EPISODE_STEPS, MEASURED, OBS_DIM, OBSERVATION, SO101ResidualVectorEnv, Task
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error

SCRIPT = Path(__file__).name
LOG_2PI = float(np.log(2 * np.pi))
# every minibatch is split in two halves, whatever the number of cores, so that the sum of their gradients is the same
SHARDS = 2


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class PPO:
    """The algorithm."""

    num_envs: int = 32
    """parallel environments"""
    num_steps: int = 64
    """steps per environment and rollout"""
    minibatch_size: int = 512
    """samples per gradient step"""
    update_epochs: int = 4
    """passes over each rollout"""
    learning_rate: float = 1e-3
    """initial step size of Adam for the actor"""
    critic_learning_rate: float = 5e-3
    """initial step size of Adam for the critic"""
    anneal_lr: bool = True
    """anneal the learning rates linearly to zero"""
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
    """gradient clipping by norm, for actor and critic separately"""
    shaping: bool = True
    """add the potential-based shaping term to the rewards that PPO learns from; logged returns are unshaped"""
    train_episode_steps: int = 150
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Networks:
    """Actor and critic."""

    actor_cameras: tuple[str, ...] = ("top",)
    """cameras of the actor: top, wrist"""
    actor_image_size: int = 64
    """side of the actor's pictures, pixels"""
    hidden_size: int = 128
    """units in the actor's hidden layers"""
    critic_hidden_size: int = 64
    """units in each of the critic's two hidden layers"""
    log_std_init: float = -0.3
    """initial log standard deviation of the exploration noise"""


@dataclasses.dataclass
class Base:
    """The policy that the residual corrects."""

    base_policy: str = "zero"
    """zero, jacobian (a scripted pusher), checkpoint:PATH, onnx:PATH, bc:PATH, lerobot:DIR (a policy that LeRobot has
    saved), server:HOST:PORT (LeRobot's or GR00T's), opencv:SPEC (SPEC with the sheet's pose estimated by OpenCV), or
    MODULE:CLASS[:ARGUMENT] for your own"""
    server: Server = dataclasses.field(default_factory=Server)


@dataclasses.dataclass
class Args:
    seed: int = 1
    """seed of weights, exploration, minibatches and environments"""
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
    "critic_hidden_size": (1, 4096), "log_std_init": (-10, 2), **Task.RANGES, **Server.RANGES, **Run.RANGES,
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range or contradicts another."""
    for settings in (args, args.ppo, args.networks, args.base.server, args.task, args.run):
        check_flags(settings, RANGES)
    args.run.check_name()
    # a budget below one rollout shortens the rollout, and below num_envs takes fewer environments
    samples = args.ppo.num_envs * args.ppo.num_steps
    if samples > 2**22:
        raise SO101Error(f"--num-steps {args.ppo.num_steps}: {samples} samples a rollout are too many, at most {2**22}")
    if args.ppo.minibatch_size > samples:
        raise SO101Error(
            f"--minibatch-size {args.ppo.minibatch_size} exceeds a rollout of num_envs * num_steps = {samples} "
            "samples: lower it or raise --num-steps"
        )
    if args.task.observe_load:
        raise SO101Error("--observe-load: a camera policy has no such input; drop the flag")
    check_cameras("--actor-cameras", args.networks.actor_cameras)


def make_envs(args: Args, num_envs: int, evaluation: bool = False, num_threads: int | None = None):
    """The task as args describe it, a SO101ResidualVectorEnv, for training or for `evaluate`."""
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
    """Gaussian actor on pictures, and critic on the true state.

    The actor's inputs are what `finder` finds in the pictures, the measurements, and the base policy's action.
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
        """Normalised measurements (B, 15 or 21)."""
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
        """Value (B,) of the shaped reward, for features (B, views, F) of the full observation."""
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

    Returns the buffers (num_steps, num_envs, ...), the next observation, the next full observation (num_envs, 25), and
    one dict (success, return, length, failure) per finished episode.
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
                    episodes.append({  # every value is logged under rollout/
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


def ppo_loss(agent: Agent, mb: dict[str, Any], critic_view: int, args: PPO) -> tuple[torch.Tensor, dict[str, float]]:
    """Loss and metrics of one shard of a minibatch, tensors (B, ...) by name.

    The critic learns from one view only, the scene or its mirror image: alternating teaches as much at half the cost.
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
    groups = [group["params"] for group in optimizer.param_groups]  # actor and critic
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
            if len(rows) > 1:
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
            shards = [
                part for part in zip(rows.tensor_split(SHARDS), mb_advantages.tensor_split(SHARDS)) if len(part[0])
            ]
            weights = [len(part) / len(rows) for part, _ in shards]
            results = list(pool.map(gradient, *zip(*shards), [epoch % b_x.shape[1]] * SHARDS))
            for parameter, *parts in zip(parameters, *(gradients for gradients, _ in results)):
                parameter.grad = sum(weight * part for weight, part in zip(weights, parts))
            # separately: the critic's large gradients would scale down the actor's
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
    metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
    metrics["residual_magnitude"] = float(b_actions.clamp(-1, 1).norm(dim=-1).mean())
    return metrics


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Train; returns the exit code."""
    args, saved = parse_run(Args, __doc__, SCRIPT, CHECKPOINT, check_args, one_rank=True)
    num_envs = saved["num_envs"] if saved else min(args.ppo.num_envs, args.total_timesteps)
    generator = World().seed(args.seed)  # of exploration and minibatches
    pool = ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))

    agent = Agent(args)
    critic = list(agent.critic.parameters())
    actor = [parameter for parameter in agent.parameters() if all(parameter is not other for other in critic)]
    rates = [args.ppo.learning_rate, args.ppo.critic_learning_rate]
    groups = [{"params": part, "lr": rate} for part, rate in zip((actor, critic), rates)]
    optimizer = Adam(groups, eps=1e-5, fused=True)
    envs, eval_envs = make_envs(args, num_envs), make_envs(args, args.run.eval_envs, evaluation=True)
    if saved:
        check_base(saved, args.base.base_policy, envs.base_policy, args.run.resume)
        load_weights(agent, saved["agent"], args.run.resume)
        with restoring(args.run.resume):
            (own,) = saved["ranks"]
            restore_optimizer(optimizer, saved["optimizer"])
            generator.set_state(own["generator"])
            envs.set_state(to_numpy(own["envs"]))
            next_obs, global_step = envs.observation, saved["global_step"]
    else:
        next_obs, _ = envs.reset(seed=training_seeds(args.seed, num_envs))
        global_step = 0
    next_full = envs.full_observation

    def checkpoint() -> dict[str, Any]:
        """What a resumed run needs: the mirror of the lines above."""
        own = {"generator": generator.get_state(), "envs": to_plain(envs.get_state())}
        return {
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "ranks": [own],
            "global_step": global_step, "num_envs": num_envs,
            "base_fingerprint": envs.base_policy.fingerprint if envs.base_policy else "",
        }  # fmt: skip

    with Recorder(SCRIPT, CHECKPOINT, args, agent, envs, eval_envs, checkpoint, saved) as recorder, pool:
        while args.total_timesteps - global_step >= num_envs and not recorder.stopped():
            if args.ppo.anneal_lr:
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * (1.0 - global_step / args.total_timesteps)
            num_steps = min(args.ppo.num_steps, (args.total_timesteps - global_step) // num_envs)
            buffers, next_obs, next_full, episodes = rollout(agent, envs, next_obs, next_full, num_steps, generator)
            metrics = update(agent, optimizer, buffers, args.ppo, generator, pool)
            global_step += num_steps * num_envs
            recorder.record(global_step, metrics, episodes)
        return recorder.finish()


if __name__ == "__main__":
    sys.exit(run_script(main))
