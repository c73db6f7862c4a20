"""Settings of a script, restored from the plain values in a policy file, and checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from so101.trust import Trust
from so101_sim.errors import SO101Error, check_ranges

MAX_COUNT = 10**12  # most steps, or environments, in a file


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
        restored[name] = float(value) if hint is float else value
    settings = cls(**restored)
    try:
        check_ranges(settings, getattr(cls, "RANGES", {}))
    except SO101Error as error:
        raise SO101Error(f"{path}: its setting {error}") from error
    return settings


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value fits the type hint of a flag."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        hints = typing.get_args(hint)
        hints = hints[:1] * len(value) if isinstance(value, tuple) and hints[-1] is ... else hints
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(_is_a, value, hints))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int and abs(value) < 2**53)


def restore_args(
    cls: type, check_args: Callable[[Any], None], values: Any, path: str | Path, trust: Trust | None = None
) -> Any:
    """A script's arguments from the plain values in a file, checked; the permissions are those of the person.

    Raises SO101Error, naming the file.
    """
    args, trust = restore_settings(cls, values, path), trust or Trust()
    if hasattr(args, "base"):
        args.base = trusted_base(args.base, path, trust)
    if hasattr(args, "trust"):
        args.trust = trust
    try:
        check_args(args)
    except SO101Error as error:
        raise SO101Error(f"{path}: {error}") from error
    return args


def trusted_base(base: Any, path: str | Path, trust: Trust) -> Any:
    """A dataclass with base_policy and server from a file, with the permissions of the person.

    Raises SO101Error as Trust.resolve does.
    """
    spec, trust = trust.resolve(base.base_policy, path)
    return dataclasses.replace(base, base_policy=spec, server=dataclasses.replace(base.server, trust=trust))
