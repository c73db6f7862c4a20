"""Speed in environment steps per second: raw physics, the batched environment, training, and stable-baselines3.

    pip install -r benchmark/requirements.txt && python benchmark/throughput.py

Physics with contact costs twice as much as without, so raw physics is measured on the states and commands of a training
run. Compare ratios, not speeds, between machines.
"""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import mujoco
import mujoco.rollout
import numpy as np
import torch
import torch.distributed as dist
from gymnasium.vector import AutoresetMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from so101.checkpoints import load_script
from so101.cli import parse, run_script
from so101.distributed import World
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
    processes: bool = True
    """also measure training with one and two processes, and predict from its costs the speed with more"""
    network_latency_us: float = 50.0
    """latency of a message between machines, for these predictions"""
    network_gbit_s: float = 10.0
    """bandwidth between machines, for these predictions"""


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


def time_processes(count: int, steps: int) -> float:
    """Steps/s of training with this many ranks of one physics thread each, without evaluations and start."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += [TRAINER.__file__, "--log-dir", directory, "--num-threads", "1"]
        command += ["--total-timesteps", str(steps), "--eval-every", "0"]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
        summary = json.loads(next(Path(directory).glob("*/training_summary.json")).read_text())
    return summary["steps_per_second"]


def time_message(rank: int, store: str, size: int, times: multiprocessing.Queue) -> None:
    """Run in each of two processes: put the seconds of an all-reduce of size numbers between them into times."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    tensor, repeats = torch.zeros(size), 300
    for number in range(2 * repeats):  # the first half warms up
        if number == repeats:
            start = time.perf_counter()
        dist.all_reduce(tensor)
    times.put((time.perf_counter() - start) / repeats)
    dist.destroy_process_group()


