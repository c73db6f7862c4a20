"""Residual PPO on the SO-101 "paper in square" task, in one file: fork it and change it.

    python ppo_residual_so101.py --total-timesteps 50000

The policy's action is a residual that corrects a base policy (default: zero). It is added in one place, `joint_targets`
of so101_env.py: delta = base + alpha * act_scale * clip(residual, -1, 1). Top to bottom: Args, Agent, rollout,
advantages, loss, update, main.

A copy of this file works like the original: eval_so101.py, the sweep and `checkpoint:` bases load its checkpoints
through the copy itself. They use its Args (with `task` and `base`), check_args, Agent(args) with `act`, and make_envs.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode

from so101.base import check_base
from so101.checkpoints import CHECKPOINT, load_weights, restore_optimizer, restoring, to_numpy, to_plain
from so101.cli import check_flags, check_unused, run_script
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


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class PPO:
    """The algorithm."""

    num_envs: int = 32
    """parallel environments, over all ranks"""
    num_steps: int = 64
    """steps per environment and rollout"""
    minibatch_size: int = 512
    """samples per gradient step, over all ranks"""
    update_epochs: int = 8
    """passes over each rollout"""
    learning_rate: float = 3e-3
    """initial step size of Adam"""
    anneal_lr: bool = True
    """anneal the learning rate linearly to zero"""
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
    recompute_adv: bool = True
    """recompute values and advantages before every pass, with the critic as the last pass left it"""
    shaping: bool = True
    """add the potential-based shaping term to the rewards that PPO learns from; logged returns are unshaped"""
    train_episode_steps: int = 150
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Networks:
    """Actor and critic."""

    hidden_size: int = 128
    """units in each of the two hidden layers"""
    log_std_init: float = -0.3
    """initial log standard deviation of the exploration noise"""
    symmetry: bool = True
    """average actor and critic over the scene and its left-right mirror image"""
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
    """seed of weights, exploration, minibatches and environments"""
    total_timesteps: int = 50_000
    """environment steps in all; never exceeded"""
    ppo: PPO = dataclasses.field(default_factory=PPO)
    networks: Networks = dataclasses.field(default_factory=Networks)
    base: Base = dataclasses.field(default_factory=Base)
    task: Task = dataclasses.field(default_factory=Task)
    run: Run = dataclasses.field(default_factory=Run)


RANGES = {
    "seed": (0, 2**32 - 1), "total_timesteps": (1, 10**10), "num_envs": (1, 4096), "num_steps": (1, 2**16),
    "minibatch_size": (1, 2**22), "update_epochs": (1, 1000), "learning_rate": (1e-9, 10), "gamma": (0, 1),
    "gae_lambda": (0, 1), "clip_coef": (1e-6, 100), "ent_coef": (0, 100), "vf_coef": (0, 100),
    "max_grad_norm": (1e-6, 1e6), "train_episode_steps": (1, 10**6), "hidden_size": (1, 4096),
    "log_std_init": (-10, 2), "contact_gain": (0, 100), **Task.RANGES, **Server.RANGES, **Run.RANGES,
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
    if args.base.observe_base and args.base.base_policy == "zero":
        raise SO101Error("--observe-base needs a base policy: name one with --base-policy")
    if not args.networks.sheet_feature:
        check_unused(args.networks, ["contact_gain"], "--no-sheet-feature leaves out the features that it scales")


def make_envs(args: Args, num_envs: int, evaluation: bool = False, num_threads: int | None = None):
    """The task as args describe it, a SO101ResidualVectorEnv, for training or for `evaluate`."""
    return SO101ResidualVectorEnv(
        num_envs,
        load_policy(args.base.base_policy, args.base.server),
        args.task,
        max_episode_steps=MAX_EPISODE_STEPS if evaluation else args.ppo.train_episode_steps,
        shaping_gamma=args.ppo.gamma if args.ppo.shaping else None,
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
    """Gaussian actor, and critic. Both see x = features(obs), (B, views, F), and average over the views."""

    def __init__(self, args: Args):
        super().__init__()
        parts = SO101ResidualVectorEnv.parts | extra_parts(args.task, args.base.observe_base)
        derived = [SHEET_TO_TIP, contact_features(args.networks.contact_gain)] if args.networks.sheet_feature else []
        if args.task.arrival_yaw_weight > 0:
            derived.append(EXPECTED_YAW)
        self.features = Features(parts, derived, args.networks.symmetry)
        width = args.networks.hidden_size

        def mlp(out_dim: int, out_std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(self.features.dim, width)), nn.ReLU(inplace=True),
                layer_init(nn.Linear(width, width)), nn.LayerNorm(width), nn.ReLU(inplace=True),
                layer_init(nn.Linear(width, out_dim), std=out_std),
            )  # fmt: skip

        # with a base policy to start from, the residual starts at exactly zero
        self.actor_mean = mlp(ACT_DIM, out_std=0.01 if args.base.base_policy == "zero" else 0.0)
        self.actor_logstd = nn.Parameter(torch.full((1, ACT_DIM), args.networks.log_std_init))
        self.critic = mlp(1, out_std=1.0)

    def get_gaussian(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean action (B, 6), unclipped, and its log standard deviation (1 or B, 6)."""
        mean = self.actor_mean(x.flatten(0, 1)).view(*x.shape[:2], ACT_DIM)
        return (mean * self.features.action_signs).mean(1), self.actor_logstd

    def get_value(self, x: torch.Tensor) -> torch.Tensor:
        """Value (B,) of the shaped reward."""
        return self.critic(x.flatten(0, 1)).view(x.shape[:2]).mean(1)

    def get_logprob(self, x: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density (B,) of unclipped actions (B, 6), and the entropy (1 or B,) of the policy."""
        mean, logstd = self.get_gaussian(x)
        z = (action - mean) * torch.exp(-logstd)
        logprob = -0.5 * z.square().sum(-1) - logstd.sum(-1) - 0.5 * ACT_DIM * LOG_2PI
        return logprob, logstd.sum(-1) + 0.5 * ACT_DIM * (1.0 + LOG_2PI)

    def get_action(self, x: torch.Tensor) -> torch.Tensor:
        """Actions (B, 6) in [-1, 1] without exploration."""
        return self.get_gaussian(x)[0].clamp(-1, 1)

    @torch.inference_mode()
    def act(self, obs: np.ndarray) -> np.ndarray:
        """The policy without exploration: residuals (N, 6) in [-1, 1] for observations (N, 25 to 37)."""
        return self.get_action(self.features(obs)).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# PPO


def rollout(
    agent: Agent, envs: SO101ResidualVectorEnv, next_obs: np.ndarray, noise: np.ndarray
) -> tuple[dict[str, torch.Tensor], np.ndarray, list[dict[str, float]]]:
    """Act with exploration: a step for each row of the standard normal noise (num_steps, num_envs, 6).

    Returns the buffers (num_steps, num_envs, ...), the next observation (num_envs, 25 to 37), and one dict (success,
    return, length, failure) per finished episode.
    """
    num_steps, (n, obs_dim) = len(noise), next_obs.shape
    buffers = {
        "obs": np.zeros((num_steps, n, obs_dim), np.float32),  # (num_steps, num_envs, 25 to 37)
        "real_next_obs": np.zeros((num_steps, n, obs_dim), np.float32),  # the final one where an episode ended
        "actions": np.zeros((num_steps, n, ACT_DIM), np.float32),  # (num_steps, num_envs, 6), unclipped
        "rewards": np.zeros((num_steps, n), np.float32),  # (num_steps, num_envs), as the next two
        "terminations": np.zeros((num_steps, n), np.float32),
        "dones": np.zeros((num_steps, n), np.float32),  # terminated or truncated
    }
    episodes = []
    with torch.inference_mode():
        for step in range(num_steps):
            # only the action is needed now; values and log-probabilities are computed for the whole rollout at once
            mean, logstd = agent.get_gaussian(agent.features(next_obs))
            action = mean.numpy() + noise[step] * logstd.exp().numpy()
            buffers["obs"][step], buffers["actions"][step] = next_obs, action
            # the environment clips the action and adds it to that of the base policy
            next_obs, reward, terminations, truncations, infos = envs.step(action)
            buffers["real_next_obs"][step], buffers["rewards"][step] = next_obs, reward
            if "final_info" in infos:
                done, final = infos["_final_info"], infos["final_info"]
                buffers["real_next_obs"][step][done] = infos["final_obs"][done]
                buffers["terminations"][step], buffers["dones"][step] = terminations, done
                for i in np.flatnonzero(done):
                    episodes.append({  # every value is logged under rollout/
                        "success": float(final["is_success"][i]),
                        "return": float(final["episode_summary"]["return"][i]),
                        "length": float(final["episode_summary"]["length"][i]),
                        "failure": float(final["non_finite"][i] or final["out_of_reach"][i]),
                    })  # fmt: skip
    for name in ("obs", "real_next_obs", "rewards"):
        if not np.isfinite(buffers[name]).all():
            raise FloatingPointError(f"{name.replace('_', ' ')} of the environments")
    return {name: torch.from_numpy(array) for name, array in buffers.items()}, next_obs, episodes


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
    agent: Agent, mb_x: torch.Tensor, critic_view: int, mb_actions: torch.Tensor, mb_logprobs: torch.Tensor,
    mb_advantages: torch.Tensor, mb_returns: torch.Tensor, args: PPO,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """Loss and metrics of a minibatch (B, ...).

    The critic learns from one view only, the scene or its mirror image: alternating teaches as much at half the cost.
    """
    logprob, entropy = agent.get_logprob(mb_x, mb_actions)
    logratio = logprob - mb_logprobs
    ratio = logratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    pg_loss = torch.max(-mb_advantages * ratio, -mb_advantages * clipped_ratio).mean()
    v_loss = 0.5 * (agent.get_value(mb_x[:, critic_view : critic_view + 1]) - mb_returns).square().mean()
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
    """Advantages of a minibatch (B,) with mean 0 and standard deviation 1; computed in double precision."""
    if len(mb_advantages) == 1:
        return mb_advantages
    mean = mb_advantages.double().mean()
    std = (mb_advantages.double().square().mean() - mean.square()).clamp(min=0).sqrt()
    return (mb_advantages - mean.float()) / (std.float() + 1e-8)


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor], args: PPO,
    generator: torch.Generator, world: World,
) -> dict[str, float]:  # fmt: skip
    """Improve the agent on one rollout; returns the metrics averaged over all minibatches."""
    parameters, (num_steps, n) = list(agent.parameters()), buffers["rewards"].shape
    b_actions = buffers["actions"].flatten(0, 1)
    with torch.no_grad():
        b_x = agent.features(buffers["obs"].flatten(0, 1).numpy())  # (num_steps * num_envs, views, F)
        b_logprobs, _ = agent.get_logprob(b_x, b_actions)
        # the next observation is that of the next row, but where an episode or the rollout ends
        ends = buffers["dones"].bool()
        ends[-1] = True
        end_x = agent.features(buffers["real_next_obs"][ends].numpy())

    # minibatches of equal size, at most minibatch_size: a shortened rollout leaves no tiny rest
    num_minibatches = -(-len(b_x) // (args.minibatch_size // world.size))
    history: list[dict[str, torch.Tensor]] = []  # metrics of the minibatches
    for epoch in range(args.update_epochs):
        if epoch == 0 or args.recompute_adv:
            with torch.no_grad():
                values = agent.get_value(b_x).view(num_steps, n)
                real_next_values = values.roll(-1, 0)
                real_next_values[ends] = agent.get_value(end_x)
                b_advantages = compute_gae(
                    buffers["rewards"], values, real_next_values, buffers["terminations"], buffers["dones"],
                    args.gamma, args.gae_lambda,
                ).flatten()  # fmt: skip
            b_returns = b_advantages + values.flatten()
        if epoch == 0:
            explained = 1 - b_advantages.var(correction=0) / b_returns.var(correction=0)
        for mb in torch.randperm(len(b_x), generator=generator).tensor_split(num_minibatches):
            loss, metrics = ppo_loss(
                agent, b_x[mb], epoch % b_x.shape[1], b_actions[mb], b_logprobs[mb], normalize(b_advantages[mb]),
                b_returns[mb], args,
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            world.average_gradients(parameters)
            history.append(metrics)
            if not torch.isfinite(loss):
                raise FloatingPointError("loss (" + ", ".join(f"{k} {v:.3g}" for k, v in metrics.items()) + ")")
            if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)):
                raise FloatingPointError("gradient")
            optimizer.step()
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise FloatingPointError("weights")
    metrics = {key: float(torch.stack([each[key] for each in history]).mean()) for key in history[0]}
    metrics["explained_variance"] = float(explained) if torch.isfinite(explained) else 0.0
    metrics["residual_magnitude"] = float(b_actions.clamp(-1, 1).norm(dim=-1).mean())
    metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
    return metrics


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Train; returns the exit code."""
    args, saved = parse_run(Args, __doc__, SCRIPT, CHECKPOINT, check_args)  # with --resume, the checkpoint is `saved`
    world = World()
    num_envs = saved["num_envs"] if saved else min(args.ppo.num_envs, args.total_timesteps)
    own_envs, _ = world.share(num_envs, "--num-envs"), world.share(args.ppo.minibatch_size, "--minibatch-size")
    generator = world.seed(args.seed)  # for exploration and minibatches

    agent = Agent(args)
    optimizer = Adam(agent.parameters(), lr=args.ppo.learning_rate, eps=1e-5, fused=True)
    envs = make_envs(args, own_envs, num_threads=args.run.num_threads or world.num_threads)
    eval_envs = make_envs(args, args.run.eval_envs, evaluation=True)
    if saved:
        check_base(saved, args.base.base_policy, envs.base_policy, args.run.resume)
        load_weights(agent, saved["agent"], args.run.resume)
        with restoring(args.run.resume):
            own = world.own(saved["ranks"])
            restore_optimizer(optimizer, saved["optimizer"], saved["global_step"] > 0)
            generator.set_state(own["generator"])
            envs.set_state(to_numpy(own["envs"]))
            next_obs, global_step = envs.observation, saved["global_step"]
    else:
        next_obs, _ = envs.reset(seed=training_seeds(args.seed, num_envs)[world.rank :: world.size])
        global_step = 0

    def checkpoint() -> dict:
        """What a resumed run needs: the mirror of the lines above."""
        own = {"generator": generator.get_state(), "envs": to_plain(envs.get_state())}
        return {
            "agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "ranks": world.gather(own),
            "global_step": global_step, "num_envs": num_envs,
            "base_fingerprint": envs.base_policy.fingerprint if envs.base_policy else "",
        }  # fmt: skip

    with Recorder(SCRIPT, CHECKPOINT, args, agent, envs, eval_envs, checkpoint, saved, world=world) as recorder:
        while args.total_timesteps - global_step >= num_envs and not recorder.stopped():
            if args.ppo.anneal_lr:
                optimizer.param_groups[0]["lr"] = args.ppo.learning_rate * (1.0 - global_step / args.total_timesteps)
            num_steps = min(args.ppo.num_steps, (args.total_timesteps - global_step) // num_envs)
            noise = torch.randn(num_steps, own_envs, ACT_DIM, generator=generator).numpy()
            buffers, next_obs, episodes = rollout(agent, envs, next_obs, noise)
            metrics = update(agent, optimizer, buffers, args.ppo, generator, world)
            global_step += num_steps * num_envs
            recorder.record(global_step, metrics, episodes)
        return recorder.finish()


if __name__ == "__main__":
    sys.exit(run_script(main))
