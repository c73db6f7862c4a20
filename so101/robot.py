"""The interface of an arm: a simulated one (so101/simulated_arm.py), or an SO-101 (so101/lerobot_arm.py)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from so101_sim.errors import SO101Error

LEROBOT_P = 16  # P coefficient that LeRobot's driver sets


class RobotError(SO101Error):
    """The arm or its camera can no longer be used."""


class Picture(NamedTuple):
    """A camera picture with its time."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    time_s: float  # time.monotonic() when it was taken


class Robot:
    """Interface of an arm. All methods raise RobotError once the arm or its camera is lost."""

    def read(self) -> tuple[np.ndarray, float]:
        """Joint positions (6,), rad, as the encoders measure them, and the time.monotonic() of the measurement."""
        raise NotImplementedError

    def write(self, target_rad: np.ndarray) -> None:
        """Send joint targets (6,), rad. They hold until the next ones."""
        raise NotImplementedError

    def picture(self) -> Picture:
        """The newest picture of the camera."""
        raise NotImplementedError

    def close(self) -> None:
        """Release arm and camera."""
