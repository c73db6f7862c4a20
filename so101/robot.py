"""The interface of an arm: a simulated one (so101/simulated_arm.py), or an SO-101 (so101/lerobot_arm.py)."""

from __future__ import annotations

import collections
import contextlib
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from so101_sim.control import Calibration
from so101_sim.errors import SO101Error

LEROBOT_P = 16  # P coefficient that LeRobot's driver sets
SAY_AGAIN_S = 5.0  # a warning about what goes on is printed again after this time


class RobotError(SO101Error):
    """The arm or its camera can no longer be used."""


class ServoFault(RobotError):
    """A servo is stalled, overloaded or too hot: it must not be asked to move any more."""


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Signals that end the program wait until the end of the block.

    A signal mask would not do: it holds for one thread, and the system may deliver a signal to any other.
    """
    came: list[int] = []
    waiting = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {each: signal.signal(each, lambda signum, frame: came.append(signum)) for each in waiting}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    if came:
        signal.raise_signal(came[0])


class Picture(NamedTuple):
    """A camera picture with its time."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    time_s: float  # time.monotonic() when it was taken


class Robot:
    """Interface of an arm. All methods raise RobotError once the arm or its camera is lost."""

    ranges: Calibration | None = None  # joint ranges of its calibration; None: those of the model
    enabled = False  # whether servos may be under torque by `enable`
    servo_gain = 1.0  # believed gain of its servos, relative to the model's at the same P coefficient
    gain_known = False  # whether that was measured; otherwise the loop estimates it

    def __init__(self) -> None:
        self.events: collections.Counter[str] = collections.Counter()  # what happened and how often, for the report

    def enable(self) -> None:
        """Switch the torque on. The arm holds its present position."""

    def read(self) -> tuple[np.ndarray, float]:
        """Joint positions (6,), rad, as the encoders measure them, and the time.monotonic() of the measurement."""
        raise NotImplementedError

    def write(self, target_rad: np.ndarray) -> None:
        """Send joint targets (6,), rad. They hold until the next ones."""
        raise NotImplementedError

    def picture(self) -> Picture:
        """The newest picture of the camera."""
        raise NotImplementedError

    def watch(self) -> None:
        """Check a part of the servos' state; called after each command. Raises ServoFault if the arm must stop."""

    def relax(self) -> list[str]:
        """Switch the torque off, if `enable` was called; returns the joints that did not confirm it."""
        return []

    def close(self) -> None:
        """Release arm and camera."""
