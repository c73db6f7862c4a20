"""Residual SAC on the SO-101 "paper in square" task, in one file: off-policy sibling of ppo_residual_so101.py.

    python -m so101.sac --total-timesteps 10000

Every step is kept and learned from many times, so that few are needed: for an arm, where steps cost time, see
so101.practice. Soft actor-critic (Haarnoja et al. 2018) with n-step returns, layer-normed networks, an update for every
step, and mirror images of the samples. Top to bottom: Args, Agent, replay buffer, update, main.
Where this file and ppo_residual_so101.py agree, they agree line by line. A copy works like the original:
`cp so101/sac.py my_sac.py`.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode

from so101.base import check_base
from so101.checkpoints import CHECKPOINT, load_weights, restore_optimizer, restoring, to_numpy, to_plain
from so101.cli import check_flags, check_memory, check_unused, run_script
from so101.distributed import World
from so101.evaluation import training_seeds
from so101.networks import EXPECTED_YAW, SHEET_TO_TIP, Features, contact_features
from so101.optimizer import Adam
from so101.policies import load_policy
from so101.recorder import Recorder, Run
from so101.resume import parse_run
from so101.server import Server
from so101_env import MAX_EPISODE_STEPS, SO101ResidualVectorEnv, Task, extra_parts
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error

SCRIPT = Path(__file__).name
LOG_2PI = float(np.log(2 * np.pi))
NUM_STEPS = 50  # steps per environment between two entries in the curves
HOLD = 10  # steps that each random action before learning starts lasts: actions of one step hardly move the arm


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class SAC:
    """The algorithm."""

    num_envs: int = 4
    """parallel environments"""
    learning_starts: int = 500
    """steps before learning starts: of random actions, each held for 10, or of the base policy alone if there is one"""
    base_batch: float = 0.5
    """with a base policy: share of every batch that comes from those first steps, its demonstrations"""
    batch_size: int = 128
    """samples per gradient step"""
    updates_per_step: int = 1
    """gradient steps of critics and actor per environment step"""
    buffer_size: int = 1_000_000
    """newest steps that are kept, over all environments"""
    learning_rate: float = 1e-3
    """step size of Adam"""
    gamma: float = 0.98
    """discount factor"""
    n_step: int = 5
    """rewards that are summed before the critics' own estimate follows"""
    tau: float = 0.005
    """share by which the target critics follow the critics in each gradient step"""
    actor_tau: float = 0.01
    """share by which the mean actor, which acts without exploration, follows the actor in each gradient step"""
    reward_scale: float = 0.1
    """factor on the rewards that the critics learn"""
    alpha_init: float = 0.005
    """initial weight of the entropy, in scaled rewards per nat"""
    target_entropy: float = -6.0
    """entropy, in nats, that the weight is adjusted to"""
    shaping: bool = True
    """add the potential-based shaping term to the rewards that SAC learns from; logged returns are unshaped"""
    train_episode_steps: int = 100
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Networks:
    """Actor and critics."""

    hidden_size: int = 256
    """units in each of the two hidden layers"""
    num_critics: int = 2
    """critics, of which the most pessimistic counts"""
    layer_norm: bool = True
    """normalise the hidden layers of actor and critics"""
    log_std_init: float = -0.3
    """initial log standard deviation of the exploration noise, before it is squashed into [-1, 1]"""
    symmetry: bool = True
    """learn from samples and their left-right mirror images, and average the actor over both"""
    sheet_feature: bool = True
    """show the networks where the tip is relative to the sheet, and whether it presses, derived from the observation"""
    contact_gain: float = 3.0
    """factor of the features of contact: pressing beside the sheet and pressing on it ask for opposite actions"""


@dataclasses.dataclass
class Base:
    """The policy that the residual corrects."""

    base_policy: str = "zero"
    """zero, jacobian (a scripted pusher), checkpoint:PATH, onnx:PATH, bc:PATH, lerobot:DIR (a policy that LeRobot has
    saved), server:HOST:PORT (LeRobot's or GR00T's), opencv:SPEC (SPEC with the sheet's pose estimated by OpenCV), or
    MODULE:CLASS[:ARGUMENT] for your own"""
    observe_base: bool = False
    """append the base policy's action to the observation: 6 more numbers than 25"""
    server: Server = dataclasses.field(default_factory=Server)


