"""Distil a policy that knows the sheet's pose into a camera policy, by DAgger, in one file: fork it and change it.

    python -m so101.distill --model logs/RUN/best_model/best_model.pt

The student gets what a real arm has: camera pictures, joints, the last commanded targets. Its network estimates the
sheet's pose and outputs a residual, like the teacher. The teacher's base policy acts on the student's estimate. The
student acts, the teacher labels every step with its own residual, and the student is trained on all labels so far
(DAgger: Ross et al. 2011, arXiv:1011.0686). Top to bottom: Args, Student, StudentPolicy, Dagger, loss, update, main.

A copy of this file works like the original: a student is loaded through the script that wrote it, by its load_student.
The result is a policy like any other: `--model final_model.pt` in eval_so101.py, `--base-policy checkpoint:PATH`.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from so101.base import BasePolicy, StackedPolicy, check_base, flat_observation, with_sheet
from so101.checkpoint_policy import CheckpointPolicy
from so101.checkpoints import (
    STUDENT,
    hash_weights,
    is_rate,
    load_weights,
    restore_optimizer,
    restoring,
    to_numpy,
    to_plain,
)
from so101.cli import check_cameras, check_flags, check_memory, run_script
from so101.distributed import World
from so101.evaluation import VALIDATION_SEED, episode_mean, evaluate, no_residual, training_seeds
from so101.files import is_file
from so101.networks import MEASURED_DIM, POSE_SCALE, SheetFinder, scaled_pose
from so101.policies import load_policy
from so101.recorder import Recorder, Run
from so101.resume import parse_run
from so101.run_dirs import run_dir_of
from so101.server import Server
from so101.settings import restore_args, restore_settings, trusted_base
from so101.trust import Trust
from so101_env import (
    ACT_DIM,
    COMMAND,
    MAX_EPISODE_STEPS,
    MEASURED,
    OBS,
    OBSERVATION,
    TAPE_CENTER_M,
    SO101Error,
    SO101ResidualVectorEnv,
    Task,
)
from so101_sim.errors import check_arrays
from so101_sim.scene import ASSETS
from so101_sim.vector import IMAGES, BaseObservation

SCRIPT = Path(__file__).name
LAG_SCALE_RAD = 0.02  # scale of commanded minus measured joint positions, which show how hard the finger presses
# every minibatch is split in two halves, whatever the number of cores, so that the sum of their gradients is the same
SHARDS = 2


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class Networks:
    """The student."""

    cameras: tuple[str, ...] = ("top",)
    """cameras of the student: top, wrist"""
    image_size: int = 96
    """side of the pictures, pixels"""
    hidden_size: int = 128
    """units in each hidden layer"""


@dataclasses.dataclass
class DAgger:
    """The algorithm."""

    num_envs: int = 32
    """parallel environments"""
    num_steps: int = 64
    """steps per environment between updates"""
    teacher_steps: int = 4096
    """first steps, in which the teacher acts"""
    updates: int = 64
    """gradient steps after each rollout"""
    minibatch_size: int = 128
    """samples per gradient step"""
    learning_rate: float = 1e-3
    """highest step size of AdamW; it rises over the first tenth and falls along half a cosine"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    pose_coef: float = 1.0
    """weight of the loss of the sheet's pose"""
    max_grad_norm: float = 1.0
    """gradient clipping by norm"""
    train_episode_steps: int = 200
    """time-out of training episodes in control steps: a new start teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Args:
    model: str = os.path.relpath(ASSETS / "pretrained.pt")
    """checkpoint of the teacher, with its base policy"""
    visual_randomization: bool = False
    """randomise what the cameras see, for a student that is meant for a real table"""
    seed: int = 1
    """seed of weights, minibatches and environments"""
    total_timesteps: int = 60_000
    """environment steps in all; never exceeded. All pictures are kept in memory, compressed: 8 kB a step, 19 kB with
    --visual-randomization"""
    networks: Networks = dataclasses.field(default_factory=Networks)
    dagger: DAgger = dataclasses.field(default_factory=DAgger)
    trust: Trust = dataclasses.field(default_factory=Trust)
    run: Run = dataclasses.field(default_factory=lambda: Run(eval_episodes=32))


RANGES = {
    "seed": (0, 2**32 - 1), "total_timesteps": (1, 10**7), "image_size": (16, 512), "hidden_size": (1, 4096),
    "num_envs": (1, 4096), "num_steps": (1, 2**16), "teacher_steps": (0, 10**8), "updates": (1, 10**6),
    "minibatch_size": (SHARDS, 2**20), "learning_rate": (1e-9, 10), "weight_decay": (0, 10), "pose_coef": (0, 1e3),
    "max_grad_norm": (1e-6, 1e6), "train_episode_steps": (1, 10**6), **Run.RANGES,
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range."""
    for settings in (args, args.networks, args.dagger, args.run):
        check_flags(settings, RANGES)
    check_cameras("--cameras", args.networks.cameras)
    args.run.check_name()


