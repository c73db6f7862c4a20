"""How fast is it, in environment steps per second: raw physics, the batched environment, training, and its peer.

    pip install -r benchmark/requirements.txt && python benchmark/throughput.py

All figures of one call come from one machine in one state; the ratios are what carries over to other machines.
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
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo_residual_so101 as ppo
from so101_env import ACT_DIM, SO101ResidualVectorEnv


@dataclasses.dataclass
class BenchmarkArgs:
    num_envs: int = 8
    """environments side by side"""
    num_threads: int = os.cpu_count() or 1
    """physics threads"""
    steps: int = 20_000
    """environment steps of each measurement"""
    training_steps: int = 50_000
    """environment steps of the training run, evaluations included as in a user's run"""
    sb3: bool = True
    """measure stable-baselines3, too"""


def random_commands(envs: SO101ResidualVectorEnv, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What physics meets under random actions: state before each control step (T, N, nstate), ctrl (T, N, 6)."""
    spec = mujoco.mjtState.mjSTATE_FULLPHYSICS.value
    rng, states, controls = np.random.default_rng(seed), [], []
    envs.reset(seed=seed)
    data = mujoco.MjData(envs.model)
    for _ in range(200):
        rows = np.zeros((envs.num_envs, mujoco.mj_stateSize(envs.model, spec)))
        for i in range(envs.num_envs):
            mujoco.mj_getState(envs.model, envs.batch.get_data(i, data), rows[i], spec)
        envs.step(rng.uniform(-1, 1, (envs.num_envs, ACT_DIM)))
        states.append(rows)
        controls.append(envs.batch.bind("ctrl").copy())
    return np.array(states), np.array(controls)


def time_rollout(args: BenchmarkArgs) -> float:
    """Steps/s of mujoco.rollout on the states and commands of random actions: nothing but physics."""
    envs = SO101ResidualVectorEnv(args.num_envs, num_threads=args.num_threads)
    states, controls = random_commands(envs, seed=0)
    substeps = round(1 / 30 / envs.model.opt.timestep)
    controls = np.repeat(controls[:, :, None], substeps, axis=2)
    models = [envs.batch.get_model(i) for i in range(args.num_envs)]
    data = [mujoco.MjData(envs.model) for _ in range(args.num_threads)]
    state = np.zeros((args.num_envs, substeps, states.shape[-1]))
    sensors = np.zeros((args.num_envs, substeps, envs.model.nsensordata))
    with mujoco.rollout.Rollout(nthread=args.num_threads) as rollout:
        start = time.perf_counter()
        for t in range(args.steps // args.num_envs):
            k = t % len(states)
            rollout.rollout(models, data, states[k], controls[k], state=state, sensordata=sensors)
        return args.steps / (time.perf_counter() - start)


def time_batch(args: BenchmarkArgs) -> float:
    """The same with mujoco.batch, which keeps the state between calls and which the environment is built on."""
    envs = SO101ResidualVectorEnv(args.num_envs, num_threads=args.num_threads)
    states, controls = random_commands(envs, seed=0)
    qpos, qvel, ctrl = (envs.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
    nq, nv = envs.model.nq, envs.model.nv
    start = time.perf_counter()
    for t in range(args.steps // args.num_envs):
        k = t % len(states)
        qpos[:], qvel[:], ctrl[:] = states[k, :, 1 : 1 + nq], states[k, :, 1 + nq : 1 + nq + nv], controls[k]
        envs.batch.step(nstep=8)
    return args.steps / (time.perf_counter() - start)


def time_env(args: BenchmarkArgs) -> float:
    """Steps/s of the batched environment under random actions."""
    envs = SO101ResidualVectorEnv(args.num_envs, num_threads=args.num_threads)
    envs.reset(seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (100, args.num_envs, ACT_DIM)).astype(np.float32)
    start = time.perf_counter()
    for t in range(args.steps // args.num_envs):
        envs.step(actions[t % 100])
    return args.steps / (time.perf_counter() - start)


def time_training(args: BenchmarkArgs) -> float:
    """Steps/s of ppo_residual_so101.py from its first line to its last, evaluations and checkpoints included."""
    with tempfile.TemporaryDirectory() as directory:
        sys.argv = ["ppo_residual_so101.py", "--log-dir", directory, "--num-threads", str(args.num_threads)]
        sys.argv += ["--num-envs", str(args.num_envs), "--total-timesteps", str(args.training_steps)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert ppo.main() == 0
        summary = json.loads(next(Path(directory).glob("*/training_summary.json")).read_text())
    return summary["steps_per_second"]


def make_single_env() -> gym.Env:
    """One environment for a stable-baselines3 worker process."""
    import so101_env

    return so101_env.SO101ResidualEnv()


def time_sb3(args: BenchmarkArgs) -> float:
    """Steps/s of stable-baselines3's PPO with SubprocVecEnv, same hyper-parameters, process start not counted."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import SubprocVecEnv

    ours = ppo.Args()
    torch.set_num_threads(1)  # faster than its default for networks this small
    envs = SubprocVecEnv([make_single_env] * args.num_envs, start_method="spawn")
    model = PPO(
        "MlpPolicy", envs, learning_rate=ours.learning_rate, n_steps=ours.num_steps, batch_size=ours.minibatch_size,
        n_epochs=ours.update_epochs, gamma=ours.gamma, gae_lambda=ours.gae_lambda, clip_range=ours.clip_coef,
        ent_coef=ours.ent_coef, vf_coef=ours.vf_coef, max_grad_norm=ours.max_grad_norm, device="cpu", seed=1,
        policy_kwargs={"net_arch": [64, 64], "log_std_init": ours.log_std_init},
    )  # fmt: skip
    steps = max(1, round(args.steps / (args.num_envs * ours.num_steps))) * args.num_envs * ours.num_steps
    start = time.perf_counter()
    model.learn(steps)
    elapsed = time.perf_counter() - start
    envs.close()
    return steps / elapsed


def main() -> None:
    args = tyro.cli(BenchmarkArgs, description=__doc__)
    torch.set_num_threads(1)
    print(f"{args.num_envs} environments, {args.num_threads} threads, 8 substeps of 1/240 s, steps/s")
    rows = {"raw physics, mujoco.rollout": time_rollout, "raw physics, mujoco.batch": time_batch}
    rows |= {"batched env, random actions": time_env, "training, end to end": time_training}
    if args.sb3:
        rows["stable-baselines3 PPO, SubprocVecEnv"] = time_sb3
    speed = {}
    for name, measure in rows.items():
        speed[name] = measure(args)
        print(f"{name:40}{speed[name]:10.0f}", flush=True)
    training = speed["training, end to end"]
    print(f"{'training / physics (mujoco.rollout)':40}{training / speed['raw physics, mujoco.rollout']:10.2f}")
    print(f"{'training / physics (mujoco.batch)':40}{training / speed['raw physics, mujoco.batch']:10.2f}")
    if args.sb3:
        print(f"{'training / stable-baselines3':40}{training / speed['stable-baselines3 PPO, SubprocVecEnv']:10.2f}")


if __name__ == "__main__":
    main()
