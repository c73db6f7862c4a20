"""stable-baselines3 PPO at the same task, with its own defaults and with our hyper-parameters.

    pip install -r benchmark/requirements.txt && python benchmark/sb3_baseline.py

Same simulation (SubprocVecEnv of SO101ResidualEnv), shaping, episode time-out, budget and evaluation code as a run of
ppo_residual_so101.py. What it lacks is what its MlpPolicy has no place for: symmetry, observation scales and the sheet
feature. Writes results.md and results.json.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import SubprocVecEnv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101_policies import load_script
from so101_runs import TEST_SEED, episode_mean, evaluate

TRAINER = load_script("ppo_residual_so101.py")


@dataclasses.dataclass
class BaselineArgs:
    total_timesteps: int = 50_000
    """environment steps of every run"""
    seeds: int = 5
    """runs of each setting, seeds 1 to this"""
    num_envs: int = 8
    """worker processes, one environment each"""
    episodes: int = 100
    """held-out evaluation episodes per run"""
    out: str = "benchmark/results/sb3_50k"
    """directory to write to"""


@dataclasses.dataclass
class MakeEnv:
    """One environment for a worker process, as the trainer's own training environments are."""

    gamma: float
    max_episode_steps: int

    def __call__(self) -> gym.Env:
        import so101_env  # in the worker

        return so101_env.SO101ResidualEnv(shaping_gamma=self.gamma, max_episode_steps=self.max_episode_steps)


def mean_action(model: PPO) -> Callable[[np.ndarray], np.ndarray]:
    """The deterministic policy as the evaluation wants it."""
    return lambda obs: model.predict(obs, deterministic=True)[0]


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
            "net_arch": [net.hidden_size] * 2, "log_std_init": net.log_std_init,
            "activation_fn": {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[net.activation],
        },
    }  # fmt: skip


def run(args: BaselineArgs, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one seed."""
    ours = TRAINER.Args()
    settings: dict[str, Any] = {}
    if name == "our hyper-parameters":
        settings = our_settings(args.num_envs)
    env = MakeEnv(settings.get("gamma", 0.99), ours.ppo.train_episode_steps)
    envs = SubprocVecEnv([env] * args.num_envs, start_method="spawn")
    model = PPO("MlpPolicy", envs, device="cpu", seed=seed, **settings)
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


def main() -> None:
    """All runs, one after the other: each has the machine to itself, so that wall times mean something."""
    args = tyro.cli(BaselineArgs, description=__doc__)
    torch.set_num_threads(1)  # faster than its default for networks this small
    names = ("stable-baselines3's defaults", "our hyper-parameters")
    results = [run(args, name, seed) for name in names for seed in range(1, args.seeds + 1)]
    lines = [
        "# stable-baselines3 PPO",
        "",
        f"`python benchmark/sb3_baseline.py --total-timesteps {args.total_timesteps} --seeds {args.seeds}`, "
        f"{args.num_envs} workers, {os.cpu_count()} cores; {args.episodes} held-out episodes per run, mean action.",
        "",
        "| setting | success, seeds " + " ".join(str(seed) for seed in range(1, args.seeds + 1))
        + " | mean success | return | length | wall s |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        rows = [result for result in results if result["setting"] == name]
        mean = {key: np.mean([row[key] for row in rows]) for key in ("success", "return", "length", "wall_time_s")}
        each = " ".join(f"{row['success']:.2f}" for row in rows)
        lines.append(
            f"| {name} | {each} | {mean['success']:.2f} | {mean['return']:.1f} | {mean['length']:.0f} "
            f"| {mean['wall_time_s']:.1f} |"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
