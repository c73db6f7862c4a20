"""Distil a policy that knows where the sheet lies into one that sees it: DAgger, in one file: fork it and change it.

    python distill_so101.py --teacher logs/RUN/best_model/best_model.pt

The student sees what a real arm has: cameras, joints, the last commanded targets. Its network looks for the sheet and
gives a residual, as the teacher's does. What the teacher's base policy needs to know of the sheet, it gets from the
student's estimate. The student acts, the teacher says what it would have done, and the student learns from all that was
said so far (DAgger: Ross et al. 2011, arXiv:1011.0686). Top to bottom: Args, Student, StudentPolicy, Dagger, loss,
update, checkpoints, main.

A copy of this file works like the original: a student is loaded through the script that wrote it, by its load_student.
The result is a policy like any other: `--model student.pt` in eval_so101.py, `--base-policy checkpoint:student.pt`.
"""

if __name__ == "__main__":  # Ctrl+C while importing ends the program, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import copy
import dataclasses
import json
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AutoresetMode
from tqdm import tqdm

from so101_env import (
    ACT_DIM,
    COMMAND,
    IMAGES,
    MAX_EPISODE_STEPS,
    MEASURED,
    OBS,
    OBSERVATION,
    TAPE_CENTER_M,
    BaseObservation,
    BasePolicyError,
    SO101Error,
    SO101ResidualVectorEnv,
    Task,
    flat_observation,
)
from so101_policies import (
    MEASURED_DIM,
    POSE_SCALE,
    STUDENT,
    BasePolicy,
    CheckpointPolicy,
    Server,
    SheetFinder,
    StackedPolicy,
    add_cameras,
    check_base,
    hash_weights,
    load_file,
    load_policy,
    load_weights,
    restore_settings,
    scaled_pose,
)
from so101_runs import (
    VALIDATION_SEED,
    Interrupts,
    check_cameras,
    check_flags,
    check_run_name,
    command_of,
    describe_run,
    episode_mean,
    evaluate,
    flag_of,
    flat_settings,
    make_run_dir,
    no_residual,
    run_dir_of,
    run_script,
    save_tensors,
    to_numpy,
    to_plain,
    write_json,
)
from so101_scene import ASSETS

SCRIPT = Path(__file__).name
LAG_SCALE_RAD = 0.02  # of the commanded minus the measured joint positions: they tell how hard the finger presses
# Two halves of every minibatch, always, however many cores there are: so their sum is the same everywhere.
SHARDS = 2


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class Networks:
    """The student."""

    cameras: tuple[str, ...] = ("top",)
    """what the student sees through: top, wrist"""
    image_size: int = 96
    """side of the pictures, pixels"""
    hidden_size: int = 128
    """units in each hidden layer"""


@dataclasses.dataclass
class DAgger:
    """The algorithm."""

    num_envs: int = 32
    """environments side by side"""
    num_steps: int = 64
    """steps per environment between updates"""
    teacher_steps: int = 4096
    """first steps, in which the teacher acts"""
    updates: int = 64
    """gradient steps after each rollout"""
    minibatch_size: int = 128
    """samples per gradient step"""
    learning_rate: float = 1e-3
    """step size of AdamW at its highest; it rises over the first tenth and falls along half a cosine"""
    weight_decay: float = 1e-4
    """weight decay of AdamW"""
    pose_coef: float = 1.0
    """weight of the loss of the sheet's pose"""
    max_grad_norm: float = 1.0
    """norm to which larger gradients are scaled down"""
    train_episode_steps: int = 200
    """time-out of training episodes in control steps: a new look teaches more than a stuck arm; evaluation has 400"""


