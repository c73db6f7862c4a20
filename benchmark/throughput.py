"""Speed in environment steps per second: raw physics, the batched environment, training, and stable-baselines3.

    pip install -r benchmark/requirements.txt && python benchmark/throughput.py

Physics with contact costs twice as much as without, so raw physics is measured on the states and commands of a training
run. Compare ratios, not speeds, between machines.
"""

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import mujoco
import mujoco.rollout
import numpy as np
import torch
from gymnasium.vector import AutoresetMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.checkpoints import load_script
from so101.cli import parse, run_script
from so101_env import SO101ResidualVectorEnv
from so101_sim.control import ACT_DIM
from so101_sim.vector import ArmVectorEnv

TRAINER = load_script("ppo_residual_so101.py")


@dataclasses.dataclass
class Args:
    num_envs: int = 8
    """parallel environments"""
    num_threads: int = os.cpu_count() or 1
    """physics threads"""
    steps: int = 50_000
    """environment steps of every measurement"""
    repeats: int = 3
    """repeats of all measurements; the best of each counts, because other programs can only slow one down"""
    sb3: bool = True
    """also measure stable-baselines3"""
    scaling: bool = True
    """also measure other numbers of environments and threads"""
    pixels: bool = True
    """also measure environments with a picture of each step"""


