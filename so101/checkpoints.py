"""Policy files: their formats, saving, and loading through the script that wrote them. See docs/security.md."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.util
import io
import math
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from so101.cli import flat_settings, training_command
from so101.files import CHECKSUM_BYTES, check_file, checksum, has_checksum, write_atomic
from so101.settings import MAX_COUNT, restore_args
from so101.trust import OWN_SCRIPTS, Trust
from so101_sim.errors import SO101Error

ROOT = Path(__file__).resolve().parent.parent

# what every file of a kind holds; `script` reads `args` into its own Args
SCHEMAS: dict[str, dict[str, Any]] = {
    "so101 checkpoint 10": {
        "script": str, "args": dict, "agent": dict, "optimizer": dict, "ranks": list, "num_envs": int,
        "global_step": int, "base_fingerprint": str, "recorder": dict,
    },
    "so101 clone 5": {"script": str, "args": dict, "agent": dict},
    "so101 student 5": {
        "script": str, "args": dict, "task": dict, "base": dict, "base_fingerprint": str, "teacher_fingerprint": str,
        "teacher_success": float, "global_step": int, "agent": dict, "training": (dict, type(None)), "recorder": dict,
    },
}  # fmt: skip
CHECKPOINT, CLONE, STUDENT = SCHEMAS
ADAM_KEYS = {"step", "exp_avg", "exp_avg_sq"}
LARGEST_COUNT = {"num_envs": 4096}  # as the range of the flag; of others MAX_COUNT
RECORDS = {"recent_episodes": list, "finalists": list, "evaluation_due": bool}  # what so101/recorder.py keeps
BEST_BY = ("success_rate", "mean_return")  # the best model has the highest; the second breaks ties in the first


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Save tensors and plain values in torch's format, a zip archive, whose comment is the file's checksum."""
    buffer = io.BytesIO()  # torch's own writer does not report a full disk
    torch.save(content, buffer)
    archive = buffer.getvalue()[:-2] + CHECKSUM_BYTES.to_bytes(2, "little")  # the last field: length of the comment
    write_atomic(path, lambda temporary: temporary.write_bytes(archive + checksum(archive)))


def to_plain(value: Any) -> Any:
    """Convert arrays to tensors, recursively, so that a checkpoint loads with weights_only=True."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def to_numpy(value: Any) -> Any:
    """Inverse of to_plain."""
    if isinstance(value, dict):
        return {key: to_numpy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_numpy(item) for item in value]
    return value.numpy().copy() if isinstance(value, torch.Tensor) else value


def load_file(path: str | Path, *kinds: str) -> dict[str, Any]:
    """Read a policy file; check its checksum, its keys and types, and that its numbers are finite.

    Args:
        path: the file.
        kinds: accepted kinds, of CHECKPOINT, CLONE and STUDENT; the file's "format" names its kind.

    Raises:
        SO101Error: the file is missing, damaged, or of another kind or version.
    """
    noun = kinds[0].split()[1]
    check_file(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SO101Error(f"{path}: cannot be read ({error.strerror})") from error
    whole = has_checksum(content)
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a damaged file, and for one that would run code
        text = f"{path}: not a readable {noun}, perhaps truncated ({type(error).__name__}); take another one"
        raise SO101Error(text) from error
    if not isinstance(saved, dict) or saved.get("format") not in kinds:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        known = " or ".join(map(repr, kinds))
        raise SO101Error(f"{path}: not a {noun} of this version, which reads {known}; the file says {found!r}")
    if not whole:
        raise SO101Error(f"{path}: damaged, its checksum is wrong or missing; take another {noun}")
    try:
        _check_content(saved, SCHEMAS[saved["format"]])
    except (ValueError, RecursionError) as error:
        raise SO101Error(f"{path}: {error}; take another {noun}") from error
    return saved


def _check_content(saved: dict[Any, Any], schema: dict[str, Any]) -> None:
    """Raise ValueError for keys and types other than the schema's, and for numbers that are not finite."""
    if unknown := [key for key in saved if key not in schema and key != "format"]:
        raise ValueError(f"{unknown[0]!r} is unknown")
    for key, expected in schema.items():
        value = saved.get(key, ...)
        if not isinstance(value, expected) or isinstance(value, bool):
            raise ValueError(f"{key} is missing or of a wrong type")
        if isinstance(value, int) and not 0 <= value <= LARGEST_COUNT.get(key, MAX_COUNT):
            raise ValueError(f"{key} is {value}")
        _check_finite(value, key)
    if "recorder" in schema:
        _check_records(saved["recorder"], saved["global_step"])
    for name, tensor in saved["agent"].items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            raise ValueError(f"weight {name} is not a tensor of floats")


