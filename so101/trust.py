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

from so101.files import is_file
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
        inner = [name.removeprefix(OPENCV) for name in names if name]
        return dataclasses.replace(self, allow=(*self.allow, *(each for each in inner if each not in OWN_POLICIES)))

    def resolve(self, spec: str, path: str | Path) -> tuple[str, Trust]:
        """The base policy to load for the file at path, which names `spec`, and the permissions for what that names.

        A policy that may lie elsewhere by now is looked for where the person says: at the last name of its kind, if
        there is one.

        Raises:
            SO101Error: the spec is empty, its file is missing, or it is code, a server or a directory that the person
                has not named.
        """
        if not spec:
            raise SO101Error(f"{path}: names no base policy")
        inner = spec.removeprefix(OPENCV)
        kind, _, file = inner.partition(":")
        named = [each for each in self.allow if are_of_one_kind(each, inner)]
        if kind in FILES:
            own = os.path.realpath(path)  # no file is its own base policy
            if moved := [each for each in named if os.path.realpath(each.partition(":")[2]) != own]:
                left = tuple(
                    each for each in self.allow if each != moved[-1]
                )  # the next file may have a base policy, too
                return spec.removesuffix(inner) + moved[-1], dataclasses.replace(self, allow=left)
            if not is_file(file):
                raise SO101Error(
                    f"{path}: its base policy, {file}: no such file; add --allow {kind}:PATH if it has moved"
                )
        elif inner.startswith(SERVED):
            if not named:
                raise _refusal(path, "its base policy is behind", inner)
            return spec.removesuffix(inner) + named[-1], self
        elif inner not in (*OWN_POLICIES, *self.allow):
            raise _refusal(path, "its base policy is the code", inner or spec)
        return spec, self

    def check_script(self, name: str, path: str | Path) -> None:
        """Raise SO101Error if the script that wrote the file at path is neither this project's nor named."""
        if name not in OWN_SCRIPTS and name not in self.allow:
            raise _refusal(path, "was written by the script", name)


def are_of_one_kind(one: str, other: str) -> bool:
    """Whether two specs can name the same base policy in two places: files, or directories or servers of LeRobot."""
    while one.startswith(OPENCV) and other.startswith(OPENCV):
        one, other = one.removeprefix(OPENCV), other.removeprefix(OPENCV)
    kinds = {each.partition(":")[0] for each in (one, other)}
    return all(each.startswith(SERVED) for each in (one, other)) or (len(kinds) == 1 and kinds <= {*FILES})


def _foreign(spec: str) -> str:
    """The code or the server within a base policy's spec; "" if there is none."""
    inner = spec.removeprefix(OPENCV)
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


def allow_flags(names: Iterable[str]) -> str:
    """The flag that lets files use scripts and base policies: " --allow ...", or nothing if all are the project's."""
    foreign = [name for name in dict.fromkeys(map(_foreign, names)) if name and name not in OWN_SCRIPTS]
    return f" --allow {shlex.join(foreign)}" if foreign else ""
