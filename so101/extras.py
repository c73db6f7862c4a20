"""Libraries that only some parts need: an import error becomes one line that names the extra to install."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

from so101_sim.errors import SO101Error

CLONE = (Path(__file__).resolve().parent.parent / "pyproject.toml").is_file()  # not installed from a wheel


def import_extra(module: str, extra: str, user: str) -> types.ModuleType:
    """A module of an optional library. Raises SO101Error, for `user`, if it is not installed.

    Args:
        module: as in an import statement.
        extra: the extra of pyproject.toml that installs it.
        user: what needs it, the first words of the message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        way = f'pip install -e ".[{extra}]" in the clone' if CLONE else f'pip install "ppo-residual-so101[{extra}]"'
        raise SO101Error(f"{user} needs {missing}: {way}") from error
