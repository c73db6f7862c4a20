"""What a file may name: its code and its server are only used if the person who runs the command names them, too.

The person may also name where its base policy lies now. Its weights must then be those that the file was trained with.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from so101.files import check_file, is_file
from so101_sim.errors import SO101Error

# scripts of this project that write policy files, and base policies that are part of it
OWN_SCRIPTS = ("ppo_residual_so101.py", "ppo_rgb.py", "sac.py", "distill.py", "clone.py")
OWN_POLICIES = ("zero", "jacobian", "keyboard")
FILES = ("checkpoint", "bc", "onnx")  # policy files, which are data: loading them comes back here
SERVED = ("server:", "lerobot:")  # the same policy may be behind a server, or in a directory
OPENCV = "opencv:"  # before the spec of a policy that gets the sheet's pose from OpenCV


@dataclasses.dataclass(frozen=True)
class Trust:
    """Permissions. They come from the command line, never from a file."""

    allow: tuple[str, ...] = ()
    """what the model's file names and may use: a script (my_ppo.py), a base policy of your own (my_policy:MyPolicy), or
    where its base policy is now (server:127.0.0.1:5555, lerobot:DIR, checkpoint:PATH)"""
    allow_remote: bool = False
    """allow server:HOST:PORT to be another machine; the connection is not encrypted"""
    send_token: bool = False
    """also send SO101_API_TOKEN to another machine, in clear text"""

    def also(self, *names: str | None) -> Trust:
        """With more names that the person has given on the command line."""
        return dataclasses.replace(self, allow=(*self.allow, *(_inner(name) for name in names if name)))

    def resolve(self, spec: str, path: str | Path) -> tuple[str, Trust]:
        """The base policy to load for the file at path, which names `spec`, and the permissions for what that names.

        A policy that lies elsewhere by now is looked for where the person says: at the last name that it may have.

        Raises:
            SO101Error: the spec is empty, its file is missing, or it is code, a server or a directory that the person
                has not named.
        """
        if not spec:
            raise SO101Error(f"{path}: names no base policy")
        inner, own = _inner(spec), os.path.realpath(path)
        kind, _, file = inner.partition(":")
        others = tuple(each for each in self.allow if _realpath(each) != own)  # no file is its own base policy
        if places := [each for each in others if may_lie_at(inner, each)]:
            # what was found is not looked for again: the policy in this file may have a base policy of the same kind
            left = tuple(each for each in others if each != places[-1]) if kind in FILES else self.allow
            return spec.removesuffix(inner) + _inner(places[-1]), dataclasses.replace(self, allow=left)
        if inner.startswith(SERVED):
            raise _refusal(path, "its base policy is behind", inner)
        if kind not in FILES and inner not in (*OWN_POLICIES, *self.allow):
            raise _refusal(path, "its base policy is the code", inner or spec)
        if kind in FILES and file:
            try:
                check_file(file)
            except SO101Error as error:
                hint = f"if it has moved, add --allow {kind}:PATH"
                raise SO101Error(f"{path}: its base policy, {error}; {hint}") from error
        return spec, self

    def check_script(self, name: str, path: str | Path) -> None:
        """Raise SO101Error if the script that wrote the file at path is neither this project's nor named."""
        if name not in OWN_SCRIPTS and name not in self.allow:
            raise _refusal(path, "was written by the script", name)


def may_lie_at(spec: str, place: str) -> bool:
    """Whether a person may name `place` for the base policy that a file calls `spec`.

    It is a file of the same kind in place of one that is missing, or where a policy of LeRobot or GR00T is now.
    """
    spec, place = _inner(spec), _inner(place)
    kind, _, file = spec.partition(":")
    if spec.startswith(SERVED):
        return place.startswith(SERVED)
    return kind in FILES and place.startswith(f"{kind}:") and not is_file(file)


def _inner(spec: str) -> str:
    """A spec without `opencv:`, which only says where the sheet's pose comes from."""
    while spec.startswith(OPENCV):
        spec = spec.removeprefix(OPENCV)
    return spec


def _realpath(spec: str) -> str:
    """Where the file of a spec lies."""
    return os.path.realpath(_inner(spec).partition(":")[2])


def _foreign(spec: str) -> str:
    """The code or the server within a base policy's spec; "" if there is none."""
    inner = _inner(spec)
    return "" if inner in OWN_POLICIES or inner.partition(":")[0] in FILES else inner


def _refusal(path: str | Path, what: str, name: str) -> SO101Error:
    return SO101Error(f"{path}: {what} {shlex.quote(name)}; if you trust it, add --allow {shlex.quote(name)}")


def trust_of(settings: Any) -> Trust:
    """The permissions within a script's arguments, a dataclass; none if it has no such group."""
    if isinstance(settings, Trust):
        return settings
    if not dataclasses.is_dataclass(settings):
        return Trust()
    found = (trust_of(getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return next((trust for trust in found if trust != Trust()), Trust())


def allow_flags(names: Iterable[str], trust: Trust | None = None) -> str:
    """The flag that lets files use scripts and base policies: " --allow ...", or nothing if all are the project's.

    Args:
        names: scripts and base policies that files name.
        trust: what the person has allowed, files included.
    """
    allowed = [*(trust or Trust()).allow, *map(_foreign, names)]
    shown = [name for name in dict.fromkeys(allowed) if name and name not in (*OWN_SCRIPTS, *OWN_POLICIES)]
    return f" --allow {shlex.join(shown)}" if shown else ""