def _check_records(records: dict[str, Any], global_step: int) -> None:
    """Raise ValueError for impossible records of episodes, or of the best models so far, best first."""
    if records.keys() != RECORDS.keys() or any(type(records[key]) is not kind for key, kind in RECORDS.items()):
        raise ValueError(f"recorder is not {', '.join(RECORDS)}")
    episodes, finalists = records["recent_episodes"], records["finalists"]
    for each in episodes:
        if not isinstance(each, dict) or not is_rate(each.get("success", 0)):
            raise ValueError("an episode in recorder is no map, or its success no rate")
        for key, value in each.items():  # an arm's episode also says, in words, what has ended it
            if not isinstance(value, (int, float)) and not (key == "trouble" and isinstance(value, str)):
                raise ValueError(f"{key} of an episode in recorder is no number")
    for each in finalists:
        known = isinstance(each, dict) and each.keys() == {"step", *BEST_BY}
        if not known or type(each["step"]) is not int or type(each["mean_return"]) is not float:
            raise ValueError(f"a best model in recorder is not step, {' and '.join(BEST_BY)}")
        if not 0 <= each["step"] <= global_step or not is_rate(each["success_rate"]):
            raise ValueError(f"a best model in recorder is of step {each['step']}, or its success no rate")
    steps = {each["step"] for each in finalists}
    if finalists != sorted(finalists, key=rating, reverse=True) or len(steps) < len(finalists):
        raise ValueError("the best models in recorder are not in order, or there twice")


def rating(evaluation: Mapping[str, Any]) -> list[float]:
    """Sort key of evaluations: the best one has the highest."""
    return [evaluation[key] for key in (*BEST_BY, "step")]


def is_rate(value: Any) -> bool:
    """Whether a value is a number in [0, 1]."""
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _check_finite(value: Any, name: str) -> None:
    """Raise ValueError for a number within a nested value that is not finite, or for a type that no file has."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key != "base_memory":  # a policy may remember that it knows nothing: NaN
                _check_finite(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_finite(item, f"{name}[{i}]")
    elif isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type != "cpu" or not torch.isfinite(value).all():
            raise ValueError(f"{name} is not finite")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name} is not finite")
    elif not isinstance(value, (str, int, type(None))):
        raise ValueError(f"{name} is a {type(value).__name__}")


def load_script(name: str, path: str | Path = "", trust: Trust | None = None) -> types.ModuleType:
    """The script called name as a module: the one that runs, or one beside so101_env.py, in so101/ or where we are.

    Args:
        name: file name of the script.
        path: the policy file that names it, if one does. Then it must be a script of this project, run, or be allowed.
        trust: the permissions for that.

    Raises:
        SO101Error: there is no such script, or it is not allowed.
    """
    where = f"{path}: written by {name}, which" if path else f"script {name}:"
    if not re.fullmatch(r"[A-Za-z_]\w*\.py", name):
        raise SO101Error(f"{where} is not the name of a script")
    main = getattr(sys.modules["__main__"], "__file__", None)
    if main and Path(main).name == name:
        return sys.modules["__main__"]
    if path:
        (trust or Trust()).check_script(name, path)
    own_places, cwd = [ROOT, ROOT / "so101"], Path.cwd()
    places = own_places if name in OWN_SCRIPTS else [ROOT, cwd, ROOT / "so101"]
    script = next((place / name for place in places if (place / name).is_file()), None)
    if script is None:
        raise SO101Error(f"{where} is not beside so101_env.py, in the working directory or in so101/; put it back")
    script, own = script.resolve(), script.parent == ROOT / "so101"
    module_name = f"so101.{script.stem}" if own else script.stem
    module = sys.modules.get(module_name)
    if getattr(module, "__file__", None) and Path(module.__file__).resolve() == script:
        return module  # it has been loaded
    if own:
        return importlib.import_module(module_name)
    spec = importlib.util.spec_from_file_location(module_name, script)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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

    @property
    def command(self) -> str | None:
        """The command line that trains it; None if it has practised on an arm."""
        if any(isinstance(own, dict) and "arm" in own for own in self.saved["ranks"]):
            return None
        return training_command(self.script, flat_settings(dataclasses.asdict(self.args)))

    def agent(self, path: str | Path) -> nn.Module:
        """The script's Agent with the weights of the checkpoint."""
        agent = self.script.Agent(self.args)
        load_weights(agent, self.saved["agent"], path)
        return agent


