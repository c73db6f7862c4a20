"""Angles and rotations in the plane of the table."""

from __future__ import annotations

import numpy as np


def wrap_angle(angle: np.ndarray) -> np.ndarray:
    """Angle in rad, in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def rotate(vector: np.ndarray, angle_rad: np.ndarray) -> np.ndarray:
    """Vectors (N, 2) rotated by angles (N,)."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    x, y = vector[:, 0], vector[:, 1]
    return np.column_stack([c * x - s * y, s * x + c * y])
