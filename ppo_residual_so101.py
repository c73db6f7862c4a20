"""Residual PPO on the SO-101 "paper in square" task, in one file: fork it and change it.

    python ppo_residual_so101.py --total-timesteps 50000

The policy's action is a residual that corrects a base policy (default: zero). Layout, top to bottom: Args, Agent,
rollout, advantages, update, evaluation, checkpoints, main.
"""

import copy
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from so101_base_policies import make_base_policy
from so101_env import (
    ACT_DIM,
    HOME_RAD,
    JOINTS,
    MAX_EPISODE_STEPS,
    OBS_DIM,
    SHAPING_INSET_M,
    SHEET_HALF_M,
    TAPE_CENTER_M,
    BasePolicy,
    BasePolicyError,
    DomainRandomization,
    SO101ResidualVectorEnv,
    arrival_yaw,
)

LOG_2PI = float(np.log(2 * np.pi))
FORMAT = "ppo_residual_so101 checkpoint 5"
# Episodes of training, of the evaluations during training, of demonstrations, and of eval_so101.py never share a seed:
# the best model is chosen on the second, and reported on the last.
VALIDATION_SEED, RECORD_SEED, TEST_SEED = 1_000_000_000, 1_400_000_000, 2_000_000_000


@dataclasses.dataclass
class Args:
    seed: int = 1
    """seed of everything: weights, exploration, minibatches, environments"""
    total_timesteps: int = 50_000
    """environment steps in all; never exceeded"""
    num_envs: int = 32
    """environments simulated side by side"""
    num_steps: int = 64
    """steps per environment and rollout"""
    minibatch_size: int = 512
    """samples per gradient step"""
    update_epochs: int = 5
    """passes over each rollout"""
    learning_rate: float = 5e-3
    """step size of Adam at the start"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
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
    max_grad_norm: float = 0.5
    """gradients are scaled down to this norm"""
    norm_adv: bool = True
    """normalise advantages per minibatch"""
    log_std_init: float = -0.3
    """log standard deviation of the exploration noise at the start"""
    symmetry: bool = True
    """average actor and critic over the scene and its left-right mirror image"""
    sheet_feature: bool = True
    """show the networks the vector from the sheet's nearest point to the tip, computed from the observation"""
    arrival_yaw_weight: float = 0.0
    """m per rad, in the shaping, of the yaw that a straight drag from here would end with, which the networks then see,
    too; 0: the present yaw counts 0.05"""
    activation: Literal["relu", "tanh"] = "relu"
    """of the hidden layers"""
    hidden_size: int = 64
    """units in each of the two hidden layers"""
    layer_norm: bool = True
    """layer normalisation in the second hidden layer: it learns from larger steps"""
    train_episode_steps: int = 150
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""
    reward_scale: float = 1.0
    """factor on the rewards that PPO learns from; logged returns are unscaled"""
    shaping: bool = True
    """add the potential-based shaping term to the rewards that PPO learns from; logged returns are unshaped"""

    base_policy: str = "zero"
    """policy that the residual corrects: zero, jacobian (a scripted pusher), checkpoint:PATH or bc:PATH"""
    observe_base: bool = False
    """append the base policy's action to the observation: 31 numbers instead of 25"""
    critic_warmup_steps: int = 0
    """steps at the start in which only the critic learns"""
    progressive_steps: int = 0
    """let the share of steps in which the residual acts grow from 0 to 1 over this many steps; 0: it always acts"""
    alpha: float = 0.7
    """share of act_scale that the residual commands, in [0, 1]"""
    act_scale: float = 0.02
    """joint delta in rad of a full residual at alpha 1"""
    residual_penalty: float = 0.001
    """reward lost per squared norm of the residual"""
    tape_margin: float = 0.04
    """m between sheet and tape on every side: 0.04 standard, 0.02 precise"""
    randomize: bool = True
    """domain randomisation: friction of table and fingertips"""
    full_randomization: bool = False
    """randomise sheet mass, servo gain and damping, latency, joint offsets and observation noise, too"""

    log_dir: str = "logs"
    """directory that gets one directory per run"""
    num_threads: int | None = None
    """physics threads (default: every core); the results do not depend on it"""
    checkpoint_every: int = 10_000
    """steps between checkpoints"""
    eval_every: int = 10_000
    """steps between evaluations, which also choose the best model; 0 for none"""
    eval_episodes: int = 16
    """episodes per evaluation, on fixed held-out seeds; 16 take about a fifth of the time of a default run"""
    resume: str | None = None
    """checkpoint to continue, to the bit, with the settings it was started with"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project_name: str = "ppo-residual-so101"
    """project of --track"""
    capture_video: bool = False
    """save a video of the first episode of every evaluation"""

    batch_size: Annotated[int, tyro.conf.Suppress] = 0
    """num_envs * num_steps, filled in at run time"""


def fail(message: str) -> NoReturn:
    """End the program for a mistake of the user: one line on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args: Args) -> Args:
    """Fill in the run-time fields; fail with the name of the first flag that is out of range."""
    positive = (
        "total_timesteps num_envs num_steps minibatch_size update_epochs learning_rate max_grad_norm hidden_size "
    )
    positive += "train_episode_steps reward_scale act_scale tape_margin checkpoint_every eval_episodes num_threads"
    for name in positive.split():
        value = getattr(args, name)
        if value is not None and not value > 0:
            fail(f"--{name.replace('_', '-')} must be positive, got {value}")
    not_negative = "ent_coef vf_coef clip_coef residual_penalty eval_every critic_warmup_steps progressive_steps "
    for name in (not_negative + "arrival_yaw_weight seed").split():
        if not getattr(args, name) >= 0:
            fail(f"--{name.replace('_', '-')} must not be negative, got {getattr(args, name)}")
    for name in "alpha gamma gae_lambda".split():
        if not 0 <= getattr(args, name) <= 1:
            fail(f"--{name.replace('_', '-')} must be in [0, 1], got {getattr(args, name)}")
    if args.tape_margin > 0.1:
        fail(f"--tape-margin is in metres and at most 0.1, got {args.tape_margin}")
    if args.full_randomization and not args.randomize:
        fail("--full-randomization contradicts --no-randomize: drop one of them")
    # a budget below one rollout shortens the rollout, and below num_envs takes fewer environments
    args.batch_size = args.num_envs * args.num_steps
    if args.minibatch_size > args.batch_size:
        fail(
            f"--minibatch-size {args.minibatch_size} exceeds a rollout of num_envs * num_steps = {args.batch_size} "
            "samples: lower it or raise --num-steps"
        )
    for name in ("observe_base", "progressive_steps"):
        if getattr(args, name) and args.base_policy == "zero":
            fail(f"--{name.replace('_', '-')} needs a base policy: name one with --base-policy")
    return args


