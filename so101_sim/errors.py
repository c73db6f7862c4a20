"""Errors that a user can fix, and the argument checks that raise them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class SO101Error(ValueError):
    """A user error: one line that says what is wrong and how to fix it. Scripts print it and exit with code 2."""


class BasePolicyError(SO101Error):
    """A base policy that cannot act, or whose action is invalid. It ends the run."""


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raise SO101Error if an argument is not as expected."""
    if not condition:
        raise SO101Error(f"{name} must be {expected}, got {value}")


def check_ranges(settings: Any, ranges: Mapping[str, tuple[float, float]], name: Callable[[str], str] = str) -> None:
    """Raise SO101Error for the first field of a dataclass that is not finite or is outside its closed range.

    Args:
        settings: the dataclass instance; fields that are None pass.
        ranges: (lowest, highest) by field.
        name: turns a field's name into what the message calls it; scripts pass the name of the flag.
    """
    for field in dataclasses.fields(settings):
        value, (low, high) = getattr(settings, field.name), ranges.get(field.name, (-np.inf, np.inf))
        if isinstance(value, (int, float)) and not (low <= value <= high and -np.inf < value < np.inf):
            bounds = f"in [{low}, {high}]" if -np.inf < low <= high < np.inf else "a finite number"
            raise SO101Error(f"{name(field.name)} must be {bounds}, got {value}")
