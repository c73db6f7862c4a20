"""Base policies by spec string: `load_policy`."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from so101.base import BasePolicy
from so101.pusher import JacobianPolicy
from so101.server import LeRobotBase, Server, ServerPolicy
from so101_env import BasePolicyError

SPECS = (
    "zero, jacobian, keyboard, checkpoint:PATH, onnx:PATH, bc:PATH, lerobot:DIR, server:HOST:PORT, opencv:SPEC, "
    "MODULE:CLASS[:ARGUMENT]"
)


def load_policy(spec: str, server: Server | None = None) -> BasePolicy | None:
    """Base policy of a spec string, see SPECS; None for zero.

    Args:
        spec: from the person who runs the command, or from a file and then resolved by `Trust.resolve`.
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
    if kind in ("checkpoint", "bc") and rest:
        from so101.checkpoint_policy import load_checkpoint_policy, load_clone  # imports torch

        return load_checkpoint_policy(rest, trust) if kind == "checkpoint" else load_clone(rest, trust)
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