def time_all_reduce(size: int) -> float:
    """Seconds of an all-reduce of size numbers between two processes on this machine."""
    context = multiprocessing.get_context("spawn")
    times = context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        args = (f"{directory}/store", size, times)
        workers = [context.Process(target=time_message, args=(rank, *args)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        seconds = max(times.get() for _ in workers)
        for worker in workers:
            worker.join()
    return seconds


@dataclasses.dataclass
class Costs:
    """Costs of the parts of training in one process with one thread: seconds at size zero, and per unit of size."""

    physics: tuple[float, float]
    """physics of a control step; the unit is an environment"""
    python: tuple[float, float]
    """the rest of a control step, including the actor; the unit is an environment"""
    update: tuple[float, float]
    """gradient step; the unit is a sample of the minibatch"""
    message: tuple[float, float]
    """message from one process to the next; the unit is a byte"""
    gradient_bytes: int
    """size of the gradient"""

    def steps_per_second(
        self, ranks: int, num_envs: int, minibatch_size: int, between: tuple[float, float] | None = None
    ) -> float:
        """Predicted steps/s of training.

        Args:
            ranks: number of processes.
            num_envs, minibatch_size: totals over all ranks.
            between: cost of a message between machines, in seconds, like `message`; None: one machine.
        """
        ppo = TRAINER.Args().ppo
        hop = tuple(map(max, self.message, between or self.message))  # a ring is as slow as its slowest link
        hops = 2 * (ranks - 1)  # messages in a row for an all-reduce in a ring, each with a share of the numbers
        rollout = ppo.num_steps * sum(at + each * num_envs / ranks for at, each in (self.physics, self.python))
        gradient = hops * (hop[0] + hop[1] * self.gradient_bytes / ranks)
        minibatch = self.update[0] + self.update[1] * minibatch_size / ranks + gradient
        update = ppo.update_epochs * (num_envs * ppo.num_steps // minibatch_size) * minibatch
        gather = 2 * (ranks - 1) * hop[0]  # sizes and contents of small objects
        # every rollout gathers signals once, metrics and episodes once
        return num_envs * ppo.num_steps / (rollout + update + 2 * gather)


def line(sizes: tuple[int, int], seconds: tuple[float, float]) -> tuple[float, float]:
    """Seconds at size zero and per unit of size: a line through the measurements at two sizes."""
    each = (seconds[1] - seconds[0]) / (sizes[1] - sizes[0])
    return max(0.0, seconds[0] - each * sizes[0]), each


def time_parts(agent: torch.nn.Module, num_envs: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Seconds of physics, and of the rest, in a control step of a rollout; and the buffers of that rollout."""
    envs, inside = TRAINER.make_envs(TRAINER.Args(), num_envs, num_threads=1), 0.0
    step = envs.arms.batch.step

    def timed(*positional, **named):
        nonlocal inside
        start = time.perf_counter()
        step(*positional, **named)
        inside += time.perf_counter() - start

    envs.arms.batch.step = timed
    noise = np.random.default_rng(0).normal(size=(100, num_envs, ACT_DIM)).astype(np.float32)
    next_obs, start = envs.reset(seed=0)[0], time.perf_counter()
    buffers, _, _ = TRAINER.rollout(agent, envs, next_obs, noise)
    return inside / len(noise), (time.perf_counter() - start - inside) / len(noise), buffers


def measure_costs(repeats: int) -> Costs:
    """The costs on this machine, the best of some repeats."""
    physics, python, update = {}, {}, {}
    args, world = TRAINER.Args(), World()
    agent = TRAINER.Agent(args)
    for num_envs in (16, 128) * repeats:
        inside, rest, buffers = time_parts(agent, num_envs)
        physics[num_envs] = min(physics.get(num_envs, np.inf), inside)
        python[num_envs] = min(python.get(num_envs, np.inf), rest)
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-4, fused=True)
    for size in (64, 512) * repeats:
        args.ppo.minibatch_size, generator = size, torch.Generator().manual_seed(0)
        count, start = -(-buffers["rewards"].numel() // size) * args.ppo.update_epochs, time.perf_counter()
        TRAINER.update(agent, optimizer, buffers, args.ppo, generator, world)
        update[size] = min(update.get(size, np.inf), (time.perf_counter() - start) / count)
    numbers = sum(parameter.numel() for parameter in agent.parameters())
    small, large = (min(time_all_reduce(size) for _ in range(repeats)) for size in (1, numbers))
    # an all-reduce between two processes is two messages with half of the numbers each
    message = (small / 2, max(0.0, large - small) / (4 * numbers))
    return Costs(
        *(line(tuple(seconds), tuple(seconds.values())) for seconds in (physics, python, update)), message, 4 * numbers
    )  # fmt: skip


def show_processes(args: Args) -> None:
    """Measure training with one and two processes and the costs of its parts, and predict the speed with more."""
    measured = {count: max(time_processes(count, args.steps) for _ in range(args.repeats)) for count in (1, 2)}
    costs = measure_costs(args.repeats)
    print("\ncosts of the parts of training, one thread, in microseconds: fixed, and per unit")
    for name, unit in (
        ("physics", "environment and control step"), ("python", "environment and control step"),
        ("update", "sample of a minibatch"), ("message", "kilobyte"),
    ):  # fmt: skip
        at, each = getattr(costs, name)
        print(f"{name:10}{1e6 * at:10.1f}{1e6 * each * (1000 if name == 'message' else 1):10.2f} per {unit}")
    print(f"a gradient has {costs.gradient_bytes / 1000:.0f} kB")
    print("\npredicted steps/s, one process per core: the default run; 32 environments and 512 samples per process")
    between = (1e-6 * args.network_latency_us, 8e-9 / args.network_gbit_s)
    ppo = TRAINER.Args().ppo
    for machines, count in ((1, 1), (1, 2), (1, 4), (1, 16), (1, 64), (4, 64), (16, 256)):
        link = between if machines > 1 else None
        fixed = costs.steps_per_second(count, ppo.num_envs, ppo.minibatch_size, link) if count <= ppo.num_envs else None
        grown = costs.steps_per_second(count, ppo.num_envs * count, ppo.minibatch_size * count, link)
        cells = [f"{fixed:8.0f}" if fixed else f"{'-':>8}", f"{grown:8.0f}"]
        if machines == 1 and count in measured:
            cells.append(f"   measured with the default run {measured[count]:8.0f}")
        print(f"{machines:3} machines {count:4} processes " + " ".join(cells), flush=True)


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
    if args.processes:
        show_processes(args)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