def num_steps(num_envs: int) -> int:
    """Steps per environment and rollout for which rollouts have the trainer's default size; at least 8."""
    default = TRAINER.Args().ppo
    return max(8, default.num_envs * default.num_steps // num_envs)


def time_training(args: Args, steps: int, *flags: str, record: list | None = None) -> float:
    """Steps/s of ppo_residual_so101.py, including checkpoints, without the import of libraries.

    Args:
        args: number of environments and threads.
        steps: budget.
        flags: further flags of the trainer.
        record: gets the inputs of physics for every training step: time, qpos, qvel, warm start and ctrl,
            (num_envs, ...) each.
    """
    original = ArmVectorEnv.step
    if record is not None:

        def step(envs: ArmVectorEnv, actions: np.ndarray):
            if envs.metadata["autoreset_mode"] == AutoresetMode.DISABLED:  # an evaluation
                return original(envs, actions)
            batch = envs.arms.batch
            state = [batch.bind(name).copy() for name in ("time", "qpos", "qvel", "qacc_warmstart")]
            ctrl = batch.bind("ctrl")
            batch_step = batch.step

            def spy(*positional, **named):
                record.append((*state, ctrl.copy()))
                batch_step(*positional, **named)

            batch.step = spy
            try:
                return original(envs, actions)
            finally:
                batch.step = batch_step

        ArmVectorEnv.step = step
    try:
        with tempfile.TemporaryDirectory() as directory:
            sys.argv = ["ppo_residual_so101.py", "--log-dir", directory, "--num-threads", str(args.num_threads)]
            sys.argv += ["--num-envs", str(args.num_envs), "--num-steps", str(num_steps(args.num_envs))]
            sys.argv += ["--total-timesteps", str(steps), *flags]
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                assert TRAINER.main() == 0
            summary = json.loads(next(Path(directory).glob("*/training_summary.json")).read_text())
    finally:
        ArmVectorEnv.step = original
    return summary["steps_per_second"]


def time_rollout(args: Args, record: list) -> float:
    """Steps/s of mujoco.rollout with the recorded states and commands of training: physics only."""
    envs = SO101ResidualVectorEnv(args.num_envs, num_threads=args.num_threads)
    envs.reset(seed=0)
    substeps = envs.arms.substeps
    models = [envs.arms.batch.get_model(i) for i in range(args.num_envs)]
    data = [mujoco.MjData(envs.model) for _ in range(args.num_threads)]
    inputs = [
        (np.column_stack([t, qpos, qvel]), warmstart, np.repeat(ctrl[:, None], substeps, axis=1))
        for t, qpos, qvel, warmstart, ctrl in record
    ]
    state = np.zeros((args.num_envs, substeps, inputs[0][0].shape[1]))
    sensors = np.zeros((args.num_envs, substeps, envs.model.nsensordata))
    with mujoco.rollout.Rollout(nthread=args.num_threads) as rollout:
        start = time.perf_counter()
        for initial_state, warmstart, control in inputs:
            rollout.rollout(
                models, data, initial_state, control, initial_warmstart=warmstart, state=state, sensordata=sensors
            )
        return len(inputs) * args.num_envs / (time.perf_counter() - start)


def time_batch(args: Args, record: list) -> float:
    """The same with mujoco.batch, which the environment uses."""
    envs = SO101ResidualVectorEnv(args.num_envs, num_threads=args.num_threads)
    envs.reset(seed=0)
    batch, substeps = envs.arms.batch, envs.arms.substeps
    bound = [batch.bind(name) for name in ("time", "qpos", "qvel", "qacc_warmstart", "ctrl")]
    start = time.perf_counter()
    for values in record:
        for array, value in zip(bound, values):
            array[:] = value
        batch.step(nstep=substeps)
    return len(record) * args.num_envs / (time.perf_counter() - start)


def time_steps(envs: gym.vector.VectorEnv, steps: int) -> float:
    """Steps/s of environments with random actions, over about this many steps; closes the environments."""
    envs.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (100, envs.num_envs, ACT_DIM)).astype(np.float32)
    count, start = max(1, steps // envs.num_envs), time.perf_counter()
    for t in range(count):
        envs.step(actions[t % 100])
    elapsed = time.perf_counter() - start
    envs.close()
    return count * envs.num_envs / elapsed


def time_env(args: Args) -> float:
    """Steps/s of the batched environment."""
    return time_steps(SO101ResidualVectorEnv(args.num_envs, num_threads=args.num_threads), args.steps)


def time_pixels(args: Args, size: int, threads: int, visual: bool = False) -> float:
    """Steps/s of the batched environment with a picture of each step."""
    kwargs = {"observe": "pixels", "image_size": (size, size), "visual_randomization": visual}
    envs = SO101ResidualVectorEnv(args.num_envs, num_threads=threads, **kwargs)
    return time_steps(envs, args.steps // 20)  # slow, and its variance is small


def make_single_env() -> gym.Env:
    """Make one environment in a worker process."""
    import so101_env

    return so101_env.SO101ResidualEnv()


def time_gymnasium(args: Args, vector_env: type[gym.vector.VectorEnv]) -> float:
    """Steps/s of a Gymnasium vector environment of single environments."""
    return time_steps(vector_env([make_single_env] * args.num_envs), args.steps // 4)  # slow, and its variance is small


def time_sb3(args: Args) -> float:
    """Steps/s of stable-baselines3's PPO with SubprocVecEnv and our hyper-parameters, without starting processes."""
    from sb3_baseline import our_settings
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import SubprocVecEnv

    torch.set_num_threads(1)  # faster than its default for networks this small
    envs = SubprocVecEnv([make_single_env] * args.num_envs, start_method="spawn")
    settings = our_settings(args.num_envs)
    model, n_steps = PPO("MlpPolicy", envs, device="cpu", seed=1, **settings), settings["n_steps"]
    steps = max(1, round(args.steps / (args.num_envs * n_steps))) * args.num_envs * n_steps
    start = time.perf_counter()
    model.learn(steps)
    elapsed = time.perf_counter() - start
    envs.close()
    return steps / elapsed


def main() -> int:
    """Measure and print; returns the exit code."""
    args = parse(Args, __doc__)
    torch.set_num_threads(1)
    record: list = []
    time_training(args, 1000)  # warm-up: PyTorch imports parts of itself when first used
    time_training(args, args.steps, record=record)
    rows = {
        "raw physics of that training, mujoco.rollout": lambda: time_rollout(args, record),
        "raw physics of that training, mujoco.batch": lambda: time_batch(args, record),
        "batched env, random actions": lambda: time_env(args),
        "Gymnasium SyncVectorEnv, random actions": lambda: time_gymnasium(args, gym.vector.SyncVectorEnv),
        "Gymnasium AsyncVectorEnv, random actions": lambda: time_gymnasium(args, gym.vector.AsyncVectorEnv),
        "training, end to end": lambda: time_training(args, args.steps, "--eval-every", "0"),
        "training, including its evaluations": lambda: time_training(args, args.steps),
    }
    if args.sb3:
        rows["stable-baselines3 PPO, SubprocVecEnv"] = lambda: time_sb3(args)
    setting = f"{args.num_envs} environments, {args.num_threads} threads, {args.steps} steps, best of {args.repeats}"
    print(f"environment steps/s; {setting}")
    speed = dict.fromkeys(rows, 0.0)
    for _ in range(args.repeats):
        for name, measure in rows.items():
            speed[name] = max(speed[name], measure())
    for name in rows:
        print(f"{name:46}{speed[name]:10.0f}")
    for name in list(rows)[:2] + list(rows)[7:]:
        print(f"{'training / ' + name:58}{speed['training, end to end'] / speed[name]:6.2f}")
    if args.scaling:
        print("\nsteps/s over environments and threads: batched env with random actions, training end to end")
        threads = sorted({1, *(2**k for k in range(10) if 2**k < args.num_threads), args.num_threads})
        for num_envs in (8, 32, 128, 512):
            cells = []
            for count in threads:
                setting = dataclasses.replace(args, num_envs=num_envs, num_threads=count)
                env, training = time_env(setting), time_training(setting, args.steps, "--eval-every", "0")
                cells.append(f"{count} threads {env:8.0f} {training:8.0f}")
            print(f"{num_envs:4} environments  " + "   ".join(cells), flush=True)
    if args.pixels:
        print("\nsteps/s with a picture of each step, random actions: plain, and with visual randomisation")
        for size in (64, 96, 128):
            cells = []
            for count in sorted({1, args.num_threads}):
                plain, visual = (
                    max(time_pixels(args, size, count, on) for _ in range(args.repeats)) for on in (False, True)
                )
                cells.append(f"{count} threads {plain:6.0f} {visual:6.0f}")
            print(f"{size:4} pixels  " + "   ".join(cells), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