@dataclasses.dataclass
class Run:
    """What is written, how often, and where."""

    log_dir: str = "logs"
    """directory that gets one directory per run; with --resume, by default, the one that the resumed run lies in"""
    run_name: str | None = None
    """name of that directory (default: the script's name, the time and the seed)"""
    num_threads: int | None = None
    """physics threads (default: every core); the results do not depend on it"""
    checkpoint_every: int = 10_000
    """steps between checkpoints"""
    eval_every: int = 10_000
    """steps between evaluations; 0 for none but the last"""
    eval_episodes: int = 32
    """episodes per evaluation, on fixed held-out seeds"""
    resume: str | None = None
    """checkpoint to continue, to the bit, with the settings it was started with"""


@dataclasses.dataclass
class Args:
    teacher: str = os.path.relpath(ASSETS / "pretrained.pt")
    """checkpoint of the policy to distil, its base policy included"""
    visual_randomization: bool = False
    """randomise what the cameras see, for a student that is to look at a real table"""
    seed: int = 1
    """seed of everything: weights, minibatches, environments"""
    total_timesteps: int = 60_000
    """environment steps in all; never exceeded. All pictures are kept in memory: 28 kB a step"""
    networks: Networks = dataclasses.field(default_factory=Networks)
    dagger: DAgger = dataclasses.field(default_factory=DAgger)
    run: Run = dataclasses.field(default_factory=Run)


RANGES = {
    "seed": (0, 2**32 - 1), "total_timesteps": (1, 10**8), "image_size": (16, 512), "hidden_size": (1, 4096),
    "num_envs": (1, 4096), "num_steps": (1, 2**16), "teacher_steps": (0, 10**8), "updates": (1, 10**6),
    "minibatch_size": (SHARDS, 2**20), "learning_rate": (1e-9, 10), "weight_decay": (0, 10), "pose_coef": (0, 1e3),
    "max_grad_norm": (1e-6, 1e6), "train_episode_steps": (1, 10**6), "num_threads": (1, 1024),
    "checkpoint_every": (1, 10**10), "eval_every": (0, 10**10), "eval_episodes": (1, 4096),
}  # fmt: skip


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that is out of range."""
    for settings in (args, args.networks, args.dagger, args.run):
        check_flags(settings, RANGES)
    check_cameras("--cameras", args.networks.cameras)
    check_run_name(args.run.run_name)


@dataclasses.dataclass
class Base:
    """The base policy that the student's residual corrects: the teacher's. Kept in the student's file."""

    base_policy: str
    server: Server


# ---------------------------------------------------------------------------------------------------------------------
# the student


_MEASURED_PARTS = [(OBS[name], OBSERVATION[name]) for name in MEASURED]
KNOWN_DIM = MEASURED_DIM + ACT_DIM  # what is measured, and the lag


def measured(obs: BaseObservation) -> np.ndarray:
    """What the student knows beside pictures, (N, 21) float32, as networks see it: joints, velocities, tip, lag."""
    flat = flat_observation(obs)
    parts = [(flat[:, where] - part.mean) / part.scale for where, part in _MEASURED_PARTS]
    lag = (obs[COMMAND] - flat[:, OBS["joint_pos"]]) / LAG_SCALE_RAD
    return np.concatenate([*parts, lag], axis=1).astype(np.float32)


class Student(nn.Module):
    """Where the sheet lies, and the residual, from pictures, what the arm measures and what its base asks for."""

    def __init__(self, net: Networks):
        super().__init__()
        width = net.hidden_size
        self.finder = SheetFinder(len(net.cameras), net.image_size, KNOWN_DIM, width)
        self.residual = nn.Sequential(
            nn.Linear(KNOWN_DIM + SheetFinder.DIM + ACT_DIM, width), nn.ReLU(), nn.Linear(width, width),
            nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, ACT_DIM),
        )  # fmt: skip

    def act(self, found: torch.Tensor, measured: torch.Tensor, base_delta: torch.Tensor) -> torch.Tensor:
        """Residual (B, 6), unclipped, from what `finder` found, and the base policy's deltas (B, 6) in act_scale."""
        return self.residual(torch.cat([measured, found, base_delta], dim=1))


