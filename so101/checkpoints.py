"""Policy files: their formats, and loading them through the script that wrote them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import re
import sys
import types
import typing
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn

from so101.base import BasePolicy
from so101_sim.errors import SO101Error

ROOT = Path(__file__).resolve().parent.parent

# what every file of a kind holds; `script` reads `args` into its own Args
SCHEMAS: dict[str, dict[str, Any]] = {
    "so101 checkpoint 9": {
        "script": str, "args": dict, "agent": dict, "optimizer": dict, "ranks": list, "num_envs": int,
        "global_step": int, "base_fingerprint": str, "recorder": dict,
    },
    "so101 clone 4": {"script": str, "args": dict, "agent": dict},
    "so101 student 3": {
        "script": str, "args": dict, "task": dict, "base": dict, "base_fingerprint": str, "teacher_fingerprint": str,
        "global_step": int, "agent": dict, "training": (dict, type(None)), "recorder": dict,
    },
}  # fmt: skip
CHECKPOINT, CLONE, STUDENT = SCHEMAS


def load_file(path: str | Path, *kinds: str) -> dict[str, Any]:
    """Read a policy file; check its checksums, its keys, and that its weights are finite.

    Args:
        path: the file.
        kinds: accepted kinds, of CHECKPOINT, CLONE and STUDENT; the file's "format" names its kind.

    Raises:
        SO101Error: the file is missing, damaged, or of another kind or version.
    """
    noun = kinds[0].split()[1]
    if not Path(path).is_file():
        raise SO101Error(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not check the checksums
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many types for a damaged file
        text = f"{path}: not a readable {noun}, perhaps truncated ({type(error).__name__}); take another one"
        raise SO101Error(text) from error
    if damaged:
        raise SO101Error(f"{path}: damaged, the checksum of {damaged} is wrong; take another {noun}")
    if not isinstance(saved, dict) or saved.get("format") not in kinds:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        known = " or ".join(map(repr, kinds))
        raise SO101Error(f"{path}: not a {noun} of this version, which reads {known}; the file says {found!r}")
    kind = saved["format"]
    for key, expected in SCHEMAS[kind].items():
        if not isinstance(saved.get(key, ...), expected):
            raise SO101Error(f"{path}: {key} is missing or of a wrong type; take another {noun}")
    for name, tensor in saved["agent"].items():
        if not isinstance(tensor, torch.Tensor) or not torch.isfinite(tensor).all():
            raise SO101Error(f"{path}: weight {name} is not finite; take another {noun}")
    return saved


def load_script(name: str, path: str | Path = "") -> types.ModuleType:
    """The script called name as a module, from beside so101_env.py, the working directory, or so101/.

    path is the file that names it, for the message. Raises SO101Error if there is no such script.
    """
    where = f"{path}: written by {name}, which" if path else f"script {name}:"
    places = [ROOT, Path.cwd(), ROOT / "so101"]
    script = next((place / name for place in places if (place / name).is_file()), None)
    if not re.fullmatch(r"[A-Za-z_]\w*\.py", name) or script is None:
        raise SO101Error(f"{where} is not beside so101_env.py, in the working directory or in so101/; put it back")
    script, own = script.resolve(), script.parent == ROOT / "so101"
    module_name = f"so101.{script.stem}" if own else script.stem
    for module in (sys.modules["__main__"], sys.modules.get(module_name)):  # it runs, or has been loaded
        if getattr(module, "__file__", None) and Path(module.__file__).resolve() == script:
            return module
    if own:
        return importlib.import_module(module_name)
    spec = importlib.util.spec_from_file_location(module_name, script)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def restore_settings(cls: type, values: Any, path: str | Path) -> Any:
    """A dataclass, with its nested ones, from the plain values in a file.

    Raises SO101Error, naming the field, for one that is missing, unknown, or of a wrong type: no missing value is
    replaced by a default.
    """
    if not isinstance(values, dict):
        raise SO101Error(f"{path}: its settings lack {cls.__name__}")
    hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
    script = f"{cls.__name__} of {cls.__module__.replace('.', '/')}.py"
    if unknown := sorted(set(values) - set(names)):
        raise SO101Error(f"{path}: has the setting {unknown[0]}, which {script} lacks; use the script that wrote it")
    restored = {}
    for name in names:
        if name not in values:
            raise SO101Error(f"{path}: lacks the setting {name}, which {script} has; use the script that wrote it")
        value, hint = values[name], hints[name]
        if dataclasses.is_dataclass(hint):
            value = restore_settings(hint, value, path)
        elif not _is_a(value, hint):
            raise SO101Error(f"{path}: its setting {name} is {value!r}, which {script} cannot use")
        restored[name] = value
    return cls(**restored)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value fits the type hint of a flag."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(each, typing.get_args(hint)[0]) for each in value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def load_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load weights. Raises SO101Error if they do not fit, as when the script has changed since."""
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        kind = type(module)
        script = f"{kind.__name__} of {kind.__module__.replace('.', '/')}.py"
        raise SO101Error(f"{path}: its weights do not fit {script} ({what})") from error


class Checkpoint(NamedTuple):
    """A training script's checkpoint with its script and arguments."""

    saved: dict[str, Any]
    script: types.ModuleType  # the script that wrote it
    args: Any  # the script's Args of the run

    def agent(self, path: str | Path) -> nn.Module:
        """The script's Agent with the weights of the checkpoint."""
        agent = self.script.Agent(self.args)
        load_weights(agent, self.saved["agent"], path)
        return agent


def check_base(saved: dict[str, Any], spec: str, base_policy: BasePolicy | None, path: str | Path) -> None:
    """Raise SO101Error unless the base policy is the one that the residual in path was trained on."""
    now, then = base_policy.fingerprint if base_policy else "", saved["base_fingerprint"]
    if now != then:
        raise SO101Error(
            f"{path}: trained on base policy {spec} with weights {then[:12] or 'none'}, it now has "
            f"{now[:12] or 'none'}; put the old one back"
        )


def load_checkpoint(path: str | Path, saved: dict[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint through the script that wrote it; saved is the content of path if it has been read.

    Raises SO101Error, naming what is wrong with it.
    """
    saved = saved or load_file(path, CHECKPOINT)
    script = load_script(saved["script"], path)
    for name in ("Args", "Agent", "make_envs", "check_args"):
        if not hasattr(script, name):
            raise SO101Error(f"{path}: written by {saved['script']}, which has no {name}; use the script that wrote it")
    return Checkpoint(saved, script, restore_args(script.Args, script.check_args, saved["args"], path))


def restore_args(cls: type, check_args: Callable[[Any], None], values: Any, path: str | Path) -> Any:
    """A script's arguments from the plain values in a file, checked. Raises SO101Error, naming the file."""
    args = restore_settings(cls, values, path)
    try:
        check_args(args)
    except SO101Error as error:
        raise SO101Error(f"{path}: {error}") from error
    return args


def hash_weights(state_dict: dict[str, torch.Tensor], also: str = "") -> str:
    """SHA-256 of weights, and of a string."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def restoring(path: str | Path) -> Iterator[None]:
    """Report whatever goes wrong while a run's state is restored from path as SO101Error."""
    try:
        yield
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise SO101Error(f"{path}: cannot be continued ({error}); resume another checkpoint") from error


def restore_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load an optimiser's state. Raises ValueError if its shapes are not those of the parameters."""
    optimizer.load_state_dict(state_dict)
    for parameter, state in optimizer.state.items():
        if any(state[key].shape != parameter.shape for key in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the optimiser's state has other shapes")
