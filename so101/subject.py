"""What eval_so101.py and so101.record run: a model or a base policy, and the conditions of the task."""

from __future__ import annotations

import dataclasses
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from gymnasium.vector import AutoresetMode

from so101.base import BasePolicy, check_base
from so101.cli import check_flags, flag_of, parse
from so101.evaluation import no_residual
from so101.policies import load_policy
from so101.server import Server
from so101.trust import Trust, may_lie_at
from so101_env import SO101Error, SO101ResidualVectorEnv, Task
from so101_sim.scene import ASSETS
from so101_sim.vector import ArmVectorEnv

if TYPE_CHECKING:
    from so101.checkpoints import Checkpoint

Settings = TypeVar("Settings")
# by default as the model was trained
CONDITIONS = ("tape_margin", "full_randomization", "arm_randomization", "visual_randomization")
PRETRAINED = ASSETS / "pretrained.pt"


@dataclasses.dataclass
class Subject:
    """What acts, and under which conditions. All conditions default to those the model was trained with."""

    model: str | None = None
    """checkpoint, student or ONNX file (default, without --base-policy: the model that comes with the project)"""
    base_policy: str | None = None
    """without --model: the base policy to run; with --model: where the model's base policy is now"""
    tape_margin: float = Task.tape_margin
    """m between sheet and tape, 0.04 standard, 0.02 precise"""
    full_randomization: bool = False
    """also randomise sheet mass, servos, latency, joint offsets, backlash and observation noise, with a limp sheet"""
    arm_randomization: bool = False
    """full_randomization in the wider ranges of arms from a kit"""
    visual_randomization: bool = False
    """randomise what cameras see"""
    num_threads: int | None = None
    """physics threads (default: every core); the results do not depend on it"""
    server: Server = dataclasses.field(default_factory=Server)

    @property
    def trust(self) -> Trust:
        """The permissions of the command line: --allow, and the base policy that it names."""
        return self.server.trust.also(self.base_policy)


@dataclasses.dataclass
class Loaded:
    """A policy ready to run."""

    kind: str  # "agent", "student" or "base alone": the title of its results
    base_policy: str  # spec string
    steps: int | None  # training steps, if known
    task: Any  # settings of the task, as trained
    act: Callable[[Any], np.ndarray]  # residuals (N, 6) for observations
    make_envs: Callable[[int, Any], ArmVectorEnv]  # for a number of environments and settings of the task
    # the environments of what it is compared with, and its title; None: the same environments without a residual
    make_others: Callable[[int, Any], ArmVectorEnv] | None = None
    other: str = "base alone"
    training_seed: int | None = None
    command: str | None = None  # that has trained it, if the file says so


def parse_subject(
    cls: type[Settings], description: str, default_model: bool = True, records: bool = False
) -> tuple[Settings, Loaded, Any]:
    """The command line of a script whose arguments have a Subject in `subject`.

    The command line is parsed twice: the settings of the model's task are the defaults the second time.

    Args:
        cls: the script's dataclass of arguments.
        description: the script's docstring.
        default_model: whether the model that comes with the project is the default without a base policy.
        records: whether --cameras and --image-size are for a recording, not only for a policy server.

    Returns:
        The arguments, the loaded policy, and the settings of the task to run it on.

    Raises:
        SO101Error: a flag or a file that cannot be used.
    """
    args = parse(cls, description)
    subject: Subject = args.subject
    if subject.model is None and subject.base_policy is None:
        if not default_model:
            raise SO101Error("name what acts: --model PATH or --base-policy SPEC")
        subject.model = os.path.relpath(PRETRAINED)
    check_flags(subject.server, Server.RANGES)
    check_flags(subject, {"num_threads": (1, 1024), "tape_margin": Task.RANGES["tape_margin"]})
    loaded = _load(subject, () if records else ("cameras", "image_size"))
    known = {name: getattr(loaded.task, name) for name in CONDITIONS if hasattr(loaded.task, name)}
    default = dataclasses.replace(args, subject=dataclasses.replace(subject, **known))
    args = parse(cls, description, default=default)
    check_flags(args.subject, {"tape_margin": Task.RANGES["tape_margin"]})
    for name in CONDITIONS:
        if name not in known and getattr(args.subject, name) != getattr(Subject, name):
            raise SO101Error(f"{flag_of(name)}: the model's task has no such setting; drop the flag")
    task = dataclasses.replace(loaded.task, **{name: getattr(args.subject, name) for name in known})
    return args, loaded, task