class StudentPolicy(StackedPolicy):
    """A student as base policy, with a base policy of its own, which may look through cameras, too."""

    def __init__(self, student: Student, base: BasePolicy | None, net: Networks, task: Task):
        super().__init__(base)
        size = (net.image_size, net.image_size)
        self.cameras, self.image_size = add_cameras(base, net.cameras, size, "the student")
        self.student, self.own_cameras, self.task = student, net.cameras, task
        self.scale_rad, self.act_scale = task.alpha * task.act_scale, task.act_scale

    @torch.inference_mode()
    def look(self, obs: BaseObservation, mask: np.ndarray) -> dict[str, Any]:
        """What the environments in mask show, and where their sheets seem to be."""
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
        """The student's residual (N, 6), rad, of what `look` gave and the base policy's deltas (N, 6), rad."""
        look["base_delta"] = (base_delta[mask] / self.act_scale).astype(np.float32)
        state, base = (torch.from_numpy(look[name]) for name in ("measured", "base_delta"))
        own = self.student.act(look["found"], state, base)
        residual = np.zeros((len(mask), ACT_DIM))
        residual[mask] = self.scale_rad * own.clamp(-1, 1).numpy()
        return residual

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): the base policy's, on the student's estimate, and the student's residual."""
        look = self.look(obs, mask)
        base = self.base_delta(obs.with_sheet(self.estimate), mask)
        residual = self.own_residual(look, base, mask)
        self.residual[mask] = residual[mask]
        return base + residual


def load_student(saved: dict[str, Any], path: str) -> StudentPolicy:
    """The student in what so101_policies.load_file read from path. Raises SO101Error if it does not fit."""
    args, base = restore_settings(Args, saved["args"], path), restore_settings(Base, saved["base"], path)
    check_args(args)
    student, base_policy = Student(args.networks), load_policy(base.base_policy, base.server)
    check_base(saved, base.base_policy, base_policy, path)
    load_weights(student, saved["student"], path)
    policy = StudentPolicy(student, base_policy, args.networks, restore_settings(Task, saved["task"], path))
    policy.fingerprint = hash_weights(saved["student"], f"{saved['base_fingerprint']} {policy.scale_rad}")
    return policy


def load_teacher(saved: dict[str, Any], path: str) -> CheckpointPolicy:
    """The teacher of the student in what so101_policies.load_file read from path. Raises SO101Error if it has gone."""
    teacher = restore_settings(Args, saved["args"], path).teacher
    if not Path(teacher).is_file():
        raise SO101Error(f"{path}: its teacher, {teacher}, is not there; --no-base does without it")
    policy = CheckpointPolicy(teacher)
    if policy.fingerprint != saved["teacher_fingerprint"]:
        raise SO101Error(f"{path}: its teacher, {teacher}, has other weights now; --no-base does without it")
    return policy


# ---------------------------------------------------------------------------------------------------------------------
# DAgger


