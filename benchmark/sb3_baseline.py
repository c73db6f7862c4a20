"""Computing time until 95 % success: this trainer, its sibling SAC, and four algorithms of stable-baselines3.

    pip install -r benchmark/requirements.txt && taskset -c 0 python benchmark/sb3_baseline.py

Everything has one thread and trains in the same batched simulation, with the same shaping and time-out. The clock
stands still during evaluations, which use the held-out episodes and the mean action. A run ends with the first
evaluation that reaches the target, or at the limit. stable-baselines3's MlpPolicy does not support the mirror average,
layer normalisation, observation scales and contact features of this trainer. Writes runs.json and results.md; finished
runs in runs.json are not repeated.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sb3_contrib import TQC, CrossQ
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.checkpoints import ROOT, load_script
from so101.cli import parse, run_script
from so101.evaluation import TEST_SEED, episode_mean, evaluate, training_seeds
from so101.files import write_json

TRAINER = load_script("ppo_residual_so101.py")
COMPARED_STEPS = 50_000
EVALUATIONS = [round(COMPARED_STEPS * 5 ** (k / 7)) for k in range(-14, 22)]  # steps: 2,000, 2,517, ..., 5,000,000


@dataclasses.dataclass
class Args:
    only: tuple[Literal["ours", "our_sac", "ppo", "ppo_ours", "sac", "tqc", "crossq"], ...] = ()
    """what to run (default: all)"""
    seeds: tuple[int, ...] = (401,)
    """seeds of each"""
    target: float = 0.95
    """success that ends a run"""
    limit_minutes: float = 5.0
    """time that a run of stable-baselines3 may train"""
    total_timesteps: int = 1_000_000
    """steps that a run of stable-baselines3 may train, over which learning rates fall"""
    episodes: int = 200
    """episodes of every evaluation"""
    out: str = "benchmark/results/sb3"
    """directory to write to"""


class BatchedEnv(VecEnv):
    """The training environments of this trainer as a vector environment of stable-baselines3."""

    def __init__(self, num_envs: int, gamma: float, seed: int):
        args = TRAINER.Args()
        args.ppo.gamma, self.own_seed = gamma, seed
        self.envs = TRAINER.make_envs(args, num_envs, num_threads=1)
        super().__init__(num_envs, self.envs.single_observation_space, self.envs.single_action_space)

    def reset(self) -> np.ndarray:
        """First observations (N, D)."""
        return self.envs.reset(seed=training_seeds(self.own_seed, self.num_envs))[0]

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions (N, 6) for step_wait."""
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, rewards, ends of episodes, and what stable-baselines3 needs to know about each end."""
        obs, reward, terminated, truncated, infos = self.envs.step(self.actions)
        done, each = terminated | truncated, [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(done):
            each[i] = {"terminal_observation": infos["final_obs"][i], "TimeLimit.truncated": bool(truncated[i])}
        return obs, reward, done, each

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The attribute of the environments, once for each."""
        return [getattr(self.envs, attr_name)] * self.num_envs

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        """They are not."""
        return [False] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Not needed here."""
        raise NotImplementedError

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        """Not needed here."""
        raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# stable-baselines3


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


@dataclasses.dataclass
class Setting:
    """An algorithm of stable-baselines3."""

    title: str
    algorithm: type[BaseAlgorithm]
    settings: Callable[[int], dict[str, Any]]  # its arguments for a number of environments
    num_envs: int = 8


EVERY_STEP = {"gradient_steps": -1}  # as many gradient steps as environment steps
SETTINGS = {
    "ppo": Setting("stable-baselines3: PPO, its defaults", PPO, lambda num_envs: {}),
    "ppo_ours": Setting("stable-baselines3: PPO, our hyper-parameters", PPO, our_settings, num_envs=32),
    "sac": Setting("stable-baselines3: SAC, its defaults", SAC, lambda num_envs: EVERY_STEP),
    "tqc": Setting("stable-baselines3: TQC, its defaults", TQC, lambda num_envs: EVERY_STEP),
    "crossq": Setting("stable-baselines3: CrossQ, its defaults", CrossQ, lambda num_envs: EVERY_STEP),
}


class Clock(BaseCallback):
    """Evaluates at EVALUATIONS and at the end, with the clock stopped; ends training at the target or the limit."""

    def __init__(self, args: Args):
        super().__init__()
        self.args, self.points, self.stopped_s = args, [], 0.0
        self.eval_envs = TRAINER.make_envs(TRAINER.Args(), 50, evaluation=True, num_threads=1)

    def _on_training_start(self) -> None:
        self.start = time.perf_counter()

    def _on_step(self) -> bool:
        over = self.wall_s() > 60 * self.args.limit_minutes
        due = next((steps for steps in EVALUATIONS if not self.points or steps > self.points[-1]["steps"]), np.inf)
        if self.num_timesteps < due and not over:
            return True
        return self.evaluate() < self.args.target and not over

    def _on_training_end(self) -> None:
        if not self.points or self.points[-1]["steps"] < self.num_timesteps:
            self.evaluate()

    def wall_s(self) -> float:
        """Time since training began, without evaluations, s."""
        return time.perf_counter() - self.start - self.stopped_s

    def evaluate(self) -> float:
        """Success rate of the mean action on the held-out episodes; kept in `points`."""
        before, wall_s, seeds = time.perf_counter(), self.wall_s(), [TEST_SEED + i for i in range(self.args.episodes)]
        episodes = evaluate(lambda obs: self.model.predict(obs, deterministic=True)[0], self.eval_envs, seeds)
        success = episode_mean(episodes, "success")
        self.points.append({"steps": self.num_timesteps, "wall_s": wall_s, "success": success})
        self.stopped_s += time.perf_counter() - before
        return success


def train_sb3(args: Args, name: str, seed: int) -> list[dict[str, float]]:
    """Train with stable-baselines3; returns steps, wall_s and success of every evaluation."""
    setting = SETTINGS[name]
    arguments = setting.settings(setting.num_envs)
    envs = BatchedEnv(setting.num_envs, arguments.get("gamma", 0.99), seed)
    clock = Clock(args)
    model = setting.algorithm("MlpPolicy", envs, device="cpu", seed=seed, **arguments)
    model.learn(args.total_timesteps, callback=clock)
    envs.close()
    return clock.points


# ---------------------------------------------------------------------------------------------------------------------
# ours


OURS = {
    "ours": ("this trainer, 50,000 steps", ["ppo_residual_so101.py", "--total-timesteps", "50000"], 2048),
    "our_sac": ("`python -m so101.sac`, 20,000 steps", ["-m", "so101.sac", "--total-timesteps", "20000"], 1000),
}  # title, command, steps between checkpoints


def train_ours(args: Args, name: str, seed: int) -> list[dict[str, float]]:
    """Train as a user does, without evaluations; returns steps, wall_s and success of the checkpoints up to the target.

    The whole run is timed; every step takes the same share of it.
    """
    _, command, every = OURS[name]
    points: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        run, result = Path(directory) / "run", Path(directory) / "result.json"
        flags = ["--seed", str(seed), "--log-dir", directory, "--run-name", "run", "--num-threads", "1"]
        flags += ["--eval-every", "0", "--checkpoint-every", str(every)]
        subprocess.run([sys.executable, *command, *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "training_summary.json").read_text())
        models = sorted((run / "checkpoints").glob("*.pt"), key=lambda path: int(path.stem.split("_")[-2]))  # by steps
        for model in [*models, run / "final_model.pt"]:
            flags = ["--model", str(model), "--episodes", str(args.episodes), "--no-base", "--num-threads", "1"]
            evaluation = [sys.executable, "eval_so101.py", *flags, "--json", str(result)]
            subprocess.run(evaluation, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            found = json.loads(result.read_text())
            share = found["training_steps"] / summary["total_timesteps"]
            point = {"steps": found["training_steps"], "wall_s": summary["wall_time_s"] * share}
            points.append(point | {"success": found["success_rate"]})
            if found["success_rate"] >= args.target:
                break
    return points


# ---------------------------------------------------------------------------------------------------------------------
# report


def success_after(points: list[dict[str, float]], steps: int) -> float | None:
    """Success in the evaluation nearest to these steps; None if the run had none within 5 %."""
    nearest = min(points, key=lambda point: abs(point["steps"] - steps))
    return nearest["success"] if abs(nearest["steps"] - steps) <= 0.05 * steps else None


def markdown(args: Args, runs: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The table: a row per trainer."""
    lines = [
        "# stable-baselines3", "",
        f"`python benchmark/sb3_baseline.py`: time until {args.target:g} success on {args.episodes} held-out episodes; "
        f"one thread, at most {args.limit_minutes:g} minutes and {args.total_timesteps:,} steps.", "",
        f"| trainer | seeds | time to {args.target:g}, s | steps then | otherwise: best success, steps, s |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    titles = {name: title for name, (title, *_) in OURS.items()} | {name: each.title for name, each in SETTINGS.items()}
    for name, title in titles.items():
        if name not in runs:
            continue
        there, steps, short = [], [], []
        for points in runs[name].values():
            last, best = points[-1], max(point["success"] for point in points)
            if last["success"] >= args.target:
                there.append(f"{last['wall_s']:.0f}")
                steps.append(f"{last['steps']:,.0f}")
            else:
                short.append(f"{best:.2f} ({last['steps']:,.0f}, {last['wall_s']:.0f})")
        columns = [title, ", ".join(runs[name]), ", ".join(there), ", ".join(steps), "; ".join(short)]
        lines.append("| " + " | ".join(columns) + " |")
    lines += ["", f"| trainer | success after {COMPARED_STEPS:,} steps |", "|---|---|"]
    for name in SETTINGS:
        at = [success_after(points, COMPARED_STEPS) for points in runs.get(name, {}).values()]
        if any(each is not None for each in at):
            lines.append(f"| {titles[name]} | {', '.join(f'{each:.2f}' for each in at if each is not None)} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """All runs, one after the other; returns the exit code."""
    args = parse(Args, __doc__)
    torch.set_num_threads(1)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "runs.json"
    for name in args.only or (*OURS, *SETTINGS):
        for seed in args.seeds:
            runs = json.loads(path.read_text()) if path.is_file() else {}
            if str(seed) in runs.get(name, {}):
                continue
            points = (train_ours if name in OURS else train_sb3)(args, name, seed)
            runs = json.loads(path.read_text()) if path.is_file() else {}  # another process may have added its own
            runs.setdefault(name, {})[str(seed)] = points
            write_json(path, runs)
            (out / "results.md").write_text(markdown(args, runs))
            print(f"{name}, seed {seed}: {points[-1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