@dataclasses.dataclass
class Args:
    seed: int = 1
    """seed of weights, exploration, samples and environments"""
    total_timesteps: int = 10_000
    """environment steps in all; never exceeded"""
    sac: SAC = dataclasses.field(default_factory=SAC)
    networks: Networks = dataclasses.field(default_factory=Networks)
    base: Base = dataclasses.field(default_factory=Base)
    task: Task = dataclasses.field(default_factory=lambda: Task(observe_load=True))  # without it a press is not seen
    run: Run = dataclasses.field(default_factory=lambda: Run(checkpoint_every=5000, eval_every=2000))


RANGES = {
    "seed": (0, 2**32 - 1), "total_timesteps": (1, 10**10), "num_envs": (1, 4096), "learning_starts": (1, 10**9),
    "base_batch": (0, 0.9), "batch_size": (1, 2**20), "updates_per_step": (1, 1000),
    "buffer_size": (1000, 10**9), "learning_rate": (1e-9, 10), "gamma": (0, 1), "n_step": (1, 100), "tau": (1e-6, 1),
    "actor_tau": (1e-6, 1), "reward_scale": (1e-9, 1e9), "alpha_init": (1e-9, 1e3), "target_entropy": (-100, 100),
    "train_episode_steps": (1, 10**6), "hidden_size": (1, 4096), "num_critics": (1, 100), "log_std_init": (-10, 2),
    "contact_gain": (0, 100),
    **Task.RANGES, **Server.RANGES, **Run.RANGES,
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range or contradicts another."""
    for settings in (args, args.sac, args.networks, args.base.server, args.task, args.run):
        check_flags(settings, RANGES)
    args.run.check_name()
    if args.sac.learning_starts >= args.total_timesteps:
        text = f"--learning-starts {args.sac.learning_starts}: nothing is learned within {args.total_timesteps} steps"
        raise SO101Error(f"{text}; lower it, or raise --total-timesteps")
    if args.base.observe_base and args.base.base_policy == "zero":
        raise SO101Error("--observe-base needs a base policy: name one with --base-policy")
    if args.base.base_policy == "zero":
        check_unused(args.sac, ["base_batch"], "needs a base policy, named by --base-policy")
    if not args.networks.sheet_feature:
        check_unused(args.networks, ["contact_gain"], "--no-sheet-feature leaves out the features that it scales")


def make_envs(args: Args, num_envs: int, evaluation: bool = False, num_threads: int | None = None):
    """The task as args describe it, a SO101ResidualVectorEnv, for training or for `evaluate`."""
    return SO101ResidualVectorEnv(
        num_envs,
        load_policy(args.base.base_policy, args.base.server),
        args.task,
        max_episode_steps=MAX_EPISODE_STEPS if evaluation else args.sac.train_episode_steps,
        shaping_gamma=args.sac.gamma if args.sac.shaping else None,
        observe_base=args.base.observe_base,
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
    """Squashed Gaussian actor and critics, and slower copies of both. They see views x (B, F) of the features."""

    def __init__(self, args: Args):
        super().__init__()
        parts = SO101ResidualVectorEnv.parts | extra_parts(args.task, args.base.observe_base)
        derived = [SHEET_TO_TIP, contact_features(args.networks.contact_gain)] if args.networks.sheet_feature else []
        if args.task.arrival_yaw_weight > 0:
            derived.append(EXPECTED_YAW)
        self.features = Features(parts, derived, args.networks.symmetry)
        width = args.networks.hidden_size

        def mlp(in_dim: int, out_dim: int, out_std: float) -> nn.Sequential:
            norms = [nn.LayerNorm(width) if args.networks.layer_norm else nn.Identity() for _ in range(2)]
            return nn.Sequential(
                layer_init(nn.Linear(in_dim, width)), norms[0], nn.ReLU(inplace=True),
                layer_init(nn.Linear(width, width)), norms[1], nn.ReLU(inplace=True),
                layer_init(nn.Linear(width, out_dim), std=out_std),
            )  # fmt: skip

        # with a base policy to start from, the residual starts at exactly zero
        self.actor = mlp(self.features.dim, 2 * ACT_DIM, out_std=0.01 if args.base.base_policy == "zero" else 0.0)
        self.mean_actor = copy.deepcopy(self.actor).requires_grad_(False)  # average of the actor's latest weights
        self.log_std_init = args.networks.log_std_init
        self.critics = nn.ModuleList(
            mlp(self.features.dim + ACT_DIM, 1, out_std=1.0) for _ in range(args.networks.num_critics)
        )
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.sac.alpha_init)))

    def get_gaussian(self, actor: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (B, 6) and log standard deviation (B, 6) of an actor's action before it is squashed, for x (B, F)."""
        mean, logstd = actor(x).chunk(2, dim=-1)
        return mean, (logstd + self.log_std_init).clamp(-5.0, 1.0)

    def get_views(self, actor: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """get_gaussian of the average over the views of x (B, views, F)."""
        mean, logstd = (each.view(*x.shape[:2], ACT_DIM) for each in self.get_gaussian(actor, x.flatten(0, 1)))
        return (mean * self.features.action_signs).mean(1), logstd.mean(1)

    def sample(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, 6) in (-1, 1) for x (B, F) and standard normal noise (B, 6), and their log-densities (B,)."""
        mean, logstd = self.get_gaussian(self.actor, x)
        raw = mean + noise * logstd.exp()
        squashing = 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))  # log of the derivative of tanh
        return torch.tanh(raw), (-0.5 * noise.square() - logstd - 0.5 * LOG_2PI - squashing).sum(-1)

    def explore(self, obs: np.ndarray, noise: torch.Tensor) -> np.ndarray:
        """Residuals (N, 6) with exploration, for observations (N, 25 to 37) and standard normal noise (N, 6)."""
        with torch.inference_mode():
            mean, logstd = self.get_views(self.actor, self.features(obs))
            return torch.tanh(mean + noise * logstd.exp()).numpy()

    def get_action(self, x: torch.Tensor) -> torch.Tensor:
        """Actions (B, 6) in [-1, 1] without exploration, those of the mean actor, for x (B, views, F)."""
        return torch.tanh(self.get_views(self.mean_actor, x)[0])

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The policy without exploration: residuals (N, 6) in [-1, 1] for observations (N, 25 to 37)."""
        return self.get_action(self.features(obs)).numpy()


def q_values(critics: nn.ModuleList, x: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """Values (num_critics, B) of actions (B, 6) in x (B, F): scaled, shaped, discounted rewards and entropy."""
    inputs = torch.cat([x, action], dim=1)
    return torch.stack([critic(inputs).squeeze(-1) for critic in critics])


# ---------------------------------------------------------------------------------------------------------------------
# replay buffer


class ReplayBuffer:
    """The newest steps of num_envs environments, in rows of one step of each.

    Args:
        capacity: rows.
        num_envs: environments.
        dim: features F of an observation; the mirror image is made when samples are drawn.
    """

    def __init__(self, capacity: int, num_envs: int, dim: int):
        shape = (capacity, num_envs)
        self.data = {
            "x": torch.zeros(*shape, dim),  # features of the observation
            "next_x": torch.zeros(*shape, dim),  # and of the next one: the final one where an episode ended
            "actions": torch.zeros(*shape, ACT_DIM),
            "rewards": torch.zeros(shape),
            "terminations": torch.zeros(shape, dtype=torch.bool),
            "dones": torch.zeros(shape, dtype=torch.bool),  # terminated or truncated
        }
        self.capacity, self.num_envs, self.rows = capacity, num_envs, 0  # rows: added so far

    def add(self, **row: torch.Tensor | np.ndarray) -> None:
        """Add a row: an array (num_envs, ...) for each of the names in `data`."""
        for name, values in row.items():
            self.data[name][self.rows % self.capacity] = torch.as_tensor(values)
        self.rows += 1

    @property
    def size(self) -> int:
        """Number of rows that are kept."""
        return min(self.rows, self.capacity)

    def newest(self, rows: int) -> dict[str, torch.Tensor]:
        """The newest rows, oldest first."""
        order = torch.arange(self.rows - min(rows, self.size), self.rows) % self.capacity
        return {name: array[order] for name, array in self.data.items()}

    def sample(
        self, size: int, n_step: int, gamma: float, generator: torch.Generator, first_rows: int = 0, share: float = 0.0
    ) -> dict[str, torch.Tensor]:  # fmt: skip
        """A batch of samples, (size, ...) each.

        Args:
            size: number of samples.
            n_step: rewards that are summed, fewer where an episode or the buffer ends.
            gamma: discount of each of them.
            generator: source of random numbers.
            first_rows, share: the share of the samples that is drawn from the first rows.

        Returns:
            x, actions, and of the n steps that begin there rewards (discounted sum), next_x, after the last of them,
            and discounts, the weight of its value: 0 if the episode was terminated.
        """
        age = torch.randint(self.size, (size,), generator=generator)  # 0: the oldest
        column = torch.randint(self.num_envs, (size,), generator=generator)
        first = first_rows - (self.rows - self.size)  # number of them that are kept
        if share and 0 < first < self.size:
            others = torch.randint(first, self.size, (size,), generator=generator)
            chosen = torch.rand(size, generator=generator) < share
            age = torch.where(chosen, torch.randint(first, (size,), generator=generator), others)
        oldest = self.rows - self.size
        begin = last = (oldest + age) % self.capacity, column
        rewards, discounts, running = torch.zeros(size), torch.ones(size), torch.ones(size, dtype=torch.bool)
        for step in range(n_step):
            now = (oldest + (age + step)) % self.capacity, column
            running = running & (age + step < self.size)
            rewards += discounts * self.data["rewards"][now] * running
            discounts = torch.where(running, discounts * gamma, discounts)
            last = torch.where(running, now[0], last[0]), column
            running = running & ~self.data["dones"][now]
        return {
            "x": self.data["x"][begin], "actions": self.data["actions"][begin], "rewards": rewards,
            "next_x": self.data["next_x"][last], "discounts": discounts * ~self.data["terminations"][last],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, torch.Tensor], rows: int) -> None:
        """Continue with what `newest` gave, after as many rows as have been added in all. Raises ValueError."""
        if state.keys() != self.data.keys() or not 0 <= rows <= 10**12:
            raise ValueError("the buffer has other parts")
        kept = min(rows, self.capacity)
        for name, array in self.data.items():
            if state[name].dtype != array.dtype or state[name].shape != (len(state["x"]), *array.shape[1:]):
                raise ValueError(f"{name} of the buffer has another shape or type")
            if len(state[name]) != kept:
                raise ValueError(f"the buffer is incomplete or too long, {len(state[name])} rows instead of {kept}")
            array[torch.arange(rows - kept, rows) % self.capacity] = state[name]
        self.rows = rows


# ---------------------------------------------------------------------------------------------------------------------
# SAC


def actor_loss(
    agent: Agent, x: torch.Tensor, noise: torch.Tensor, target_entropy: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of actor and entropy weight on x (B, F) with standard normal noise (B, 6), and metrics."""
    actions, logprobs = agent.sample(x, noise)
    values = q_values(agent.critics, x, actions).amin(0)
    entropy = -logprobs.mean()
    policy_loss = -agent.log_alpha.detach().exp() * entropy - values.mean()
    alpha_loss = agent.log_alpha * (entropy.detach() - target_entropy)
    return policy_loss + alpha_loss, {"actor_loss": policy_loss, "entropy": entropy, "alpha": agent.log_alpha.exp()}


def update(
    agent: Agent, optimizers: dict[str, torch.optim.Optimizer], buffer: ReplayBuffer, args: SAC, num_updates: int,
    first_rows: int, generator: torch.Generator,
) -> dict[str, float]:  # fmt: skip
    """Improve the agent by num_updates gradient steps; returns the metrics averaged over them.

    Target critics and mean actor stay fixed meanwhile. One Polyak update follows, by the share that num_updates single
    ones would add up to.
    """
    size, signs = num_updates * args.batch_size, agent.features.signs
    batch = buffer.sample(size, args.n_step, args.gamma, generator, first_rows, args.base_batch)
    view = torch.randint(len(signs), (size,), generator=generator)  # each sample or its mirror image
    x, next_x, actions = batch["x"] * signs[view], batch["next_x"] * signs[view], batch["actions"]
    actions = actions * agent.features.action_signs[view]
    noise = torch.randn(2, size, ACT_DIM, generator=generator)
    with torch.no_grad():
        next_actions, next_logprobs = agent.sample(next_x, noise[0])
        next_values = q_values(agent.target_critics, next_x, next_actions).amin(0)
        next_values -= agent.log_alpha.exp() * next_logprobs
        targets = args.reward_scale * batch["rewards"] + batch["discounts"] * next_values

    history: dict[str, list[torch.Tensor]] = {}
    for mb in torch.arange(size).split(args.batch_size):
        values = q_values(agent.critics, x[mb], actions[mb])
        loss = 0.5 * (values - targets[mb]).square().mean(1).sum()
        step(optimizers["critics"], loss)
        metrics = {"critic_loss": loss, "q_value": values.mean()}
        agent.critics.requires_grad_(False)
        loss, own = actor_loss(agent, x[mb], noise[1, mb], args.target_entropy)
        step(optimizers["actor"], loss)
        agent.critics.requires_grad_(True)
        metrics |= own
        for key, value in metrics.items():
            history.setdefault(key, []).append(value.detach())
    with torch.no_grad():
        followers = ((agent.target_critics, agent.critics, args.tau), (agent.mean_actor, agent.actor, args.actor_tau))
        for follower, leader, tau in followers:
            share = 1.0 - (1.0 - tau) ** num_updates
            torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), share)
    return {key: float(torch.stack(values).mean()) for key, values in history.items()}


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """A gradient step. Raises FloatingPointError if the loss is not finite."""
    if not torch.isfinite(loss):
        raise FloatingPointError("loss")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def make_optimizers(agent: Agent, args: SAC) -> dict[str, torch.optim.Optimizer]:
    """Adam for the critics, and for the actor and the weight of the entropy."""
    groups = {"critics": [*agent.critics.parameters()], "actor": [*agent.actor.parameters(), agent.log_alpha]}
    return {name: Adam(group, lr=args.learning_rate, fused=True) for name, group in groups.items()}


def act_and_add(
    agent: Agent, envs: SO101ResidualVectorEnv, obs: np.ndarray, action: np.ndarray, buffer: ReplayBuffer
) -> tuple[np.ndarray, list[dict[str, float]]]:
    """A step with residuals (num_envs, 6), kept in the buffer.

    Returns the next observation (num_envs, 25 to 37), and one dict (success, return, length, failure) per finished
    episode.
    """
    next_obs, reward, terminations, truncations, infos = envs.step(action)
    real_next_obs, episodes = next_obs, []
    if "final_info" in infos:
        done, final = infos["_final_info"], infos["final_info"]
        real_next_obs = np.where(done[:, None], infos["final_obs"], next_obs)
        for i in np.flatnonzero(done):
            episodes.append({  # every value is logged under rollout/
                "success": float(final["is_success"][i]),
                "return": float(final["episode_summary"]["return"][i]),
                "length": float(final["episode_summary"]["length"][i]),
                "failure": float(final["non_finite"][i] or final["out_of_reach"][i]),
            })  # fmt: skip
    for name, array in (("observation", real_next_obs), ("reward", reward)):
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} of the environments")
    buffer.add(
        x=agent.features(obs)[:, 0], next_x=agent.features(real_next_obs)[:, 0], actions=action,
        rewards=reward.astype(np.float32), terminations=terminations, dones=terminations | truncations,
    )  # fmt: skip
    return next_obs, episodes


def iterate(
    agent: Agent, optimizers: dict[str, torch.optim.Optimizer], envs: SO101ResidualVectorEnv, obs: np.ndarray,
    buffer: ReplayBuffer, args: Args, num_steps: int, generator: torch.Generator,
) -> tuple[np.ndarray, dict[str, float], list[dict[str, float]]]:  # fmt: skip
    """num_steps steps of every environment, each followed by its updates.

    Returns the next observation (num_envs, 25 to 37), the mean metrics, and the finished episodes, as act_and_add does.
    """
    n, history, episodes = envs.num_envs, [], []
    first_rows = -(-args.sac.learning_starts // n)
    with_base = envs.base_policy is not None
    for _ in range(num_steps):
        learning = buffer.rows >= first_rows
        if learning:
            action = agent.explore(obs, torch.randn(n, ACT_DIM, generator=generator))
        elif buffer.rows % HOLD == 0:
            action = (2 * torch.rand(n, ACT_DIM, generator=generator) - 1).numpy() * (not with_base)
        else:
            action = buffer.newest(1)["actions"][0].numpy()
        obs, ended = act_and_add(agent, envs, obs, action, buffer)
        episodes += ended
        if learning:
            count, rows = n * args.sac.updates_per_step, first_rows * with_base
            history.append(update(agent, optimizers, buffer, args.sac, count, rows, generator))
    keys = history[0] if history else ()
    metrics = {key: float(np.mean([each[key] for each in history])) for key in keys}
    newest = buffer.newest(num_steps)
    metrics["residual_magnitude"] = float(newest["actions"].norm(dim=-1).mean())
    return obs, metrics, episodes


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Train; returns the exit code."""
    args, saved = parse_run(Args, __doc__, SCRIPT, CHECKPOINT, check_args, one_rank=True)
    num_envs = saved["num_envs"] if saved else min(args.sac.num_envs, args.total_timesteps)
    generator = World().seed(args.seed)  # for exploration and samples

    agent = Agent(args)
    optimizers = make_optimizers(agent, args.sac)
    capacity = -(-min(args.sac.buffer_size, args.total_timesteps) // num_envs)
    copies = 2 if args.base.base_policy == "zero" else 3  # with that of a checkpoint, and one in case the base fails
    check_memory("--buffer-size", 8 * copies * capacity * num_envs * (agent.features.dim + ACT_DIM))
    buffer = ReplayBuffer(capacity, num_envs, agent.features.dim)
    envs, eval_envs = make_envs(args, num_envs), make_envs(args, args.run.eval_envs, evaluation=True)
    if saved:
        check_base(saved, args.base.base_policy, envs.base_policy, args.run.resume)
        load_weights(agent, saved["agent"], args.run.resume)
        with restoring(args.run.resume):
            (own,) = saved["ranks"]
            begun = saved["global_step"] > args.sac.learning_starts + num_envs
            for name, optimizer in optimizers.items():
                restore_optimizer(optimizer, saved["optimizer"][name], begun)
            generator.set_state(own["generator"])
            buffer.load_state_dict(own["buffer"], saved["global_step"] // num_envs)
            envs.set_state(to_numpy(own["envs"]))
            next_obs, global_step = envs.observation, saved["global_step"]
    else:
        next_obs, _ = envs.reset(seed=training_seeds(args.seed, num_envs))
        global_step = 0

    def checkpoint() -> dict[str, Any]:
        """What a resumed run needs: the mirror of the lines above. A copy, since weights change between checkpoints."""
        own = {
            "generator": generator.get_state(),
            "envs": to_plain(envs.get_state()),
            "buffer": buffer.newest(buffer.size),
        }
        return {
            "agent": copy.deepcopy(agent.state_dict()), "ranks": [own],
            "optimizer": {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in optimizers.items()},
            "global_step": global_step, "num_envs": num_envs,
            "base_fingerprint": envs.base_policy.fingerprint if envs.base_policy else "",
        }  # fmt: skip

    with Recorder(SCRIPT, CHECKPOINT, args, agent, envs, eval_envs, checkpoint, saved) as recorder:
        while args.total_timesteps - global_step >= num_envs and not recorder.stopped():
            num_steps = min(NUM_STEPS, (args.total_timesteps - global_step) // num_envs)
            next_obs, metrics, episodes = iterate(agent, optimizers, envs, next_obs, buffer, args, num_steps, generator)
            global_step += num_steps * num_envs
            recorder.record(global_step, metrics, episodes)
        return recorder.finish()


if __name__ == "__main__":
    sys.exit(run_script(main))
