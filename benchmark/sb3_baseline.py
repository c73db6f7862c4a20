"""PPO and SAC of stable-baselines3 on the same task: with their defaults, CleanRL's hyper-parameters, and ours.

    pip install -r benchmark/requirements.txt && python benchmark/sb3_baseline.py

Simulation (SubprocVecEnv of SO101ResidualEnv), shaping, time-out, budget and evaluation are those of a run of
ppo_residual_so101.py. stable-baselines3's MlpPolicy does not support its mirror average, layer normalisation,
observation scales and contact features. SAC takes a gradient step for every environment step. Writes results.md and
results.json.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.checkpoints import load_script
from so101.cli import parse, run_script
from so101.evaluation import TEST_SEED, episode_mean, evaluate

TRAINER = load_script("ppo_residual_so101.py")


@dataclasses.dataclass
class Args:
    total_timesteps: int = 50_000
    """environment steps of every run"""
    seeds: int = 5
    """number of runs of each setting; the seeds start at 1"""
    num_envs: int = 8
    """worker processes, one environment each"""
    episodes: int = 200
    """held-out evaluation episodes per run"""
    only: tuple[Literal["ppo_defaults", "ppo_cleanrl", "ppo_ours", "sac_defaults"], ...] = ()
    """settings to run (default: all)"""
    out: str = "benchmark/results/sb3_50k"
    """directory to write to"""


@dataclasses.dataclass
class MakeEnv:
    """Makes one environment in a worker process, like the trainer's training environments."""

    gamma: float
    max_episode_steps: int

    def __call__(self) -> gym.Env:
        import so101_env  # in the worker

        return so101_env.SO101ResidualEnv(shaping_gamma=self.gamma, max_episode_steps=self.max_episode_steps)


def mean_action(model: BaseAlgorithm) -> Callable[[np.ndarray], np.ndarray]:
    """A model's deterministic policy as a function for `evaluate`, with its learned observation scales, if any."""
    normalize = model.get_vec_normalize_env()
    return lambda obs: model.predict(obs if normalize is None else normalize.normalize_obs(obs), deterministic=True)[0]


def our_settings(num_envs: int) -> dict[str, Any]:
    """Arguments that give stable-baselines3's PPO our hyper-parameters, with rollouts of our size."""
    args = TRAINER.Args()
    ours, net = args.ppo, args.networks
    return {
        "learning_rate": (lambda left: ours.learning_rate * left) if ours.anneal_lr else ours.learning_rate,
        "n_steps": ours.num_envs * ours.num_steps // num_envs, "batch_size": ours.minibatch_size,
        "n_epochs": ours.update_epochs, "gamma": ours.gamma, "gae_lambda": ours.gae_lambda,
        "clip_range": ours.clip_coef, "ent_coef": ours.ent_coef, "vf_coef": ours.vf_coef,
        "max_grad_norm": ours.max_grad_norm,
        "policy_kwargs": {
            "net_arch": [net.hidden_size] * 2, "log_std_init": net.log_std_init, "activation_fn": torch.nn.ReLU,
        },
    }  # fmt: skip


def cleanrl_settings(num_envs: int) -> dict[str, Any]:
    """Arguments with the hyper-parameters of CleanRL's ppo_continuous_action.py: rollouts of 2,048 steps in all."""
    return {
        "learning_rate": lambda left: 3e-4 * left, "n_steps": 2048 // num_envs, "batch_size": 64, "n_epochs": 10,
        "gamma": 0.99, "gae_lambda": 0.95, "clip_range": 0.2, "clip_range_vf": 0.2, "ent_coef": 0.0, "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "policy_kwargs": {"net_arch": [64, 64], "activation_fn": torch.nn.Tanh, "log_std_init": 0.0},
    }  # fmt: skip


# by name: title in the table, algorithm, its arguments for a number of environments, and whether observations and
# rewards are normalised by their running moments, as CleanRL does
SETTINGS: dict[str, tuple[str, type[BaseAlgorithm], Callable[[int], dict[str, Any]], bool]] = {
    "ppo_defaults": ("PPO, its defaults", PPO, lambda num_envs: {}, False),
    "ppo_cleanrl": ("PPO, CleanRL's hyper-parameters and normalisation", PPO, cleanrl_settings, True),
    "ppo_ours": ("PPO, our hyper-parameters", PPO, our_settings, False),
    "sac_defaults": ("SAC, its defaults", SAC, lambda num_envs: {"gradient_steps": -1}, False),
}


def run(args: Args, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one seed; returns its results."""
    ours, (_, algorithm, settings_for, normalize) = TRAINER.Args(), SETTINGS[name]
    settings = settings_for(args.num_envs)
    gamma = settings.get("gamma", 0.99)
    env = MakeEnv(gamma, ours.ppo.train_episode_steps)
    envs = SubprocVecEnv([env] * args.num_envs, start_method="spawn")
    if normalize:
        envs = VecNormalize(envs, gamma=gamma, clip_obs=10.0, clip_reward=10.0)
    model = algorithm("MlpPolicy", envs, device="cpu", seed=seed, **settings)
    start = time.perf_counter()
    model.learn(args.total_timesteps)
    wall_time = time.perf_counter() - start
    envs.close()
    eval_envs = TRAINER.make_envs(ours, 50, evaluation=True)
    episodes = evaluate(mean_action(model), eval_envs, [TEST_SEED + i for i in range(args.episodes)])
    eval_envs.close()
    result = {"setting": name, "seed": seed, "steps": model.num_timesteps, "wall_time_s": wall_time}
    for key in ("success", "return", "length"):
        result[key] = episode_mean(episodes, key)
    print(json.dumps(result), flush=True)
    return result


def write(args: Args, results: list[dict[str, Any]]) -> None:
    """Write the results so far to results.md and results.json in args.out."""
    lines = [
        "# stable-baselines3",
        "",
        f"`python benchmark/sb3_baseline.py --total-timesteps {args.total_timesteps} --seeds {args.seeds}`, "
        f"{args.num_envs} workers, {os.cpu_count()} cores; {args.episodes} held-out episodes per run, mean action. "
        f"Budgets are rounded up to whole rollouts.",
        "",
        "| setting | success, seeds 1, 2, ... | mean success | return | length | wall s |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in dict.fromkeys(result["setting"] for result in results):
        rows = [result for result in results if result["setting"] == name]
        mean = {key: np.mean([row[key] for row in rows]) for key in ("success", "return", "length", "wall_time_s")}
        each = " ".join(f"{row['success']:.2f}" for row in rows)
        lines.append(
            f"| {SETTINGS[name][0]} | {each} | {mean['success']:.2f} | {mean['return']:.1f} | {mean['length']:.0f} "
            f"| {mean['wall_time_s']:.1f} |"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "results.md").write_text("\n".join(lines) + "\n")


def main() -> int:
    """All runs, one after the other, so that wall times are comparable; returns the exit code."""
    args = parse(Args, __doc__)
    torch.set_num_threads(1)  # faster than its default for networks this small
    results: list[dict[str, Any]] = []
    for name in args.only or tuple(SETTINGS):
        for seed in range(1, args.seeds + 1):
            results.append(run(args, name, seed))
            write(args, results)  # after each run, because SAC takes many minutes
    print((Path(args.out) / "results.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