def load_base_policy(spec: str) -> BasePolicy | None:
    """The base policy of a command line; fail with one line if there is none."""
    try:
        return make_base_policy(spec)
    except BasePolicyError as error:
        fail(f"--base-policy {spec}: {error}")


def make_envs(
    args: Args, num_envs: int, autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP
) -> SO101ResidualVectorEnv:
    """The task as args describe it. SAME_STEP autoreset to train, DISABLED to evaluate."""
    return SO101ResidualVectorEnv(
        num_envs,
        base_policy=load_base_policy(args.base_policy),
        alpha=args.alpha,
        act_scale=args.act_scale,
        residual_penalty=args.residual_penalty,
        randomize=args.randomize,
        randomization=DomainRandomization.full() if args.full_randomization else None,
        tape_margin=args.tape_margin,
        max_episode_steps=args.train_episode_steps if autoreset_mode == AutoresetMode.SAME_STEP else MAX_EPISODE_STEPS,
        shaping_gamma=args.gamma if args.shaping else None,
        num_threads=args.num_threads,
        autoreset_mode=autoreset_mode,
        observe_base=args.observe_base,
        arrival_yaw_weight=args.arrival_yaw_weight,
    )


# ---------------------------------------------------------------------------------------------------------------------
# agent


def layer_init(layer: nn.Linear, std: float = np.sqrt(2)) -> nn.Linear:
    """Orthogonal weights of gain std, zero bias."""
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class Agent(nn.Module):
    """Gaussian actor and critic on observations normalised by fixed, known scales (kept in the state_dict).

    The networks see `features(obs)`, computed once per observation; (B, views, F) below stands for those.
    """

    def __init__(self, args: Args):
        super().__init__()
        self.sheet_feature, self.arrival_yaw = args.sheet_feature, args.arrival_yaw_weight > 0.0
        obs_dim, width = OBS_DIM + ACT_DIM * args.observe_base, args.hidden_size
        in_dim = obs_dim + 2 * args.sheet_feature + 3 * self.arrival_yaw
        activation = {"relu": lambda: nn.ReLU(inplace=True), "tanh": nn.Tanh}[args.activation]

        def mlp(out_dim: int, out_std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(in_dim, width)), activation(), layer_init(nn.Linear(width, width)),
                nn.LayerNorm(width) if args.layer_norm else nn.Identity(), activation(),
                layer_init(nn.Linear(width, out_dim), std=out_std),
            )  # fmt: skip

        # with a base policy to start from, the residual starts at exactly zero
        self.actor_mean = mlp(ACT_DIM, out_std=0.01 if args.base_policy == "zero" else 0.0)
        self.actor_logstd = nn.Parameter(torch.full((1, ACT_DIM), args.log_std_init))
        self.critic = mlp(1, out_std=1.0)
        mean, scale = np.zeros(obs_dim), np.full(obs_dim, 0.1)  # 0.1 m, 0.1 in quaternion components
        mean[0:6], scale[0:6] = HOME_RAD, 0.3
        scale[6:12] = 0.5
        mean[12:14] = mean[22:24] = TAPE_CENTER_M
        mean[15] = 1.0
        mean[24], scale[24] = 0.015, 0.02  # millimetres of tip height decide about contact
        scale[OBS_DIM:] = 0.02  # rad
        self.register_buffer("obs_mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("obs_scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("sheet_half", torch.tensor(SHEET_HALF_M - SHAPING_INSET_M, dtype=torch.float32))
        # the mirror image flips pan, roll, their velocities, y of sheet, goal and tip, and the rotations about x and z
        feature_mirror, action_mirror = torch.ones(in_dim), torch.ones(ACT_DIM)
        feature_mirror[[0, 4, 6, 10, 13, 16, 18, 20, 23]] = -1.0
        if args.observe_base:
            feature_mirror[[OBS_DIM, OBS_DIM + 4]] = -1.0
        if args.sheet_feature:
            feature_mirror[obs_dim + 1] = -1.0
        if self.arrival_yaw:
            feature_mirror[[-3, -2]] = -1.0
        action_mirror[[0, 4]] = -1.0
        views = 1 + args.symmetry  # as it is, and mirrored
        self.register_buffer("feature_signs", torch.stack([torch.ones(in_dim), feature_mirror])[:views])
        self.register_buffer("action_signs", torch.stack([torch.ones(ACT_DIM), action_mirror])[:views])

    def features(self, obs: np.ndarray) -> torch.Tensor:
        """What the networks see of observations (B, 25 or 31): (B, views, F), the scene and, with symmetry, its mirror.

        In NumPy, whose calls cost a third of PyTorch's on the few rows of a step.
        """
        x = np.empty((len(obs), self.feature_signs.shape[1]), np.float32)
        scaled = (obs - self.obs_mean.numpy()) / self.obs_scale.numpy()
        x[:, : obs.shape[1]] = np.minimum(np.maximum(scaled, -10.0), 10.0)
        if self.sheet_feature:
            # from the sheet's nearest point to the tip, in the sheet's axes, zero over it: whether to press or to go
            # there first. The networks can hardly make it themselves of a yaw and two positions in so few steps.
            # In the plane, vectors are complex numbers, and (quaternion w + i quaternion z)^2 turns them by the yaw.
            half_turn = np.ascontiguousarray(obs[:, 15:19:3]).view(np.complex64)
            tip = ((obs[:, 22:24] - obs[:, 12:14]).view(np.complex64) / (half_turn * half_turn)).view(np.float32)
            half = self.sheet_half.numpy()
            start = obs.shape[1]
            x[:, start : start + 2] = (tip - np.minimum(np.maximum(tip, -half), half)) / np.float32(0.03)
        if self.arrival_yaw:
            # the yaw to expect, and its product with the way: across the way, that is where the tip should press
            end = arrival_yaw(obs[:, 22:24], obs[:, 12:14], 2.0 * np.arctan2(obs[:, 18], obs[:, 15]))
            x[:, -3], x[:, -2:] = end / 0.1, end[:, None] * obs[:, 19:21] / 0.01
        return torch.from_numpy(x[:, None] * self.feature_signs.numpy())

    def get_mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean action (B, 6), unclipped, of features (B, views, F)."""
        return (self.actor_mean(x.flatten(0, 1)).view(len(x), -1, ACT_DIM) * self.action_signs).mean(1)

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        """Value of the scaled, shaped reward (B,), of features (B, views, F)."""
        return self.critic(x.flatten(0, 1)).view(len(x), -1).mean(1)

    def get_logprob(self, x: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Log-density (B,) of unclipped actions (B, 6) under the Gaussian policy, given features (B, views, F)."""
        z = (action - self.get_mean(x)) * torch.exp(-self.actor_logstd)
        return -0.5 * z.square().sum(-1) - self.actor_logstd.sum() - 0.5 * ACT_DIM * LOG_2PI

    def get_entropy(self) -> torch.Tensor:
        """Entropy of the Gaussian policy, a scalar: it does not depend on the observation."""
        return self.actor_logstd.sum() + 0.5 * ACT_DIM * (1.0 + LOG_2PI)


def flatten_parameters(agent: Agent) -> nn.Parameter:
    """Turn all parameters and their gradients into views of one vector, and return that.

    To clip and step one vector instead of 17 small tensors saves a fifth of the time of an update. Gradients must be
    set to zero, not to None, or they stop being views.
    """
    parameters = list(agent.parameters())
    flat = nn.Parameter(torch.cat([p.data.flatten() for p in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [p.numel() for p in parameters]
    for p, data, grad in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes)):
        p.data, p.grad = data.view_as(p), grad.view_as(p)
    return flat


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def rollout(
    agent: Agent, envs: SO101ResidualVectorEnv, next_obs: np.ndarray, num_steps: int, generator: torch.Generator,
    residual_share: float = 1.0,
) -> tuple[dict[str, torch.Tensor], np.ndarray, list[dict[str, float]]]:  # fmt: skip
    """Act for num_steps with exploration, in a random residual_share of the steps, and leave the others to the base.

    Returns the buffers (num_steps, num_envs, ...), the next observation (num_envs, 25 or 31), and one dict (success,
    return, length, failure) per finished episode.
    """
    n, obs_dim = next_obs.shape
    buffers = {
        "obs": np.zeros((num_steps, n, obs_dim), np.float32),
        "real_next_obs": np.zeros((num_steps, n, obs_dim), np.float32),  # the final one where an episode ended
        "actions": np.zeros((num_steps, n, ACT_DIM), np.float32),  # unclipped
        "rewards": np.zeros((num_steps, n), np.float32),
        "terminations": np.zeros((num_steps, n), np.float32),
        "dones": np.zeros((num_steps, n), np.float32),  # terminated or truncated
    }
    if residual_share < 1.0:
        acts = torch.rand(num_steps, n, generator=generator) < residual_share
        buffers["acts"] = acts.numpy().astype(np.float32)  # whether the residual acted
    episodes = []
    noise = torch.randn(num_steps, n, ACT_DIM, generator=generator)
    with torch.inference_mode():
        noise = (noise * agent.actor_logstd.exp()).numpy()
        for step in range(num_steps):
            action = agent.get_mean(agent.features(next_obs)).numpy() + noise[step]
            buffers["obs"][step], buffers["actions"][step] = next_obs, action
            if residual_share < 1.0:
                action = action * buffers["acts"][step][:, None]
            next_obs, reward, terminations, truncations, infos = envs.step(action)  # which clips it
            buffers["real_next_obs"][step], buffers["rewards"][step] = next_obs, reward
            if "final_info" in infos:
                done, final = infos["_final_info"], infos["final_info"]
                buffers["real_next_obs"][step][done] = infos["final_obs"][done]
                buffers["terminations"][step], buffers["dones"][step] = terminations, done
                for i in np.flatnonzero(done):
                    failed = final["non_finite"][i] or final["out_of_reach"][i]
                    r, length = final["episode"]["r"][i], final["episode"]["l"][i]
                    episode = {"success": final["is_success"][i], "return": r, "length": length, "failure": failed}
                    episodes.append({key: float(value) for key, value in episode.items()})
    for name in ("obs", "real_next_obs", "rewards"):
        if not np.isfinite(buffers[name]).all():
            raise FloatingPointError(f"{name.replace('_', ' ')} of the environments")
    return {name: torch.from_numpy(array) for name, array in buffers.items()}, next_obs, episodes


def compute_gae(
    rewards: torch.Tensor, values: torch.Tensor, real_next_values: torch.Tensor,
    terminations: torch.Tensor, dones: torch.Tensor, gamma: float, gae_lambda: float,
) -> torch.Tensor:  # fmt: skip
    """Advantages (num_steps, num_envs), all arguments likewise.

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
    agent: Agent, mb_x: torch.Tensor, critic_view: int, mb_actions: torch.Tensor, mb_logprobs: torch.Tensor,
    mb_advantages: torch.Tensor, mb_returns: torch.Tensor, args: Args, mb_acts: torch.Tensor | None = None,
    critic_only: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Loss of one minibatch and the metrics to log; (B, ...) each.

    The critic learns from one view only, the scene or its mirror image: taking turns teaches as much, at half the cost.
    The actor learns from the steps in which it acted, those with mb_acts 1; None for all.
    """
    logratio = agent.get_logprob(mb_x, mb_actions) - mb_logprobs
    ratio = logratio.exp()
    if args.norm_adv and len(mb_advantages) > 1:
        mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_losses = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio)
    pg_loss = pg_losses.mean() if mb_acts is None else (pg_losses * mb_acts).sum() / mb_acts.sum().clamp(min=1.0)
    v_loss = 0.5 * (agent.get_value(mb_x[:, critic_view : critic_view + 1]) - mb_returns).square().mean()
    entropy_loss = agent.get_entropy()
    loss = (not critic_only) * (pg_loss - args.ent_coef * entropy_loss) + args.vf_coef * v_loss
    with torch.no_grad():
        metrics = {
            "approx_kl": ((ratio - 1) - logratio).mean(),  # http://joschu.net/blog/kl-approx.html
            "clip_fraction": ((ratio - 1.0).abs() > args.clip_coef).float().mean(),
            "entropy_loss": -entropy_loss.detach(),
            "policy_gradient_loss": pg_loss.detach(),
            "value_loss": v_loss.detach(),
        }
    return loss, metrics


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor], args: Args,
    generator: torch.Generator, critic_only: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Improve the agent, or only its critic, on one rollout; returns the metrics averaged over all minibatches."""
    num_steps, n = buffers["rewards"].shape
    b_actions = buffers["actions"].flatten(0, 1)
    with torch.no_grad():
        # values and log-probabilities of the whole rollout at once: while acting, only the mean action was needed
        b_x = agent.features(buffers["obs"].flatten(0, 1).numpy())  # (num_steps * num_envs, views, F)
        b_values = agent.get_value(b_x)
        b_logprobs = agent.get_logprob(b_x, b_actions)
        real_next_x = agent.features(buffers["real_next_obs"].flatten(0, 1).numpy())
        real_next_values = agent.get_value(real_next_x).view(num_steps, n)
        advantages = compute_gae(
            buffers["rewards"] * args.reward_scale, b_values.view(num_steps, n), real_next_values,
            buffers["terminations"], buffers["dones"], args.gamma, args.gae_lambda,
        )  # fmt: skip
    b_advantages = advantages.flatten()
    b_returns = b_advantages + b_values
    tensors = [b_x, b_actions, b_logprobs, b_advantages, b_returns]
    if "acts" in buffers:
        tensors.append(buffers["acts"].flatten())

    # minibatches of equal size, at most minibatch_size: a shortened rollout leaves no tiny rest
    num_minibatches = -(-len(b_x) // args.minibatch_size)
    sums: dict[str, torch.Tensor] = {}
    for epoch in range(args.update_epochs):
        order = torch.randperm(len(b_x), generator=generator)
        shuffled = [b[order].tensor_split(num_minibatches) for b in tensors]
        for mb_x, mb_actions, mb_logprobs, mb_advantages, mb_returns, *mb_acts in zip(*shuffled):
            view = epoch % b_x.shape[1]
            loss, metrics = ppo_loss(
                agent, mb_x, view, mb_actions, mb_logprobs, mb_advantages, mb_returns, args, *mb_acts,
                critic_only=critic_only,
            )  # fmt: skip
            if not torch.isfinite(loss):
                raise FloatingPointError("loss (" + ", ".join(f"{k} {v:.3g}" for k, v in metrics.items()) + ")")
            optimizer.zero_grad(set_to_none=False)  # see flatten_parameters
            loss.backward()
            if not torch.isfinite(nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)):
                raise FloatingPointError("gradient")
            optimizer.step()
            sums = {key: sums.get(key, 0.0) + value for key, value in metrics.items()}
    count = args.update_epochs * num_minibatches
    metrics = {key: float(value) / count for key, value in sums.items()}
    variance = b_returns.var(correction=0)
    metrics["explained_variance"] = float(1 - (b_returns - b_values).var(correction=0) / variance) if variance else 0.0
    metrics["residual_magnitude"] = float(b_actions.clamp(-1, 1).norm(dim=-1).mean())
    return metrics


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


def evaluate(
    act: Callable[[np.ndarray], np.ndarray], envs: SO101ResidualVectorEnv, seeds: list[int], trace: bool = False,
    qpos: np.ndarray | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One episode per seed, batched; envs have DISABLED autoreset.

    Args:
        act: residuals (num_envs, 6) for observations (num_envs, 25).
        trace: keep every state as "qpos" (length + 1, 10), the start included, every observation "obs" (length, 25)
            and the joint targets commanded then, "command" (length, 6), rad.
        qpos: (num_envs, 10) positions to start from instead of drawn ones.

    Returns:
        A dict per seed, in order: seed, success, return, length, final_distance_m, final_yaw_error_rad,
        residual_magnitude, failure ("", "non_finite" or "out_of_reach"), initial_distance_m, initial_yaw_rad; with a
        base policy also base_delta_rad and residual_delta_rad, the episode's mean absolute values per joint.
    """
    episodes: list[dict[str, Any]] = []
    for start in range(0, len(seeds), envs.num_envs):
        chunk = seeds[start : start + envs.num_envs]
        mask = np.arange(envs.num_envs) < len(chunk)
        padded = chunk + [0] * (envs.num_envs - len(chunk))
        obs, _ = envs.reset(seed=padded, options={"reset_mask": mask, "qpos": qpos})
        results: list[dict[str, Any]] = [{} for _ in chunk]
        running, states, observations, commands = mask.copy(), [envs.qpos], [], []
        deltas = np.zeros((2, envs.num_envs, ACT_DIM))  # sums of what base and residual moved the targets, rad
        initial_distance = np.linalg.norm(obs[:, 19:21], axis=1)
        initial_yaw = 2.0 * np.arctan2(obs[:, 18], obs[:, 15])
        while running.any():
            action = act(obs)
            if trace:
                observations.append(obs[:, :OBS_DIM])
            obs, _, terminated, truncated, infos = envs.step(action)
            if trace:
                states.append(envs.qpos)
                commands.append(envs.command)
            if envs.base_policy is not None:
                residual_delta = envs.alpha * envs.act_scale * np.clip(action, -1, 1)
                deltas += np.abs([infos["base_delta_rad"], residual_delta])
            for i in np.flatnonzero(running & (terminated | truncated)):
                running[i] = False
                episode = infos["episode"]
                results[i] = {
                    "seed": chunk[i],
                    "success": bool(infos["is_success"][i]),
                    "return": float(episode["r"][i]),
                    "length": int(episode["l"][i]),
                    "final_distance_m": float(infos["distance_m"][i]),
                    "final_yaw_error_rad": float(infos["yaw_error_rad"][i]),
                    "residual_magnitude": float(episode["residual_magnitude"][i]),
                    "failure": next((k for k in ("non_finite", "out_of_reach") if infos[k][i]), ""),
                    "initial_distance_m": float(initial_distance[i]),
                    "initial_yaw_rad": float(initial_yaw[i]),
                }
                if envs.base_policy is not None:
                    means = deltas[:, i] / results[i]["length"]
                    results[i] |= {"base_delta_rad": means[0].tolist(), "residual_delta_rad": means[1].tolist()}
                if trace:
                    trajectories = {"qpos": states, "obs": observations, "command": commands}
                    results[i] |= {key: np.array([row[i] for row in rows]) for key, rows in trajectories.items()}
        episodes += results
    return episodes


