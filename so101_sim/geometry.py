"""Angles, rotations and rectangles in the plane of the table."""

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


def in_axes(point_xy_m: np.ndarray, origin_xy_m: np.ndarray, angle_rad: np.ndarray) -> np.ndarray:
    """Points (N, 2) relative to origins (N, 2), in axes that are turned by angles (N,), (N, 2)."""
    return rotate(point_xy_m - origin_xy_m, -angle_rad)


def distance_to_rectangle(
    point_xy_m: np.ndarray, center_xy_m: np.ndarray, angle_rad: np.ndarray, half_m: np.ndarray, inset_m: float = 0.0
) -> np.ndarray:
    """Distance of points (N, 2) to the nearest point at least inset_m inside the edges of turned rectangles, (N,).

    Args:
        center_xy_m, angle_rad: the rectangles' centres (N, 2) and rotations (N,).
        half_m: half of their sides, (2,).
    """
    point = np.abs(in_axes(point_xy_m, center_xy_m, angle_rad))
    outside = np.maximum(point - half_m + inset_m, 0.0)
    return np.hypot(outside[:, 0], outside[:, 1])