class Dagger(StudentPolicy):
    """The student as it acts, or watches its teacher act, with the teacher's answers beside what it saw."""

    def __init__(self, student: Student, teacher: CheckpointPolicy, net: Networks, task: Task):
        super().__init__(student, teacher.base, net, task)
        self.teacher, self.teacher_acts, self.seen = teacher, False, {}
        self.cameras, _ = add_cameras(teacher, net.cameras, self.image_size, "the student")

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6); `seen` then has a row (n, ...) for each environment in mask."""
        look, flat = self.look(obs, mask), flat_observation(obs)[mask]
        base = self.base_delta(obs if self.teacher_acts else obs.with_sheet(self.estimate), mask)
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
    """All that the student has seen, and what its teacher said to it.

    Pictures are not written into checkpoints: they are drawn again from qpos, look_seed and steps, to the bit.
    """

    def __init__(self, capacity: int, net: Networks):
        size = (capacity, net.image_size, net.image_size, 3)
        self.count, self.cameras = 0, net.cameras
        self.images = [np.empty(size, np.uint8) for _ in net.cameras]
        widths = {"measured": KNOWN_DIM, "base_delta": ACT_DIM, "residual": ACT_DIM, "pose": 3}
        self.rows = {name: np.empty((capacity, width), np.float32) for name, width in widths.items()}
        self.rows |= {"qpos": np.empty((capacity, 10))}
        self.rows |= {name: np.empty(capacity, np.int64) for name in ("look_seed", "steps")}

    def add(self, images: list[np.ndarray], **rows: np.ndarray) -> None:
        """Append n samples: (n, ...) each."""
        where = slice(self.count, self.count + len(rows["pose"]))
        for own, new in zip(self.images, images):
            own[where] = new
        for name, array in self.rows.items():
            array[where] = rows[name]
        self.count = where.stop

    def get_state(self) -> dict[str, np.ndarray]:
        """All but the pictures; views."""
        return {name: array[: self.count] for name, array in self.rows.items()}

    def set_state(self, state: dict[str, np.ndarray], envs: SO101ResidualVectorEnv) -> None:
        """Inverse of get_state. Raises SO101Error for a state that does not fit."""
        count = len(state.get("pose", ()))
        for name, array in self.rows.items():
            saved = state.get(name)
            if getattr(saved, "shape", None) != (count, *array.shape[1:]) or saved.dtype != array.dtype:
                raise SO101Error(f"samples: {name} is missing or of another shape")
            if count > len(array):
                raise SO101Error(f"samples: {count} are more than {len(array)} steps")
            array[:count] = saved
        for start in tqdm(range(0, count, 256), "drawing what was seen", unit="batch", dynamic_ncols=True, leave=False):
            part = slice(start, min(start + 256, count))
            facts = (self.rows[name][part] for name in ("look_seed", "steps"))
            qpos, look_seed, steps = self.rows["qpos"][part], *facts
            for images, camera in zip(self.images, self.cameras):
                images[part] = envs.camera_images(qpos, camera, images.shape[1:3], look_seed, steps)
        self.count = count


def rollout(envs: SO101ResidualVectorEnv, dagger: Dagger, samples: Samples, num_steps: int, steps: np.ndarray) -> Any:
    """Act for num_steps and keep what was seen and said; returns how many steps each episode has had, (num_envs,).

    Raises BasePolicyError for a base policy that fails.
    """
    idle = np.zeros((envs.num_envs, ACT_DIM))  # the student is the base policy of these environments
    for _ in range(num_steps):
        before = {"qpos": envs.qpos, "look_seed": envs.look_seed, "steps": steps}
        _, _, _, _, infos = envs.step(idle)
        samples.add(**dagger.seen, **before)
        steps = infos["episode_summary"]["length"]
    return steps


def loss_of(student: Student, samples: Samples, rows: np.ndarray, pose_coef: float) -> tuple[torch.Tensor, np.ndarray]:
    """Loss of these samples, and its parts: residual (of 1), position (m), yaw (rad), mean absolute errors.

    Absolute errors: the teacher's answers jump where it changes its mind, and its squares would rule the rest.
    """
    state, base_delta, residual, pose = (
        torch.from_numpy(samples.rows[name][rows]) for name in ("measured", "base_delta", "residual", "pose")
    )
    found, estimate = student.finder([torch.from_numpy(images[rows]) for images in samples.images], state)
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
    """Learn from random minibatches of all samples; returns the mean errors over them."""
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
    return {"residual_error": residual, "position_error_m": position, "yaw_error_rad": yaw}


def learning_rate(args: Args, global_step: int) -> float:
    """Rises over the first tenth, then falls to zero along half a cosine."""
    done = global_step / args.total_timesteps
    return float(args.dagger.learning_rate * min(1.0, 10 * done) * 0.5 * (1 + np.cos(np.pi * done)))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints: all that a run needs to go on to the bit


# flags that may differ from the run that is resumed: none of them changes what is learned
RESUMABLE = {"resume", "log_dir", "run_name", "num_threads"}


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """Command line to Args; with --resume, also what the checkpoint holds, whose settings are then the defaults.

    Raises SO101Error for flags that cannot be used.
    """
    config = (tyro.conf.OmitArgPrefixes,)
    args = tyro.cli(Args, description=__doc__, config=config)
    if args.run.resume is None:
        check_args(args)
        return args, None
    path, saved = args.run.resume, load_file(args.run.resume, STUDENT)
    if saved["script"] != SCRIPT:
        raise SO101Error(f"--resume {path}: written by {saved['script']}; resume it with that script")
    if saved["training"] is None:
        raise SO101Error(f"--resume {path}: is finished; there is nothing to go on with")
    then = restore_settings(Args, saved["args"], path)
    log_dir = str(run_dir_of(path).parent)
    then.run = dataclasses.replace(then.run, resume=None, log_dir=log_dir, run_name=None, num_threads=None)
    args = tyro.cli(Args, description=__doc__, config=config, default=then)
    before, after = (flat_settings(dataclasses.asdict(each)) for each in (then, args))
    for name, new in after.items():
        if new != before[name] and name not in RESUMABLE:
            raise SO101Error(f"{flag_of(name)} {new}: {path} was trained with {before[name]}; drop the flag")
    check_args(args)
    return args, saved


def restore(
    saved: dict[str, Any], path: str, teacher: CheckpointPolicy, student: Student, optimizer: torch.optim.Optimizer,
    generator: torch.Generator, envs: SO101ResidualVectorEnv, samples: Samples,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Put everything back as it was; returns the episodes' steps so far and the teacher's success.

    Raises SO101Error if the checkpoint does not fit.
    """
    training = saved["training"]
    load_weights(student, saved["student"], path)
    try:
        if saved["teacher_fingerprint"] != teacher.fingerprint:
            raise SO101Error("its teacher has other weights now; put the old one back")
        envs.set_state(to_numpy(training["envs"]))
        samples.set_state(to_numpy(training["samples"]), envs)
        optimizer.load_state_dict(training["optimizer"])
        generator.set_state(training["generator"])
        for parameter, state in optimizer.state.items():
            if any(state[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimiser's state has other shapes")
        steps = training["steps"].numpy()
        if steps.shape != (envs.num_envs,) or samples.count != saved["global_step"]:
            raise ValueError("its counts of steps do not fit")
        return steps, float(training["teacher_success"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise SO101Error(f"{path}: cannot be continued ({error}); resume another checkpoint") from error


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Distil; returns the exit code."""
    args, resumed = parse_args()
    start = time.perf_counter()
    teacher = CheckpointPolicy(args.teacher)
    task = dataclasses.replace(teacher.args.task, visual_randomization=args.visual_randomization)
    base = Base(teacher.args.base.base_policy, teacher.args.base.server)
    num_envs = min(args.dagger.num_envs, args.total_timesteps)
    print(
        f"from step {resumed['global_step']} to" if resumed else "distilling for",
        f"{args.total_timesteps} steps in {num_envs} environments, tape margin {1000 * task.tape_margin:.0f} mm,",
        f"teacher {args.teacher}, cameras {' '.join(args.networks.cameras)}, seed {args.seed}", flush=True,
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # minibatches
    pool = ThreadPoolExecutor(SHARDS, initializer=torch.set_num_threads, initargs=(1,))

    student = Student(args.networks)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=args.dagger.learning_rate, weight_decay=args.dagger.weight_decay, fused=True
    )
    dagger, samples = Dagger(student, teacher, args.networks, task), Samples(args.total_timesteps, args.networks)
    envs = SO101ResidualVectorEnv(
        num_envs, dagger, task, max_episode_steps=args.dagger.train_episode_steps, num_threads=args.run.num_threads
    )
    envs.camera_images(envs.qpos[:1], args.networks.cameras[0], dagger.image_size)  # refuses before anything is written

    def make_eval_envs(policy: BasePolicy) -> SO101ResidualVectorEnv:
        return SO101ResidualVectorEnv(
            args.run.eval_episodes, policy, task, max_episode_steps=MAX_EPISODE_STEPS,
            num_threads=args.run.num_threads, autoreset_mode=AutoresetMode.DISABLED,
        )  # fmt: skip

    # with a base policy of its own, whose memory is of other episodes
    acting = StudentPolicy(student, load_policy(base.base_policy, base.server), args.networks, task)
    eval_envs = make_eval_envs(acting)
    seeds = [VALIDATION_SEED + i for i in range(args.run.eval_episodes)]
    if resumed:
        steps, teacher_success = restore(
            resumed, args.run.resume, teacher, student, optimizer, generator, envs, samples
        )  # fmt: skip
    else:
        starts = np.random.SeedSequence(args.seed).generate_state(num_envs) % VALIDATION_SEED
        envs.reset(seed=[int(seed) for seed in starts])
        steps, teacher_success = np.zeros(num_envs, np.int64), 0.0
    name = args.run.run_name or f"{Path(SCRIPT).stem}_{time.strftime('%Y%m%d-%H%M%S')}_s{args.seed}"
    run_dir = make_run_dir(args.run.log_dir, name, "checkpoints", "eval_results", "tensorboard")
    interrupts = Interrupts()
    try:
        print(f"everything goes to {run_dir}", flush=True)
    except BrokenPipeError:
        interrupts.on_broken_pipe()
    write_json(run_dir / "config.json", describe_run(SCRIPT, args))
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    writer = SummaryWriter(str(run_dir / "tensorboard"))
    writer.add_text("command", shlex.join(["python", *sys.argv]))

    def checkpoint(finished: bool = False) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values; of a finished one, what acting needs."""
        settings = dataclasses.asdict(args)
        settings["run"]["resume"] = None
        training = {
            "teacher_success": teacher_success, "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(), "envs": to_plain(envs.get_state()),
            "samples": to_plain(samples.get_state()), "steps": torch.from_numpy(steps),
        }  # fmt: skip
        return {
            "format": STUDENT, "script": SCRIPT, "args": settings, "task": dataclasses.asdict(task),
            "base": dataclasses.asdict(base), "base_fingerprint": teacher.base.fingerprint if teacher.base else "",
            "teacher_fingerprint": teacher.fingerprint, "global_step": samples.count,
            "student": student.state_dict(), "training": None if finished else training,
        }  # fmt: skip

    def eval_and_log() -> dict[str, Any]:
        """Evaluate the student and log it."""
        show_progress("evaluating")
        episodes = evaluate(no_residual, eval_envs, seeds)
        keys = ("return", "length", "estimate_error_m", "estimate_error_rad")
        result = {"step": samples.count, "success_rate": episode_mean(episodes, "success")}
        result |= {f"mean_{key}": episode_mean(episodes, key) for key in keys}
        result["teacher_success_rate"] = teacher_success
        for tag, value in result.items():
            writer.add_scalar(f"eval/{tag}", value, samples.count)
        with open(run_dir / "eval_results" / "evaluations.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        return result

    def show_progress(doing: str = "", done: int = 0) -> None:
        """Say on the progress bar what is being done, or how good the student is, and steps that were done."""
        text = doing or (f"sheet within {1000 * errors['position_error_m']:.1f} mm" if errors else "teacher acts")
        text += f", evaluation {result['success_rate']:.2f} of {teacher_success:.2f}" if result and not doing else ""
        try:
            bar.set_description_str(text, refresh=False)
            bar.update(done) if done else bar.refresh()
        except BrokenPipeError:
            interrupts.on_broken_pipe()

    errors: dict[str, float] = {}
    result, first_step, before_failure = None, samples.count, None
    # the delay: nothing is drawn before show_progress, which knows what to do if nobody reads it
    bar = tqdm(total=args.total_timesteps, initial=first_step, unit="step", dynamic_ncols=True, delay=1e-3)
    try:
        if not resumed:
            show_progress("evaluating the teacher")
            teacher_envs = make_eval_envs(CheckpointPolicy(args.teacher))
            teacher_success = episode_mean(evaluate(no_residual, teacher_envs, seeds), "success")
            teacher_envs.close()
        while args.total_timesteps - samples.count >= num_envs and not interrupts.signum:
            before = samples.count
            if teacher.base is not None:  # it can fail at any step: then this pass of the loop is done again
                before_failure = copy.deepcopy(checkpoint())
            optimizer.param_groups[0]["lr"] = learning_rate(args, before)
            num_steps = min(args.dagger.num_steps, (args.total_timesteps - before) // num_envs)
            dagger.teacher_acts = before < args.dagger.teacher_steps
            steps = rollout(envs, dagger, samples, num_steps, steps)
            errors = update(student, optimizer, samples, args.dagger, generator, pool)
            scalars = {f"train/{key}": value for key, value in errors.items()}
            scalars["train/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["time/fps"] = (samples.count - first_step) / (time.perf_counter() - start)
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, samples.count)
            show_progress(done=samples.count - before)
            if args.run.eval_every and samples.count // args.run.eval_every > before // args.run.eval_every:
                result = eval_and_log()
            if samples.count // args.run.checkpoint_every > before // args.run.checkpoint_every:
                path = run_dir / "checkpoints" / f"{Path(SCRIPT).stem}_{samples.count}_steps.pt"
                save_tensors(path, checkpoint())
        if not interrupts.signum and (result is None or result["step"] != samples.count):
            result = eval_and_log()
        show_progress()
        model = run_dir / ("interrupted_model.pt" if interrupts.signum else "student.pt")
        save_tensors(model, checkpoint(finished=not interrupts.signum))
    except BasePolicyError as error:
        if before_failure is None:
            raise
        model = run_dir / "interrupted_model.pt"
        save_tensors(model, before_failure)
        way_out = f"resume {before_failure['global_step']} steps with --resume {model}"
        raise SO101Error(f"--teacher {args.teacher}: {error}; {way_out}") from error
    except FloatingPointError as error:
        print(
            f"{SCRIPT}: error: NaN or Inf in the {error} after {samples.count} steps; the checkpoints in {run_dir} are "
            "from before; try a lower --learning-rate",
            file=sys.stderr,
        )
        return 1
    finally:
        bar.close()
        writer.close()
        envs.close()
        eval_envs.close()
        pool.shutdown()

    wall_time = time.perf_counter() - start
    summary = {
        "total_timesteps": samples.count, "wall_time_s": wall_time, "interrupted": bool(interrupts.signum),
        "steps_per_second": (samples.count - first_step) / wall_time, **errors,
        "final_eval_success_rate": result["success_rate"] if result else None,
        "teacher_eval_success_rate": teacher_success, "student": str(model),
    }  # fmt: skip
    write_json(run_dir / "training_summary.json", summary)
    print(f"{samples.count} steps in {wall_time:.0f} s, saved in {run_dir}")
    if interrupts.signum:
        print(f"resume:   {command_of(SCRIPT)} --resume {model}")
        return 128 + interrupts.signum
    error_mm, error_deg = 1000 * result["mean_estimate_error_m"], np.rad2deg(result["mean_estimate_error_rad"])
    print(f"success: student {result['success_rate']:.2f}, teacher {teacher_success:.2f}", end="")
    print(f"; the student takes the sheet to be {error_mm:.1f} mm and {error_deg:.1f} degrees from where it is")
    print(f"evaluate: {command_of('eval_so101.py')} --model {model}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