@dataclasses.dataclass
class Base:
    """The base policy that the student's residual corrects, the teacher's. It is kept in the student's file."""

    base_policy: str
    server: Server


# ---------------------------------------------------------------------------------------------------------------------
# the student


_MEASURED_PARTS = [(OBS[name], OBSERVATION[name]) for name in MEASURED]
KNOWN_DIM = MEASURED_DIM + ACT_DIM  # measurements and lag


def measured(obs: BaseObservation) -> np.ndarray:
    """The student's inputs besides pictures, (N, 21) float32, normalised: joints, velocities, tip, lag."""
    flat = flat_observation(obs)
    parts = [(flat[:, where] - part.mean) / part.scale for where, part in _MEASURED_PARTS]
    lag = (obs[COMMAND] - flat[:, OBS["joint_pos"]]) / LAG_SCALE_RAD
    return np.concatenate([*parts, lag], axis=1).astype(np.float32)


class Student(nn.Module):
    """The sheet's pose and the residual, from pictures, measurements and the base policy's action."""

    def __init__(self, net: Networks):
        super().__init__()
        width = net.hidden_size
        self.finder = SheetFinder(len(net.cameras), net.image_size, KNOWN_DIM, width)
        self.residual = nn.Sequential(
            nn.Linear(KNOWN_DIM + SheetFinder.DIM + ACT_DIM, width), nn.ReLU(), nn.Linear(width, width),
            nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, ACT_DIM),
        )  # fmt: skip

    def act(self, found: torch.Tensor, measured: torch.Tensor, base_delta: torch.Tensor) -> torch.Tensor:
        """Residual (B, 6), unclipped, from the output of `finder` and the base policy's deltas (B, 6) per act_scale."""
        return self.residual(torch.cat([measured, found, base_delta], dim=1))