def mean_action(agent: Agent) -> Callable[[np.ndarray], np.ndarray]:
    """The deterministic policy of an agent: observations (N, 25) to residuals (N, 6)."""

    def act(obs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return agent.get_mean(agent.features(obs)).clamp(-1, 1).numpy()

    return act


def no_residual(obs: np.ndarray) -> np.ndarray:
    """The base policy alone: residuals (N, 6) of zero."""
    return np.zeros((len(obs), ACT_DIM), np.float32)


def residual_to_base(episodes: list[dict[str, Any]]) -> dict[str, float]:
    """Residual relative to the base action: ratio of mean absolute values, for the joints that the base moves."""
    if "base_delta_rad" not in episodes[0]:
        return {}
    base, residual = (
        np.average([e[key] for e in episodes], axis=0, weights=[e["length"] for e in episodes])
        for key in ("base_delta_rad", "residual_delta_rad")
    )
    return {joint: float(r / b) for joint, b, r in zip(JOINTS, base, residual) if b > 1e-9}


def check_rendering(envs: SO101ResidualVectorEnv, flag: str) -> None:
    """Fail, naming the flag, if this machine cannot render off screen."""
    try:
        envs.render_state(envs.qpos[0])
    except RuntimeError as error:
        fail(f"{flag}: {error}")


def write_video(envs: SO101ResidualVectorEnv, episodes: list[dict[str, Any]], path: Path) -> None:
    """Film traced episodes, one after the other: MP4 in real time, or a small GIF of every third frame."""
    import imageio.v2 as imageio

    qpos, fps = np.concatenate([episode["qpos"] for episode in episodes]), envs.metadata["render_fps"]
    if path.suffix == ".gif":
        with imageio.get_writer(path, duration=3000 / fps, loop=0) as writer:
            for state in qpos[::3]:
                writer.append_data(envs.render_state(state)[::2, ::2])
    else:
        with imageio.get_writer(path, fps=fps, macro_block_size=1) as writer:
            for state in qpos:
                writer.append_data(envs.render_state(state))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def to_plain(value: Any) -> Any:
    """Arrays as tensors, all the way down, so that a checkpoint loads with weights_only=True."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def to_numpy(value: Any) -> Any:
    """The way back of to_plain."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    return value.numpy() if isinstance(value, torch.Tensor) else value


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Write beside path, flush to disk, then rename: whoever kills the process, path is complete or absent."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save tensors and plain values."""
    write_atomically(path, lambda temporary: torch.save(checkpoint, temporary))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Save as indented JSON."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))


def load_file(path: str, flag: str, expected_format: str) -> dict[str, Any]:
    """Read a file of save_checkpoint; fail with one line if it is missing, truncated or of another format."""
    script, kind, _ = expected_format.split()
    if not Path(path).is_file():
        fail(f"{flag} {path}: no such file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file; each ends the program here
        fail(f"{flag} {path}: not a readable {kind}, perhaps truncated ({type(error).__name__}); take another one")
    if not isinstance(saved, dict) or saved.get("format") != expected_format:
        fail(f"{flag} {path}: not a {kind} of {script}.py (this version reads {expected_format!r})")
    return saved


def load_checkpoint(path: str, flag: str) -> dict[str, Any]:
    """Read a checkpoint; fail with one line if it cannot be read, or is of another observation size."""
    checkpoint = load_file(path, flag, FORMAT)
    obs_dim = OBS_DIM + ACT_DIM * checkpoint["args"]["observe_base"]
    if (checkpoint["obs_dim"], checkpoint["act_dim"]) != (obs_dim, ACT_DIM):
        sizes = f"{checkpoint['obs_dim']} observations and {checkpoint['act_dim']} actions"
        fail(f"{flag} {path}: made for {sizes}, the environment has {obs_dim} and {ACT_DIM}")
    return checkpoint


def check_base(checkpoint: dict[str, Any], base_policy: BasePolicy | None, flag: str) -> None:
    """Fail if a checkpoint's base policy is no longer the one its residual was trained on."""
    fingerprint = base_policy.fingerprint if base_policy else ""
    if fingerprint != checkpoint["base_fingerprint"]:
        fail(
            f"{flag}: trained on base policy {checkpoint['args']['base_policy']} with weights "
            f"{checkpoint['base_fingerprint'][:12]}, that file now has {fingerprint[:12]}; put the old one back"
        )


def checkpoint_args(checkpoint: dict[str, Any]) -> Args:
    """The settings a checkpoint was trained with."""
    return Args(**checkpoint["args"])


def load_agent(checkpoint: dict[str, Any]) -> Agent:
    """The agent of a checkpoint."""
    agent = Agent(checkpoint_args(checkpoint))
    agent.load_state_dict(checkpoint["agent"])
    return agent


# flags that may differ from the run that is resumed: none of them changes what is learned, but a longer budget
RESUMABLE = {"resume", "log_dir", "num_threads", "total_timesteps", "track", "wandb_project_name", "capture_video"}


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """Command line to Args; with --resume, also the checkpoint, whose settings are then the defaults."""
    args = tyro.cli(Args, description=__doc__)
    if args.resume is None:
        return check_args(args), None
    checkpoint = load_checkpoint(args.resume, "--resume")
    saved = checkpoint_args(checkpoint)
    saved.resume, saved.log_dir, saved.num_threads, saved.track, saved.capture_video = None, "logs", None, False, False
    args = tyro.cli(Args, description=__doc__, default=saved)
    for field in dataclasses.fields(Args):
        old, new = getattr(saved, field.name), getattr(args, field.name)
        if old != new and field.name not in RESUMABLE:
            fail(f"--{field.name.replace('_', '-')} {new}: the checkpoint was trained with {old}; drop the flag")
    if args.total_timesteps < checkpoint["global_step"] + checkpoint["num_envs"]:
        fail(f"--total-timesteps {args.total_timesteps}: the checkpoint has {checkpoint['global_step']} steps already")
    return check_args(args), checkpoint


def make_run_dir(log_dir: str, name: str, subdirectories: tuple[str, ...]) -> Path:
    """A new directory for a run; fail if log_dir cannot be written."""
    for attempt in range(100):
        run_dir = Path(log_dir) / (name + (f"_{attempt}" if attempt else ""))
        try:
            run_dir.mkdir(parents=True)
            for sub in subdirectories:
                (run_dir / sub).mkdir()
            return run_dir
        except FileExistsError:
            if not Path(log_dir).is_dir():
                break
        except OSError as error:
            fail(f"--log-dir {log_dir}: cannot be written ({error.strerror}); name another directory")
    fail(f"--log-dir {log_dir}: is not a directory; name another one")


def check_output(flag: str, path: str | None, suffixes: list[str]) -> None:
    """Fail, before any work is done, if a result cannot be written to path; None is no path."""
    if path is None:
        return
    if suffixes and Path(path).suffix not in suffixes:
        fail(f"{flag} {path}: must end in {' or '.join(suffixes)}")
    if not os.access(Path(path).resolve().parent, os.W_OK):
        fail(f"{flag} {path}: its directory does not exist or cannot be written; create it or name another")


def describe_run(args: Any) -> dict[str, Any]:
    """What config.json says: arguments, commit, versions, machine."""

    def git(*words: str) -> str | None:
        try:
            here = Path(__file__).resolve().parent
            done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
        except FileNotFoundError:  # no git on this machine: the commit is unknown
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "args": dataclasses.asdict(args),
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)},
        "versions": {name: metadata.version(name) for name in ("torch", "mujoco", "gymnasium", "numpy")},
        "machine": {"platform": platform.platform(), "python": sys.version.split()[0], "cpus": os.cpu_count()},
    }


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Train; returns the exit code."""
    args, resumed = parse_args()
    start_time, start_cpu = time.perf_counter(), time.process_time()
    torch.set_num_threads(1)  # these networks are too small to share out, and one thread adds up in one order
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help for debugging, at 3 % of an update
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # exploration and minibatches

    agent = Agent(args)
    optimizer = torch.optim.Adam([flatten_parameters(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    envs = make_envs(args, resumed["num_envs"] if resumed else min(args.num_envs, args.total_timesteps))
    if resumed:
        check_base(resumed, envs.base_policy, f"--resume {args.resume}")
    eval_envs = make_envs(args, args.eval_episodes, AutoresetMode.DISABLED)
    if args.capture_video:
        check_rendering(eval_envs, "--capture-video")
    if args.track:
        try:
            import wandb
        except ImportError:
            fail("--track needs Weights & Biases: pip install wandb")
    name = f"ppo_residual_{time.strftime('%Y%m%d-%H%M%S')}_s{args.seed}"
    run_dir = make_run_dir(args.log_dir, name, ("checkpoints", "best_model", "eval_results", "tensorboard"))

    global_step, recent, best = 0, deque(maxlen=100), None
    if resumed:
        agent.load_state_dict(resumed["agent"])
        optimizer.load_state_dict(resumed["optimizer"])
        generator.set_state(resumed["generator"])
        envs.set_state(to_numpy(resumed["envs"]))
        next_obs, global_step, best = resumed["next_obs"].numpy(), resumed["global_step"], resumed["best"]
        recent.extend(resumed["recent_episodes"])
        if best:
            # the best model's own file has None there; a new dict, or the checkpoint would contain itself
            best = {**best, "checkpoint": best["checkpoint"] or resumed}
            save_checkpoint(run_dir / "best_model" / "best_model.pt", best["checkpoint"])
    else:
        seeds = np.random.SeedSequence(args.seed).generate_state(envs.num_envs) % VALIDATION_SEED
        next_obs = envs.reset(seed=[int(seed) for seed in seeds])[0]
    first_step = global_step

    if args.track:
        wandb.init(
            project=args.wandb_project_name, name=run_dir.name, config=dataclasses.asdict(args), sync_tensorboard=True
        )
    from torch.utils.tensorboard import SummaryWriter  # after wandb, which patches it; and slow to import

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    write_json(run_dir / "config.json", describe_run(args))

    def checkpoint() -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        return {
            "format": FORMAT, "obs_dim": next_obs.shape[1], "act_dim": ACT_DIM, "num_envs": envs.num_envs,
            "base_fingerprint": envs.base_policy.fingerprint if envs.base_policy else "",
            "args": {**dataclasses.asdict(args), "resume": None}, "global_step": global_step,
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
            "envs": to_plain(envs.get_state()), "next_obs": torch.from_numpy(next_obs),
            "recent_episodes": list(recent), "best": best,
        }  # fmt: skip

    # a signal only asks: the iteration is finished, so that what is saved can be continued to the bit
    interrupted: list[int] = []

    def on_signal(signum: int, frame: Any) -> None:
        interrupted.append(signum)
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the program at once

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)

    def eval_and_log() -> dict[str, float]:
        """Evaluate the mean action on the validation seeds, log it, keep the best model."""
        nonlocal best, base_success, eval_time
        eval_start = time.perf_counter()
        seeds = [VALIDATION_SEED + i for i in range(args.eval_episodes)]
        if base_success is None:
            base_success = float(np.mean([e["success"] for e in evaluate(no_residual, eval_envs, seeds)]))
        episodes = evaluate(mean_action(agent), eval_envs, seeds, trace=args.capture_video)
        if args.capture_video:
            write_video(eval_envs, episodes[:1], run_dir / "eval_results" / f"step_{global_step}.mp4")
        result = {
            "success_rate": float(np.mean([episode["success"] for episode in episodes])),
            "mean_reward": float(np.mean([episode["return"] for episode in episodes])),
            "mean_ep_length": float(np.mean([episode["length"] for episode in episodes])),
            "residual_magnitude": float(np.mean([episode["residual_magnitude"] for episode in episodes])),
            "base_success_rate": base_success,
            **{f"residual_to_base/{joint}": ratio for joint, ratio in residual_to_base(episodes).items()},
        }
        for name, value in result.items():
            writer.add_scalar(f"eval/{name}", value, global_step)
        with open(run_dir / "eval_results" / "evaluations.jsonl", "a") as file:
            file.write(json.dumps({"step": global_step, **result}) + "\n")
        score = (result["success_rate"], result["mean_reward"])
        if best is None or score > (best["success_rate"], best["mean_reward"]):
            best = {"success_rate": score[0], "mean_reward": score[1], "step": global_step, "checkpoint": None}
            saved = checkpoint()
            save_checkpoint(run_dir / "best_model" / "best_model.pt", saved)
            best = {**best, "checkpoint": copy.deepcopy(saved)}
        eval_time += time.perf_counter() - eval_start
        return result

    # an arm that rests moves nothing, and no sheet starts inside the tape
    base_success = 0.0 if envs.base_policy is None else None
    eval_time, result, metrics, means = 0.0, None, {}, {}
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit="step", dynamic_ncols=True)
    try:
        while args.total_timesteps - global_step >= envs.num_envs and not interrupted:
            if args.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.learning_rate * (1.0 - global_step / args.total_timesteps)
            num_steps = min(args.num_steps, (args.total_timesteps - global_step) // envs.num_envs)
            share = min(1.0, global_step / args.progressive_steps) if args.progressive_steps else 1.0
            buffers, next_obs, episodes = rollout(agent, envs, next_obs, num_steps, generator, share)
            metrics = update(agent, optimizer, buffers, args, generator, global_step < args.critic_warmup_steps)
            before, global_step = global_step, global_step + num_steps * envs.num_envs

            recent.extend(episodes)
            means = {key: float(np.mean([episode[key] for episode in recent])) for key in (recent or [{}])[0]}
            fps = (global_step - first_step) / (time.perf_counter() - start_time)
            for name, value in metrics.items():
                writer.add_scalar(f"train/{name}", value, global_step)
            writer.add_scalar("train/learning_rate", optimizer.param_groups[0]["lr"], global_step)
            writer.add_scalar("time/fps", fps, global_step)
            if means:
                writer.add_scalar("rollout/success_rate_100", means["success"], global_step)
                writer.add_scalar("rollout/ep_reward", means["return"], global_step)
                writer.add_scalar("rollout/ep_length", means["length"], global_step)
                writer.add_scalar("rollout/failure_rate_100", means["failure"], global_step)
                bar.set_postfix(success=f"{means['success']:.2f}", return_=f"{means['return']:.1f}", fps=f"{fps:.0f}")
            bar.update(global_step - before)

            result = None
            if global_step // args.checkpoint_every > before // args.checkpoint_every:
                name = f"ppo_residual_{global_step}_steps.pt"
                save_checkpoint(run_dir / "checkpoints" / name, checkpoint())
            if args.eval_every and global_step // args.eval_every > before // args.eval_every:
                result = eval_and_log()
        if args.eval_every and result is None and not interrupted:
            result = eval_and_log()
    except BasePolicyError as error:
        bar.close()
        fail(f"--base-policy {args.base_policy}: {error} (after {global_step} steps; earlier checkpoints in {run_dir})")
    except FloatingPointError as error:
        bar.close()
        print(
            f"{Path(__file__).name}: error: NaN or Inf in the {error} after {global_step} steps; "
            f"the checkpoints in {run_dir} are from before; try a lower --learning-rate",
            file=sys.stderr,
        )
        return 1
    finally:
        bar.close()
        writer.close()
        envs.close()
        eval_envs.close()

    model = run_dir / ("interrupted_model.pt" if interrupted else "final_model.pt")
    save_checkpoint(model, checkpoint())
    wall_time = time.perf_counter() - start_time
    best_model = run_dir / "best_model" / "best_model.pt" if best else model
    summary = {
        "total_timesteps": global_step,
        "wall_time_s": wall_time,
        "cpu_time_s": time.process_time() - start_cpu,
        "steps_per_second": (global_step - first_step) / wall_time,
        "eval_time_s": eval_time,
        "interrupted": bool(interrupted),
        "success_rate_100": means.get("success"),
        "mean_return_100": means.get("return"),
        "mean_ep_length_100": means.get("length"),
        "residual_magnitude": metrics.get("residual_magnitude"),
        "final_eval_success_rate": result["success_rate"] if result else None,
        "final_eval_mean_return": result["mean_reward"] if result else None,
        "base_eval_success_rate": base_success,
        "best_eval_success_rate": best["success_rate"] if best else None,
        "best_eval_step": best["step"] if best else None,
        "best_checkpoint": str(best_model),
    }
    write_json(run_dir / "training_summary.json", summary)
    print(f"{global_step} steps in {wall_time:.1f} s ({summary['steps_per_second']:.0f} steps/s), saved in {run_dir}")
    if interrupted:
        print(f"resume:   python {Path(__file__).name} --resume {model}")
        return 128 + interrupted[0]
    if best:
        print(f"evaluation success: best {best['success_rate']:.2f} at {best['step']} steps", end="")
        print((f", last {result['success_rate']:.2f}" if result else "") + f", base policy alone {base_success:.2f}")
    print(f"evaluate: python eval_so101.py --model {best_model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