def load_checkpoint(path: str | Path, saved: dict[str, Any] | None = None, trust: Trust | None = None) -> Checkpoint:
    """Read a checkpoint through the script that wrote it.

    Args:
        path: the checkpoint.
        saved: its content, if it has been read.
        trust: the permissions of the person who runs the command.

    Raises:
        SO101Error: names what is wrong with it, or what it names without permission.
    """
    saved = saved or load_file(path, CHECKPOINT)
    script = load_script(saved["script"], path, trust)
    for name in ("Args", "Agent", "make_envs", "check_args"):
        if not hasattr(script, name):
            raise SO101Error(f"{path}: written by {saved['script']}, which has no {name}; use the script that wrote it")
    return Checkpoint(saved, script, restore_args(script.Args, script.check_args, saved["args"], path, trust))


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
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise SO101Error(f"{path}: cannot be continued ({error}); resume another checkpoint") from error


def restore_optimizer(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], begun: bool = False) -> None:
    """Load the moments and learning rates of Adam or AdamW; all other settings are those of the optimiser.

    Args:
        optimizer: the new one.
        state_dict: what the saved one gave.
        begun: whether it has been used, so that there are moments.

    Raises:
        ValueError: they are not those of the parameters.
    """
    own, saved = optimizer.state_dict(), state_dict["param_groups"]
    given = [each for state in state_dict["state"].values() for each in state.values()]
    if any(getattr(each, "dtype", None) != torch.float32 for each in given):  # loading would convert them
        raise ValueError("the optimiser's state is not tensors of floats")
    if len(saved) != len(own["param_groups"]):
        raise ValueError("the optimiser has other groups of parameters")
    for group, given in zip(own["param_groups"], saved):
        if type(given["lr"]) is not float or not 0 <= given["lr"] <= 10:
            raise ValueError(f"the optimiser's learning rate is {given['lr']}")
        group["lr"] = given["lr"]
    optimizer.load_state_dict({"state": state_dict["state"], "param_groups": own["param_groups"]})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if (begun or optimizer.state) and optimizer.state.keys() != {each for each in parameters if each.requires_grad}:
        raise ValueError("the optimiser's state is not that of these parameters")
    for parameter, state in optimizer.state.items():
        moments, step = [state[key] for key in ("exp_avg", "exp_avg_sq")], state["step"]
        if any(moment.shape != parameter.shape for moment in moments) or step.shape or state.keys() - ADAM_KEYS:
            raise ValueError("the optimiser's state has other shapes")
        if (moments[1] < 0).any() or not 0 <= step <= MAX_COUNT or step != step.round():
            raise ValueError("the optimiser's state is impossible")