class StudentPolicy(StackedPolicy):
    """A student as base policy, on a base policy of its own, which may see cameras, too."""

    def __init__(self, student: Student, base: BasePolicy | None, net: Networks, task: Task):
        super().__init__(base, net.cameras, (net.image_size, net.image_size))
        self.student, self.own_cameras, self.task = student, net.cameras, task
        self.scale_rad, self.act_scale = task.alpha * task.act_scale, task.act_scale

    @torch.inference_mode()
    def look(self, obs: BaseObservation, mask: np.ndarray) -> dict[str, Any]:
        """Pictures, measurements and findings of the environments in mask, (N,) bool; also sets `estimate`."""
        seen = obs.rows(mask)
        images = [seen[IMAGES + camera] for camera in self.own_cameras]
        state = measured(seen)
        found, pose = self.student.finder([torch.from_numpy(image) for image in images], torch.from_numpy(state))
        estimate = np.zeros((len(mask), 3))
        estimate[mask] = pose.numpy() * POSE_SCALE
        estimate[:, :2] += TAPE_CENTER_M
        self.estimate = estimate
        return {"images": images, "measured": state, "found": found}

    @torch.inference_mode()
    def own_residual(self, look: dict[str, Any], base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The student's residual (N, 6), rad, for the result of `look` and the base policy's deltas (N, 6), rad."""
        look["base_delta"] = (base_delta[mask] / self.act_scale).astype(np.float32)
        state, base = (torch.from_numpy(look[name]) for name in ("measured", "base_delta"))
        own = self.student.act(look["found"], state, base)
        residual = np.zeros((len(mask), ACT_DIM))
        residual[mask] = self.scale_rad * own.clamp(-1, 1).numpy()
        return residual

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): the base policy's, on the student's estimate, plus the student's residual."""
        look = self.look(obs, mask)
        base = self.base_delta(with_sheet(obs, self.estimate), mask)
        residual = self.own_residual(look, base, mask)
        self.residual[mask] = residual[mask]
        return base + residual


def load_student(saved: dict[str, Any], path: str, trust: Trust) -> StudentPolicy:
    """The student in the content of path, read by load_file.

    Raises SO101Error if it does not fit, or its base policy is not allowed.
    """
    args = restore_args(Args, check_args, saved["args"], path)
    base = trusted_base(restore_settings(Base, saved["base"], path), path, trust)
    student, base_policy = Student(args.networks), load_policy(base.base_policy, base.server)
    check_base(saved, base.base_policy, base_policy, path)
    load_weights(student, saved["agent"], path)
    policy = StudentPolicy(student, base_policy, args.networks, restore_settings(Task, saved["task"], path))
    policy.fingerprint = hash_weights(saved["agent"], f"{saved['base_fingerprint']} {policy.scale_rad}")
    return policy


def load_teacher(saved: dict[str, Any], path: str, trust: Trust) -> CheckpointPolicy:
    """The teacher of the student in the content of path, read by load_file.

    Raises SO101Error if it is missing, or what it needs is not allowed.
    """
    teacher = restore_settings(Args, saved["args"], path).model
    if not is_file(teacher):
        raise SO101Error(f"{path}: its teacher, {teacher}, is missing; evaluate without it: --no-base")
    policy = CheckpointPolicy(teacher, trust=trust)
    if policy.fingerprint != saved["teacher_fingerprint"]:
        raise SO101Error(f"{path}: its teacher, {teacher}, has other weights now; evaluate without it: --no-base")
    return policy


# ---------------------------------------------------------------------------------------------------------------------
# DAgger


class Dagger(StudentPolicy):
    """The student while it acts, or while its teacher acts; collects what it sees with the teacher's labels."""

    def __init__(self, student: Student, teacher: CheckpointPolicy, net: Networks, task: Task):
        super().__init__(student, teacher.base, net, task)
        self.teacher, self.teacher_acts, self.seen = teacher, False, {}
        self.cameras = tuple(dict.fromkeys((*net.cameras, *teacher.cameras)))

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6); afterwards `seen` has a row (n, ...) for each environment in mask."""
        look, flat = self.look(obs, mask), flat_observation(obs)[mask]
        base = self.base_delta(obs if self.teacher_acts else with_sheet(obs, self.estimate), mask)
        residual = self.own_residual(look, base, mask)
        answer = self.teacher.agent_residual(obs, base, mask)
        self.seen = {
            "images": look["images"], "measured": look["measured"], "base_delta": look["base_delta"],
            "residual": answer[mask], "pose": scaled_pose(flat),
        }  # fmt: skip
        if self.teacher_acts:
            residual = self.scale_rad * answer.astype(np.float64)
        self.residual[mask] = residual[mask]
        return base + residual


class Samples:
    """Everything the student has seen, with the teacher's labels. Raises SO101Error if memory cannot hold the pictures.

    Pictures are kept compressed without loss. Checkpoints do not contain them: they are rendered again from qpos,
    look_seed and steps, bit-identically.
    """

    def __init__(self, capacity: int, net: Networks):
        flags = "--total-timesteps, --image-size or the number of --cameras"
        check_memory(flags, int(0.7 * capacity * len(net.cameras) * 3 * net.image_size**2))  # noise compresses to 0.67
        self.count, self.cameras, self.size = 0, net.cameras, net.image_size
        self.pictures: list[list[bytes]] = [[] for _ in net.cameras]
        widths = {"measured": KNOWN_DIM, "base_delta": ACT_DIM, "residual": ACT_DIM, "pose": 3}
        self.rows = {name: np.empty((capacity, width), np.float32) for name, width in widths.items()}
        self.rows |= {"qpos": np.empty((capacity, 10))}
        self.rows |= {name: np.empty(capacity, np.int64) for name in ("look_seed", "steps")}

    def add_images(self, images: list[np.ndarray]) -> None:
        """Append the pictures of n samples, (n, H, W, 3) uint8 for each camera."""
        for own, new in zip(self.pictures, images):
            own += [zlib.compress(image.tobytes(), level=1) for image in new]

    def images(self, rows: np.ndarray) -> list[torch.Tensor]:
        """Pictures of these samples, (n, H, W, 3) uint8 for each camera."""
        shape = (len(rows), self.size, self.size, 3)
        raw = (bytearray().join(zlib.decompress(own[row]) for row in rows) for own in self.pictures)
        return [torch.frombuffer(each, dtype=torch.uint8).reshape(shape) for each in raw]

    def add(self, images: list[np.ndarray], **rows: np.ndarray) -> None:
        """Append n samples: (n, ...) each."""
        where = slice(self.count, self.count + len(rows["pose"]))
        self.add_images(images)
        for name, array in self.rows.items():
            array[where] = rows[name]
        self.count = where.stop

    def get_state(self) -> dict[str, np.ndarray]:
        """Everything but the pictures, as views."""
        return {name: array[: self.count] for name, array in self.rows.items()}

    def set_state(self, state: dict[str, np.ndarray], envs: SO101ResidualVectorEnv, count: int) -> None:
        """Inverse of get_state, for `count` samples. Raises SO101Error for a state that does not fit."""
        check_arrays({name: array[:count] for name, array in self.rows.items()}, state, "samples")
        for name, array in self.rows.items():
            array[:count] = state[name]
        for start in tqdm(
            range(0, count, 256), "rendering the samples", unit="batch", dynamic_ncols=True, disable=None, leave=False
        ):
            part = slice(start, min(start + 256, count))
            facts = (self.rows[name][part] for name in ("look_seed", "steps"))
            qpos, look_seed, steps = self.rows["qpos"][part], *facts
            size = (self.size, self.size)
            self.add_images([envs.camera_images(qpos, camera, size, look_seed, steps) for camera in self.cameras])
        self.count = count


def rollout(
    envs: SO101ResidualVectorEnv, dagger: Dagger, samples: Samples, num_steps: int
) -> list[dict[str, float]]:  # fmt: skip
    """Act for num_steps and keep what was seen and labelled; returns the finished episodes, a dict of values each."""
    no_correction = np.zeros((envs.num_envs, ACT_DIM))  # the student is the base policy of these environments
    episodes = []
    for _ in range(num_steps):
        before = {"qpos": envs.qpos, "look_seed": envs.look_seed, "steps": envs.steps}
        _, _, _, _, infos = envs.step(no_correction)
        samples.add(**dagger.seen, **before)
        if "final_info" in infos:
            final = infos["final_info"]
            for i in np.flatnonzero(infos["_final_info"]):
                episodes.append({  # every value is logged under rollout/
                    "success": float(final["is_success"][i]),
                    "return": float(final["episode_summary"]["return"][i]),
                    "length": float(final["episode_summary"]["length"][i]),
                })  # fmt: skip
    return episodes


def loss_of(student: Student, samples: Samples, rows: np.ndarray, pose_coef: float) -> tuple[torch.Tensor, np.ndarray]:
    """Loss of these samples, and its parts: mean absolute errors of residual, position (m) and yaw (rad).

    Absolute rather than squared errors: the teacher's residual jumps between phases, and squares would dominate.
    """
    state, base_delta, residual, pose = (
        torch.from_numpy(samples.rows[name][rows]) for name in ("measured", "base_delta", "residual", "pose")
    )
    found, estimate = student.finder(samples.images(rows), state)
    residual_error = (student.act(found, state, base_delta) - residual).abs().mean()
    pose_error = (estimate - pose).abs()
    with torch.no_grad():
        scaled = (pose_error * student.finder.pose_scale).square()
        parts = [residual_error, scaled[:, :2].sum(1).sqrt().mean(), scaled[:, 2].sqrt().mean()]
    return residual_error + pose_coef * pose_error.mean(), np.array([float(part.detach()) for part in parts])


def update(
    student: Student, optimizer: torch.optim.Optimizer, samples: Samples, args: DAgger, generator: torch.Generator,
    pool: ThreadPoolExecutor,
) -> dict[str, float]:  # fmt: skip
    """Train on random minibatches of all samples; returns their mean errors."""
    parameters = list(student.parameters())

    def gradient(rows: np.ndarray) -> tuple[tuple[torch.Tensor, ...], np.ndarray]:
        loss, parts = loss_of(student, samples, rows, args.pose_coef)
        return torch.autograd.grad(loss, parameters), parts

    total = np.zeros(3)
    for _ in range(args.updates):
        rows = torch.randint(samples.count, (args.minibatch_size // SHARDS * SHARDS,), generator=generator).numpy()
        shards = list(pool.map(gradient, np.split(rows, SHARDS)))
        for parameter, *gradients in zip(parameters, *(gradients for gradients, _ in shards)):
            parameter.grad = sum(gradients[1:], gradients[0]) / SHARDS
        if not torch.isfinite(nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)):
            raise FloatingPointError("gradient")
        optimizer.step()
        total += sum(parts for _, parts in shards) / SHARDS
    residual, position, yaw = total / args.updates
    rate = optimizer.param_groups[0]["lr"]
    return {"residual_error": residual, "position_error_m": position, "yaw_error_rad": yaw, "learning_rate": rate}


def learning_rate(args: Args, global_step: int) -> float:
    """The step size at global_step: it rises over the first tenth and falls to zero along half a cosine."""
    done = global_step / args.total_timesteps
    return float(args.dagger.learning_rate * min(1.0, 10 * done) * 0.5 * (1 + np.cos(np.pi * done)))


# ---------------------------------------------------------------------------------------------------------------------


def make_envs(args: Args, policy: BasePolicy, task: Task, num_envs: int, evaluation: bool = False):
    """Environments whose base policy is a student or a teacher, for rollouts or for `evaluate`."""
    return SO101ResidualVectorEnv(
        num_envs,
        policy,
        task,
        max_episode_steps=MAX_EPISODE_STEPS if evaluation else args.dagger.train_episode_steps,
        num_threads=args.run.num_threads,
        autoreset_mode=AutoresetMode.DISABLED if evaluation else AutoresetMode.SAME_STEP,
    )


def success_of(policy: BasePolicy, args: Args, task: Task) -> float:
    """Success rate of a policy in the episodes of an evaluation."""
    envs = make_envs(args, policy, task, args.run.eval_episodes, evaluation=True)
    episodes = evaluate(no_residual, envs, [VALIDATION_SEED + i for i in range(args.run.eval_episodes)])
    envs.close()
    return episode_mean(episodes, "success")


def main() -> int:
    """Distil; returns the exit code."""
    args, saved = parse_run(Args, __doc__, SCRIPT, STUDENT, check_args, one_rank=True)
    teacher = CheckpointPolicy(args.model, trust=args.trust)
    generator = World().seed(args.seed)  # for minibatches; after the teacher, whose networks draw random weights, too
    pool = ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))
    task = dataclasses.replace(teacher.args.task, visual_randomization=args.visual_randomization)
    base, num_envs = teacher.args.base, min(args.dagger.num_envs, args.total_timesteps)
    if saved and saved["training"] is None:  # it took its last step
        left = args.total_timesteps - saved["global_step"]
        if left >= num_envs or (run_dir_of(args.run.resume) / "final_model.pt").exists():
            raise SO101Error(f"--resume {args.run.resume}: is finished, and has no samples to go on with")

    student = Student(args.networks)
    settings = {"lr": args.dagger.learning_rate, "weight_decay": args.dagger.weight_decay}
    optimizer = torch.optim.AdamW(student.parameters(), **settings, fused=True)
    dagger, samples = Dagger(student, teacher, args.networks, task), Samples(args.total_timesteps, args.networks)
    envs = make_envs(args, dagger, task, num_envs)
    envs.camera_images(envs.qpos[:1], args.networks.cameras[0], dagger.image_size)  # fails early without OpenGL
    # with a base policy of its own, whose memory is that of other episodes
    acting = StudentPolicy(student, load_policy(base.base_policy, base.server), args.networks, task)
    eval_envs = make_envs(args, acting, task, args.run.eval_envs, evaluation=True)
    if saved:
        training, teacher_success = saved["training"], saved["teacher_success"]
        load_weights(student, saved["agent"], args.run.resume)
        with restoring(args.run.resume):
            if saved["teacher_fingerprint"] != teacher.fingerprint:
                raise SO101Error("its teacher has other weights now; put the old one back")
            if not is_rate(teacher_success) or saved["task"] != dataclasses.asdict(task):
                raise ValueError("its task is not the teacher's, or teacher_success is no rate")
            if training is None:  # it was stopped in its last evaluation, for which the weights suffice
                samples.count = saved["global_step"]
            else:
                restore_optimizer(optimizer, training["optimizer"], saved["global_step"] > 0)
                generator.set_state(training["generator"])
                envs.set_state(to_numpy(training["envs"]))
                samples.set_state(to_numpy(training["samples"]), envs, saved["global_step"])
    else:
        envs.reset(seed=training_seeds(args.seed, num_envs))
        teacher_success = success_of(CheckpointPolicy(args.model, trust=args.trust), args, task)

    def checkpoint() -> dict[str, Any]:
        """What a resumed run needs: the mirror of the lines above; of a finished run, what acting needs."""
        training = {
            "optimizer": optimizer.state_dict(), "generator": generator.get_state(), "envs": to_plain(envs.get_state()),
            "samples": to_plain(samples.get_state()),
        }  # fmt: skip
        kept = {"base_policy": base.base_policy, "server": dataclasses.asdict(base.server)}
        return {
            "agent": student.state_dict(), "task": dataclasses.asdict(task), "base": kept,
            "base_fingerprint": teacher.base.fingerprint if teacher.base else "",
            "teacher_fingerprint": teacher.fingerprint, "teacher_success": teacher_success,
            "global_step": samples.count,
            "training": training if args.total_timesteps - samples.count >= num_envs else None,
        }  # fmt: skip

    recorder = Recorder(
        SCRIPT, STUDENT, args, student, envs, eval_envs, checkpoint, saved, act=no_residual,
        reference=("teacher", teacher_success), fallible=teacher.base is not None,
    )  # fmt: skip
    with recorder, pool:
        while args.total_timesteps - samples.count >= num_envs and not recorder.stopped():
            optimizer.param_groups[0]["lr"] = learning_rate(args, samples.count)
            num_steps = min(args.dagger.num_steps, (args.total_timesteps - samples.count) // num_envs)
            dagger.teacher_acts = samples.count < args.dagger.teacher_steps
            episodes = rollout(envs, dagger, samples, num_steps)
            errors = update(student, optimizer, samples, args.dagger, generator, pool)
            recorder.record(samples.count, errors, episodes)
        return recorder.finish()


if __name__ == "__main__":
    sys.exit(run_script(main))
