"""Base policies by spec string: `load_policy`."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import numpy as np

from so101.base import BasePolicy, StackedPolicy, extend_observation, flat_observation
from so101.checkpoints import (
    CHECKPOINT,
    CLONE,
    STUDENT,
    check_base,
    hash_weights,
    load_checkpoint,
    load_file,
    load_script,
)
from so101.pusher import JacobianPolicy
from so101.server import LeRobotBase, Server, ServerPolicy
from so101.trust import Trust
from so101_env import MEASURED, OBS, BaseObservation, BasePolicyError
from so101_sim.control import ACT_DIM
from so101_sim.vector import IMAGES

SPECS = (
    "zero, jacobian, keyboard, checkpoint:PATH, onnx:PATH, bc:PATH, lerobot:DIR, server:HOST:PORT, opencv:SPEC, "
    "MODULE:CLASS[:ARGUMENT]"
)


class CheckpointPolicy(StackedPolicy):
    """A frozen policy of a training script, with its own base policy."""

    def __init__(self, path: str, saved: dict[str, Any] | None = None, trust: Trust | None = None):
        checkpoint = load_checkpoint(path, saved, trust)
        self.args = args = checkpoint.args
        self.task = args.task
        self.agent = checkpoint.agent(path)
        self.own_cameras = tuple(getattr(self.agent, "cameras", ()))
        size = self.agent.image_size if self.own_cameras else None
        super().__init__(load_policy(args.base.base_policy, args.base.server), self.own_cameras, size)
        check_base(checkpoint.saved, args.base.base_policy, self.base, path)
        self.observe_base = getattr(args.base, "observe_base", self.base is not None)  # a camera policy always does
        self.scale_rad = args.task.alpha * args.task.act_scale
        also = f"{checkpoint.saved['base_fingerprint']} {self.scale_rad}"
        self.fingerprint = hash_weights(checkpoint.saved["agent"], also)

    def agent_residual(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The agent's residual (N, 6) in [-1, 1] for its base's deltas (N, 6), rad; zero outside mask."""
        flat, residual = flat_observation(obs), np.zeros((len(mask), ACT_DIM), np.float32)
        if self.own_cameras:
            flat = np.concatenate([flat[:, OBS[name]] for name in MEASURED], axis=1)
        load = getattr(self.task, "observe_load", False)  # the task of another script may have no such setting
        flat = extend_observation(flat, obs, load, base_delta if self.observe_base else None)[mask]
        seen = obs.rows(mask).sized(self.image_size)
        pixels = {f"pixels_{camera}": seen[IMAGES + camera] for camera in self.own_cameras}
        residual[mask] = self.agent.act(pixels | {"state": flat} if pixels else flat)
        return residual

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): those of its own base policy plus its residual."""
        base = self.base_delta(obs, mask)
        residual = self.scale_rad * self.agent_residual(obs, base, mask).astype(np.float64)
        self.residual[mask] = residual[mask]
        return base + residual


def load_policy(spec: str, server: Server | None = None) -> BasePolicy | None:
    """Base policy of a spec string, see SPECS; None for zero.

    Args:
        spec: from the person who runs the command, or from a file and then checked by `Trust.spec`.
        server: options of lerobot:DIR and server:HOST:PORT; its `trust` holds for the files that the spec names.

    Raises:
        SO101Error: an unknown spec, a file that cannot be used, a class that is not a BasePolicy.
    """
    try:
        return _load_policy(spec, server or Server())
    except RecursionError as error:
        raise BasePolicyError(f"base policy {spec:.200}: leads to itself, or to base policies without end") from error


def _load_policy(spec: str, server: Server) -> BasePolicy | None:
    """See load_policy."""
    kind, _, rest = spec.partition(":")
    trust = server.trust
    if spec == "zero":
        return None
    if spec == "jacobian":
        return JacobianPolicy()
    if spec == "keyboard":
        return _own_policy("so101.keyboard", "KeyboardPolicy")
    if kind == "checkpoint" and rest:
        saved = load_file(rest, CHECKPOINT, STUDENT)
        if saved["format"] == STUDENT:
            return load_script(saved["script"], rest, trust).load_student(saved, rest, trust)
        return CheckpointPolicy(rest, saved, trust)
    if kind == "bc" and rest:
        saved = load_file(rest, CLONE)
        return load_script(saved["script"], rest, trust).ClonePolicy(saved, rest)
    if kind == "server":
        return ServerPolicy(rest, server)
    if kind == "lerobot" and rest:
        return LeRobotBase(rest, server)
    if kind == "onnx" and rest:
        return _own_policy("so101.onnx", "OnnxPolicy", rest, trust)
    if kind == "opencv" and rest:
        return _own_policy("so101.opencv", "OpenCVPolicy", load_policy(rest, server))
    if rest and kind not in ("checkpoint", "onnx", "bc", "opencv", "lerobot"):
        return _own_policy(kind, *rest.split(":", 1))
    raise BasePolicyError(f"unknown base policy {spec!r}; known: {SPECS}")


def _own_policy(module_name: str, class_name: str, *arguments: Any) -> BasePolicy:
    """An instance of a class, given by module and name, from the module search path or the working directory."""
    where = f"base policy {module_name}:{class_name}"
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise BasePolicyError(f"{where}: {module_name!r} is not the name of a module; known specs: {SPECS}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name not in (module_name, module_name.partition(".")[0]):
            raise  # an import inside that module
        raise BasePolicyError(f"{where}: no module {module_name} here; known specs: {SPECS}") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, BasePolicy) or cls.act is BasePolicy.act:
        raise BasePolicyError(f"{where}: must be a class in {module.__file__} that derives from BasePolicy, with act")
    try:
        inspect.signature(cls).bind(*arguments)
    except TypeError as error:
        raise BasePolicyError(f"{where}: does not fit its constructor ({error}); MODULE:CLASS[:ARGUMENT]") from error
    return cls(*arguments)
