"""Residual PPO from pixels on the SO-101 "paper in square" task, in one file: sibling of ppo_residual_so101.py.

    python -m so101.ppo_rgb --total-timesteps 200000

The actor sees what a real arm has: camera pictures, joints, the gripper's tip, and the base policy's action. A network
of its own finds the sheet in the pictures; it learns the sheet's true pose, which the simulation knows. Actor and
critic are those of the sibling, the actor on what is found, the critic, which is used in training only, on the truth.
Top to bottom: Args, Agent, rollout, advantages, loss, update, learning to see, main. Where the two files agree, they
agree line by line.
A copy works like the original: `cp so101/ppo_rgb.py my_rgb.py`.
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

from so101.base import check_base
from so101.checkpoints import CHECKPOINT, load_weights, restore_optimizer, restoring, to_numpy, to_plain
from so101.cli import check_cameras, check_flags, run_script
from so101.distributed import World
from so101.evaluation import training_seeds
from so101.networks import (
    EXPECTED_YAW,
    MEASURED_DIM,
    POSE_SCALE,
    SHEET_TO_TIP,
    Features,
    SheetFinder,
    contact_features,
    scaled_measurements,
    scaled_pose,
)
from so101.optimizer import Adam
from so101.policies import load_policy
from so101.recorder import Recorder, Run
from so101.resume import parse_run
from so101.server import Server
from so101_env import (
    MAX_EPISODE_STEPS,
    OBSERVATION,
    TAPE_CENTER_M,
    SO101ResidualVectorEnv,
    Task,
    extra_parts,
    make_observation,
)
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
    """The algorithm, as in ppo_residual_so101.py, and how the actor learns to see."""

    num_envs: int = 32
    """parallel environments"""
    num_steps: int = 64
    """steps per environment and rollout"""
    minibatch_size: int = 512
    """samples per gradient step"""
    update_epochs: int = 8
    """passes over each rollout"""
    learning_rate: float = 3e-3
    """initial step size of Adam for actor and critic"""
    finder_epochs: int = 4
    """passes over each rollout in which the sheet's pose in the pictures is learned"""
    finder_learning_rate: float = 1e-3
    """initial step size of Adam for that"""
    anneal_lr: bool = True
    """anneal the learning rates linearly to zero"""
    gamma: float = 0.98
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalised advantage estimation"""
    clip_coef: float = 0.3
    """clipping range of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradient clipping by norm"""
    shaping: bool = True
    """add the potential-based shaping term to the rewards that PPO learns from; logged returns are unshaped"""
    train_episode_steps: int = 150
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Networks:
    """Actor and critic, and the network that finds the sheet."""

    actor_cameras: tuple[str, ...] = ("top",)
    """cameras of the actor: top, wrist"""
    actor_image_size: int = 64
    """side of the actor's pictures, pixels"""
    finder_size: int = 128
    """units in the hidden layers of the network that finds the sheet"""
    hidden_size: int = 128
    """units in each of the two hidden layers of actor and critic"""
    log_std_init: float = -0.3
    """initial log standard deviation of the exploration noise"""
    contact_gain: float = 3.0
    """factor of the features of contact: pressing beside the sheet and pressing on it ask for opposite actions"""


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
    "finder_epochs": (1, 1000), "finder_learning_rate": (1e-9, 10), "gamma": (0, 1), "gae_lambda": (0, 1),
    "clip_coef": (1e-6, 100), "ent_coef": (0, 100), "vf_coef": (0, 100), "max_grad_norm": (1e-6, 1e6),
    "train_episode_steps": (1, 10**6), "actor_image_size": (16, 512), "finder_size": (1, 4096),
    "hidden_size": (1, 4096), "log_std_init": (-10, 2), "contact_gain": (0, 100),
    **Task.RANGES, **Server.RANGES, **Run.RANGES,
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
    """Gaussian actor on an observation whose sheet is found in pictures, and critic on the true one.

    Both see x = features(obs), (B, views, F), and average over the views, as in ppo_residual_so101.py.
    """

    def __init__(self, args: Args):
        super().__init__()
        net, self.moves = args.networks, args.base.base_policy != "zero"
        width, size = net.hidden_size, net.actor_image_size
        self.cameras, self.image_size = net.actor_cameras, (size, size)
        self.finder = SheetFinder(len(net.actor_cameras), size, MEASURED_DIM, net.finder_size, latent=0)
        derived = [
            SHEET_TO_TIP,
            contact_features(net.contact_gain),
            *([EXPECTED_YAW] if args.task.arrival_yaw_weight > 0 else []),
        ]
        self.features = Features(OBSERVATION | extra_parts(args.task, self.moves), derived)

        def mlp(out_dim: int, out_std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(self.features.dim, width)), nn.ReLU(inplace=True),
                layer_init(nn.Linear(width, width)), nn.LayerNorm(width), nn.ReLU(inplace=True),
                layer_init(nn.Linear(width, out_dim), std=out_std),
            )  # fmt: skip

        # with a base policy to start from, the residual starts at exactly zero
        self.actor_mean = mlp(ACT_DIM, out_std=0.0 if self.moves else 0.01)
        self.actor_logstd = nn.Parameter(torch.full((1, ACT_DIM), net.log_std_init))
        self.critic = mlp(1, out_std=1.0)

    def observe(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """Observations (N, 25 or 31) of the environment's pictures and state, with the sheet where it is found."""
        state, images = obs["state"], [torch.from_numpy(obs[f"pixels_{camera}"]) for camera in self.cameras]
        with torch.no_grad():
            _, pose = self.finder(images, scaled_measurements(state))
        pose_m = pose.numpy() * POSE_SCALE + np.append(TAPE_CENTER_M, 0.0)
        found = make_observation(state[:, :6], state[:, 6:12], state[:, 12:MEASURED_DIM], pose_m)
        return np.concatenate([found, state[:, MEASURED_DIM:]], axis=1)  # the base policy's deltas come last

    def get_gaussian(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean action (B, 6), unclipped, and its log standard deviation (1, 6)."""
        mean = self.actor_mean(x.flatten(0, 1)).view(*x.shape[:2], ACT_DIM)
        return (mean * self.features.action_signs).mean(1), self.actor_logstd

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        """Value (B,) of the shaped reward."""
        return self.critic(x.flatten(0, 1)).view(x.shape[:2]).mean(1)

    def get_logprob(self, x: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density (B,) of unclipped actions (B, 6), and the entropy (1,) of the policy."""
        mean, logstd = self.get_gaussian(x)
        z = (action - mean) * torch.exp(-logstd)
        logprob = -0.5 * z.square().sum(-1) - logstd.sum(-1) - 0.5 * ACT_DIM * LOG_2PI
        return logprob, logstd.sum(-1) + 0.5 * ACT_DIM * (1.0 + LOG_2PI)

    @torch.inference_mode()
    def act(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        """The policy without exploration: residuals (N, 6) in [-1, 1]."""
        return self.get_gaussian(self.features(self.observe(obs)))[0].clamp(-1, 1).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def rollout(
    agent: Agent, envs: SO101ResidualVectorEnv, next_obs: dict[str, np.ndarray], noise: np.ndarray
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray], list[dict[str, float]]]:  # fmt: skip
    """Act with exploration: a step for each row of the standard normal noise (num_steps, num_envs, 6).

    Returns the buffers (num_steps, num_envs, ...), the next observation, and one dict (success, return, length,
    failure) per finished episode.
    """
    num_steps, n, dim = len(noise), envs.num_envs, agent.features.obs_mean.shape[0]
    pictures = {key: np.zeros((num_steps, *array.shape), array.dtype) for key, array in next_obs.items()}
    buffers = {
        "seen": np.zeros((num_steps, n, dim), np.float32),  # what the actor knows
        "obs": np.zeros((num_steps, n, dim), np.float32),  # what the critic knows
        "real_next_obs": np.zeros((num_steps, n, dim), np.float32),  # the final one where an episode ended
        "actions": np.zeros((num_steps, n, ACT_DIM), np.float32),  # unclipped
        "rewards": np.zeros((num_steps, n), np.float32),
        "terminations": np.zeros((num_steps, n), np.float32),
        "dones": np.zeros((num_steps, n), np.float32),  # terminated or truncated
    }

    def true(state: np.ndarray, full: np.ndarray) -> np.ndarray:
        return np.concatenate([full, state[:, MEASURED_DIM:]], axis=1)

    episodes, next_true = [], true(next_obs["state"], envs.full_observation)
    with torch.inference_mode():
        for step in range(num_steps):
            seen = agent.observe(next_obs)
            mean, logstd = agent.get_gaussian(agent.features(seen))
            action = mean.numpy() + noise[step] * logstd.exp().numpy()
            for key, array in pictures.items():
                array[step] = next_obs[key]
            buffers["seen"][step], buffers["obs"][step], buffers["actions"][step] = seen, next_true, action
            # the environment clips the action and adds it to that of the base policy
            next_obs, reward, terminations, truncations, infos = envs.step(action)
            next_true = true(next_obs["state"], infos["full_observation"])
            buffers["real_next_obs"][step], buffers["rewards"][step] = next_true, reward
            if "final_info" in infos:
                done, final = infos["_final_info"], infos["final_info"]
                buffers["terminations"][step], buffers["dones"][step] = terminations, done
                for i in np.flatnonzero(done):
                    last = infos["final_obs"][i]["state"]
                    buffers["real_next_obs"][step, i] = true(last[None], final["full_observation"][i][None])
                    episodes.append({  # every value is logged under rollout/
                        "success": float(final["is_success"][i]),
                        "return": float(final["episode_summary"]["return"][i]),
                        "length": float(final["episode_summary"]["length"][i]),
                        "failure": float(final["non_finite"][i] or final["out_of_reach"][i]),
                    })  # fmt: skip
    for name in ("seen", "obs", "real_next_obs", "rewards"):
        if not np.isfinite(buffers[name]).all():
            raise FloatingPointError(f"{name.replace('_', ' ')} of the environments")
    return {name: torch.from_numpy(array) for name, array in {**pictures, **buffers}.items()}, next_obs, episodes


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
    agent: Agent, mb_seen: torch.Tensor, mb_x: torch.Tensor, mb_actions: torch.Tensor, mb_logprobs: torch.Tensor,
    mb_advantages: torch.Tensor, mb_returns: torch.Tensor, args: PPO,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Loss and metrics of a minibatch: features (B, views, F) of what the actor sees, (B, 1, F) of the truth."""
    logprob, entropy = agent.get_logprob(mb_seen, mb_actions)
    logratio = logprob - mb_logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio).mean()
    v_loss = 0.5 * (agent.get_value(mb_x) - mb_returns).square().mean()
    entropy_loss = entropy.mean()
    loss = pg_loss - args.ent_coef * entropy_loss + args.vf_coef * v_loss
    with torch.no_grad():
        metrics = {
            "approx_kl": ((ratio - 1) - logratio).mean(),  # http://joschu.net/blog/kl-approx.html
            "clip_fraction": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
            "entropy_loss": -entropy_loss,
            "policy_gradient_loss": pg_loss,
            "value_loss": v_loss,
        }
    return loss, {key: value.detach() for key, value in metrics.items()}


def normalize(mb_advantages: torch.Tensor) -> torch.Tensor:
    """Advantages of a minibatch (B,) with mean 0 and standard deviation 1."""
    if len(mb_advantages) == 1:
        return mb_advantages
    return (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor], args: PPO,
    generator: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """Improve actor and critic on one rollout; returns the metrics averaged over all minibatches."""
    parameters, (num_steps, n) = optimizer.param_groups[0]["params"], buffers["rewards"].shape
    b_actions = buffers["actions"].flatten(0, 1)
    with torch.no_grad():
        b_seen, b_x = (agent.features(buffers[name].flatten(0, 1).numpy()) for name in ("seen", "obs"))
        b_logprobs, _ = agent.get_logprob(b_seen, b_actions)
        # the next observation is that of the next row, but where an episode or the rollout ends
        ends = buffers["dones"].bool()
        ends[-1] = True
        end_x = agent.features(buffers["real_next_obs"][ends].numpy())

    # minibatches of equal size, at most minibatch_size: a shortened rollout leaves no tiny rest
    num_minibatches, history = -(-len(b_x) // args.minibatch_size), []
    for epoch in range(args.update_epochs):
        with torch.no_grad():
            values = agent.get_value(b_x).view(num_steps, n)
            real_next_values = values.roll(-1, 0)
            real_next_values[ends] = agent.get_value(end_x)
            b_advantages = compute_gae(
                buffers["rewards"], values, real_next_values, buffers["terminations"], buffers["dones"],
                args.gamma, args.gae_lambda,
            ).flatten()  # fmt: skip
        b_returns, view = b_advantages + values.flatten(), epoch % b_x.shape[1]
        if epoch == 0:
            explained = 1 - b_advantages.var(correction=0) / b_returns.var(correction=0)
        for mb in torch.randperm(len(b_x), generator=generator).tensor_split(num_minibatches):
            loss, metrics = ppo_loss(
                agent, b_seen[mb], b_x[mb, view : view + 1], b_actions[mb], b_logprobs[mb],
                normalize(b_advantages[mb]), b_returns[mb], args,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            history.append(metrics)
            if not torch.isfinite(loss):
                raise FloatingPointError("loss (" + ", ".join(f"{k} {v:.3g}" for k, v in metrics.items()) + ")")
            if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)):
                raise FloatingPointError("gradient")
            optimizer.step()
    metrics = {key: float(torch.stack([each[key] for each in history]).mean()) for key in history[0]}
    metrics["explained_variance"] = float(explained) if torch.isfinite(explained) else 0.0
    metrics["residual_magnitude"] = float(b_actions.clamp(-1, 1).norm(dim=-1).mean())
    metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
    return metrics


def learn_to_see(
    agent: Agent, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor], args: PPO,
    generator: torch.Generator, pool: ThreadPoolExecutor,
) -> dict[str, float]:  # fmt: skip
    """Fit the finder to the true poses of one rollout; returns its mean errors."""
    b_images = [buffers[f"pixels_{camera}"].flatten(0, 1) for camera in agent.cameras]
    b_measured = scaled_measurements(buffers["state"].flatten(0, 1).numpy())
    b_pose = torch.from_numpy(scaled_pose(buffers["obs"].flatten(0, 1).numpy()))
    parameters = list(agent.finder.parameters())

    def gradient(rows: torch.Tensor) -> tuple[Any, torch.Tensor]:
        _, pose = agent.finder([images[rows] for images in b_images], b_measured[rows])
        error = (pose - b_pose[rows]).abs()
        return torch.autograd.grad(error.mean(), parameters), error.detach()

    num_minibatches, errors = -(-len(b_pose) // args.minibatch_size), []
    for _ in range(args.finder_epochs):
        for rows in torch.randperm(len(b_pose), generator=generator).tensor_split(num_minibatches):
            shards = [part for part in rows.tensor_split(SHARDS) if len(part)]
            results = list(pool.map(gradient, shards))
            for parameter, *parts in zip(parameters, *(gradients for gradients, _ in results)):
                parameter.grad = sum(len(shard) / len(rows) * part for shard, part in zip(shards, parts))
            if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)):
                raise FloatingPointError("gradient of the finder")
            optimizer.step()
            errors += [error for _, error in results]
    if not all(torch.isfinite(parameter).all() for parameter in agent.parameters()):
        raise FloatingPointError("weights")
    error = torch.cat(errors) * agent.finder.pose_scale
    return {"position_error_m": float(error[:, :2].norm(dim=1).mean()), "yaw_error_rad": float(error[:, 2].mean())}


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Train; returns the exit code."""
    args, saved = parse_run(Args, __doc__, SCRIPT, CHECKPOINT, check_args, one_rank=True)
    num_envs = saved["num_envs"] if saved else min(args.ppo.num_envs, args.total_timesteps)
    generator = World().seed(args.seed)  # for exploration and minibatches
    pool = ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))

    agent = Agent(args)
    rates = {"policy": args.ppo.learning_rate, "finder": args.ppo.finder_learning_rate}
    parts = {"policy": [*agent.actor_mean.parameters(), agent.actor_logstd, *agent.critic.parameters()]}
    parts["finder"] = [*agent.finder.parameters()]
    optimizers = {name: Adam(part, lr=rates[name], eps=1e-5, fused=True) for name, part in parts.items()}
    envs, eval_envs = make_envs(args, num_envs), make_envs(args, args.run.eval_envs, evaluation=True)
    if saved:
        check_base(saved, args.base.base_policy, envs.base_policy, args.run.resume)
        load_weights(agent, saved["agent"], args.run.resume)
        with restoring(args.run.resume):
            (own,) = saved["ranks"]
            for name, optimizer in optimizers.items():
                restore_optimizer(optimizer, saved["optimizer"][name], saved["global_step"] > 0)
            generator.set_state(own["generator"])
            envs.set_state(to_numpy(own["envs"]))
            next_obs, global_step = envs.observation, saved["global_step"]
    else:
        next_obs, _ = envs.reset(seed=training_seeds(args.seed, num_envs))
        global_step = 0

    def checkpoint() -> dict[str, Any]:
        """What a resumed run needs: the mirror of the lines above."""
        own = {"generator": generator.get_state(), "envs": to_plain(envs.get_state())}
        return {
            "agent": agent.state_dict(), "ranks": [own], "global_step": global_step,
            "optimizer": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}, "num_envs": num_envs,
            "base_fingerprint": envs.base_policy.fingerprint if envs.base_policy else "",
        }  # fmt: skip

    with Recorder(SCRIPT, CHECKPOINT, args, agent, envs, eval_envs, checkpoint, saved) as recorder, pool:
        while args.total_timesteps - global_step >= num_envs and not recorder.stopped():
            if args.ppo.anneal_lr:
                for name, optimizer in optimizers.items():
                    optimizer.param_groups[0]["lr"] = rates[name] * (1.0 - global_step / args.total_timesteps)
            num_steps = min(args.ppo.num_steps, (args.total_timesteps - global_step) // num_envs)
            noise = torch.randn(num_steps, num_envs, ACT_DIM, generator=generator).numpy()
            buffers, next_obs, episodes = rollout(agent, envs, next_obs, noise)
            metrics = update(agent, optimizers["policy"], buffers, args.ppo, generator)
            metrics |= learn_to_see(agent, optimizers["finder"], buffers, args.ppo, generator, pool)
            global_step += num_steps * num_envs
            recorder.record(global_step, metrics, episodes)
        return recorder.finish()


if __name__ == "__main__":
    sys.exit(run_script(main))
