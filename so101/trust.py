"""What a file may name: its code and its server are only used if the person who runs the command names them, too."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from so101_sim.errors import SO101Error

# scripts of this project that write policy files, and base policies that are part of it
OWN_SCRIPTS = ("ppo_residual_so101.py", "ppo_rgb.py", "sac.py", "distill.py", "clone.py")
OWN_POLICIES = ("zero", "jacobian", "keyboard")
FILES = ("checkpoint", "bc", "onnx")  # policy files, which are data: loading them comes back here
SERVED = ("server:", "lerobot:")  # the same policy may be behind a server, or in a directory


@dataclasses.dataclass(frozen=True)
class Trust:
    """Permissions. They come from the command line, never from a file."""

    allow: tuple[str, ...] = ()
    """what the model's file names and may use: a script (my_ppo.py), a base policy of your own (my_policy:MyPolicy), or
    where its LeRobot or GR00T policy is now (server:127.0.0.1:5555, lerobot:DIR)"""
    allow_remote: bool = False
    """allow server:HOST:PORT to be another machine; the connection is not encrypted"""
    send_token: bool = False
    """also send SO101_API_TOKEN to another machine, in clear text"""

    def also(self, *names: str | None) -> Trust:
        """With more names that the person has given on the command line."""
        foreign = [_foreign(name) for name in names if name]
        return dataclasses.replace(self, allow=(*self.allow, *filter(None, foreign)))

    def spec(self, spec: str, path: str | Path) -> str:
        """The base policy's spec to load for the file at path, which names `spec`.

        For a server or a directory of LeRobot it is what the person has named, wherever the file's own points to.

        Raises:
            SO101Error: the spec is empty, or it is code, a server or a directory that the person has not named.
        """
        if not spec:
            raise SO101Error(f"{path}: names no base policy")
        foreign = _foreign(spec)
        if foreign.startswith(SERVED):
            named = [each for each in self.allow if each.startswith(SERVED)]
            if not named:
                raise _refusal(path, "its base policy is behind", foreign)
            return spec.removesuffix(foreign) + named[-1]
        if foreign and foreign not in self.allow:
            raise _refusal(path, "its base policy is the code", foreign)
        return spec

    def check_script(self, name: str, path: str | Path) -> None:
        """Raise SO101Error if the script that wrote the file at path is neither this project's nor named."""
        if name not in OWN_SCRIPTS and name not in self.allow:
            raise _refusal(path, "was written by the script", name)


def _foreign(spec: str) -> str:
    """The code or the server within a base policy's spec; "" if there is none."""
    kind, _, rest = spec.partition(":")
    if kind == "opencv" and rest:
        return _foreign(rest)
    return "" if spec in OWN_POLICIES or kind in FILES else spec


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
