"""Errors that a user can fix, and the argument checks that raise them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

LARGEST = 1e10  # number in a state; MuJoCo takes larger ones for a diverged simulation


class SO101Error(ValueError):
    """A user error: one line that says what is wrong and how to fix it. Scripts print it and exit with code 2."""


class BasePolicyError(SO101Error):
    """A base policy that cannot act, or whose action is invalid. It ends the run."""


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise SO101Error if an argument is not as expected."""
    if not condition:
        raise SO101Error(f"{name} must be {expected}, got {value}")


def strict_json(text: str | bytes) -> Any:
    """The content of a JSON text. Raises ValueError if it is none, has a name twice in one map, or NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"contains {next(name for name in content if names.count(name) > 1)!r:.80} twice")
        return content

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"contains {number:.20}")
        return value

    return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)


def check_ranges(settings: Any, ranges: Mapping[str, tuple[float, float]], name: Callable[[str], str] = str) -> None:
    """Raise SO101Error for the first field of a dataclass that is not finite or is outside its closed range.

    Args:
        settings: the dataclass instance; fields that are None pass, and of a tuple every number is checked.
        ranges: (lowest, highest) by field.
        name: turns a field's name into what the message calls it; scripts pass the name of the flag.
    """
    for field in dataclasses.fields(settings):
        value, (low, high) = getattr(settings, field.name), ranges.get(field.name, (-np.inf, np.inf))
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, (int, float)) and not (low <= number <= high and -np.inf < number < np.inf):
                bounds = f"in [{low}, {high}]" if -np.inf < low <= high < np.inf else "a finite number"
                raise SO101Error(f"{name(field.name)} must be {bounds}, got {number}")


def check_arrays(
    own: Mapping[str, np.ndarray], saved: Mapping[str, Any], what: str = "state of the environments"
) -> None:
    """Raise SO101Error for a saved array that is missing, impossible, or of another shape or type than the own one."""
    for name, array in own.items():
        given = saved.get(name)
        if getattr(given, "shape", None) != array.shape or given.dtype != array.dtype:
            raise SO101Error(f"{what}: {name} must have shape {array.shape}, {array.dtype}")
        possible = {"f": np.abs(given) <= LARGEST, "i": given >= 0}.get(array.dtype.kind, np.True_)  # i: counts, seeds
        if not possible.all():
            raise SO101Error(f"{what}: {name} has impossible numbers")