def _load(subject: Subject, unused: tuple[str, ...]) -> Loaded:
    """What a subject names; options of the policy server named by unused must not be given with a model."""
    if subject.model is None:
        recorded = {"cameras", "image_size"} - {*unused}
        subject.server.check_used(subject.base_policy, *recorded)
        policy = load_policy(subject.base_policy, subject.server)
        return _base_loaded("base alone", subject.base_policy, policy, Task(), None, subject)
    own = ("units", "chunk_steps", "instruction", "server_timeout", *unused)
    if given := [name for name in own if getattr(subject.server, name) != getattr(Server(), name)]:
        raise SO101Error(f"{flag_of(given[0])}: the model has its own; drop the flag")
    if Path(subject.model).suffix == ".onnx":
        from so101.onnx import OnnxPolicy

        onnx = OnnxPolicy(subject.model, subject.trust)
        base = onnx.metadata["base_policy"]
        _check_base_flag(subject, base)
        loaded = _base_loaded("agent", base, onnx.base, onnx.task, onnx.steps, subject, onnx.observe_base)
        return dataclasses.replace(loaded, act=onnx.residuals, command=onnx.metadata.get("command"))
    from so101.checkpoints import CHECKPOINT, STUDENT, load_checkpoint, load_file, load_script  # imports torch

    saved = load_file(subject.model, CHECKPOINT, STUDENT)
    base = (saved if saved["format"] == STUDENT else saved["args"]).get("base")
    _check_base_flag(subject, base.get("base_policy") if isinstance(base, dict) else None)
    if saved["format"] == STUDENT:
        return _load_student(saved, load_script(saved["script"], subject.model, subject.trust), subject)
    return _load_checkpoint(load_checkpoint(subject.model, saved, subject.trust), subject)


def _check_base_flag(subject: Subject, own: Any) -> None:
    """Raise SO101Error if --base-policy is not the base policy that the model's file names, `own`."""
    given = subject.base_policy
    if given is not None and given != own and not may_lie_at(str(own), given):
        raise SO101Error(f"--base-policy {given}: the model has its own base policy; drop the flag")


def _load_checkpoint(checkpoint: Checkpoint, subject: Subject) -> Loaded:
    """An agent of a training script, with its base policy."""
    saved, args = checkpoint.saved, checkpoint.args

    def make_envs(num_envs: int, task: Any) -> ArmVectorEnv:
        args.task = task
        checkpoint.script.check_args(args)
        envs = checkpoint.script.make_envs(args, num_envs, evaluation=True, num_threads=subject.num_threads)
        check_base(saved, args.base.base_policy, envs.base_policy, subject.model)
        return envs

    act = checkpoint.agent(subject.model).act
    seed = getattr(args, "seed", None)  # a script of your own may have none
    known = {"training_seed": seed, "command": checkpoint.command}
    return Loaded("agent", args.base.base_policy, saved["global_step"], args.task, act, make_envs, **known)


def _load_student(saved: dict[str, Any], script: types.ModuleType, subject: Subject) -> Loaded:
    """A student of this script, which is compared with its teacher."""
    trust = subject.trust
    student = script.load_student(saved, subject.model, trust)
    spec = f"checkpoint:{subject.model}"
    loaded = _base_loaded("student", spec, student, student.task, saved["global_step"], subject)

    def make_others(num_envs: int, task: Task) -> ArmVectorEnv:
        teacher = script.load_teacher(saved, subject.model, trust)
        return _base_loaded("teacher", spec, teacher, task, None, subject).make_envs(num_envs, task)

    return dataclasses.replace(
        loaded, make_others=make_others, other="teacher", training_seed=saved["args"].get("seed")
    )


def base_envs(
    num_envs: int, policy: BasePolicy | None, task: Task, num_threads: int | None, observe_base: bool = False
) -> SO101ResidualVectorEnv:  # fmt: skip
    """Environments for the evaluation of a base policy, at most as many as it can act in."""
    return SO101ResidualVectorEnv(
        num_envs if policy is None else min(num_envs, policy.max_envs or num_envs),
        policy,
        task,
        observe_base=observe_base,
        num_threads=num_threads,
        autoreset_mode=AutoresetMode.DISABLED,
    )


def _base_loaded(
    kind: str, spec: str, policy: BasePolicy | None, task: Task, steps: int | None, subject: Subject,
    observe_base: bool = False,
) -> Loaded:  # fmt: skip
    """A base policy that acts without a residual."""

    def make_envs(num_envs: int, task: Task) -> ArmVectorEnv:
        return base_envs(num_envs, policy, task, subject.num_threads, observe_base)

    return Loaded(kind, spec, steps, task, no_residual, make_envs)
