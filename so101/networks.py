"""What networks see: normalised observations, derived features, mirror images; and the network that finds the sheet."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

from so101_env import (
    ACT_DIM,
    MEASURED,
    OBS,
    OBSERVATION,
    SHAPING_INSET_M,
    SHEET_HALF_M,
    TAPE_CENTER_M,
    TIP_PRESSED_M,
    Part,
    SO101Error,
    arrival_yaw,
    sheet_pose,
)
from so101_sim.control import JOINT_MIRROR, clamp
from so101_sim.geometry import in_axes, rotate

# ONNX export keeps module constants only as plain numbers, see so101/onnx_export.py
_INNER_HALF_M = tuple((SHEET_HALF_M - SHAPING_INSET_M).tolist())


class Derived(NamedTuple):
    """A feature that is computed from the observation."""

    function: Callable[[np.ndarray], np.ndarray]  # observations (N, 25) to features (N, k)
    mirror: tuple[int, ...]  # sign of each of the k numbers in the left-right mirror image


def _to_inner(point: np.ndarray) -> np.ndarray:
    """Vectors (N, 2) from points (N, 2) in the sheets' axes to the nearest points well inside the sheets."""
    half = np.array(_INNER_HALF_M, np.float32)
    return clamp(point, -half, half) - point


def sheet_to_tip(obs: np.ndarray) -> np.ndarray:
    """Vector (N, 2) from the sheet's nearest point to the tip, in the sheet's axes, per 30 mm; zero over the sheet.

    It separates pressing from going to the sheet first. Networks hardly learn it from a yaw and two positions in so few
    steps.
    """
    tip = in_axes(obs[:, OBS["tip_pos"]][:, :2], *sheet_pose(obs))
    return _to_inner(tip) / np.float32(-0.03)


def contact(obs: np.ndarray, gain: float = 1.0) -> np.ndarray:
    """What decides between pressing, lifting and dragging, (N, 8); all but the height times gain.

    Whether the tip is beside the sheet, in [0, 1]; its height above that of pressed fingertips, per 5 mm; whether it
    presses beside the sheet, and on it; the direction (2) to the sheet if it is beside; the direction (2) from the
    sheet to the tape if it presses on the sheet. Directions are unit vectors in the world frame.
    """
    tip, (sheet_xy, yaw) = obs[:, OBS["tip_pos"]], sheet_pose(obs)
    inside = in_axes(tip[:, :2], sheet_xy, yaw)
    away = _to_inner(inside)
    distance = np.hypot(away[:, 0], away[:, 1])
    beside = np.minimum(distance / np.float32(SHAPING_INSET_M), 1)
    height = (tip[:, 2] - np.float32(TIP_PRESSED_M)) / np.float32(0.005)
    pressed = clamp(1 - height, 0, 1)
    to_sheet = rotate(away / np.maximum(distance, 1e-6)[:, None], yaw)
    to_tape = obs[:, OBS["tape_minus_sheet"]][:, :2]
    to_tape = to_tape / np.maximum(np.hypot(to_tape[:, 0], to_tape[:, 1]), 1e-6)[:, None]
    on = (1 - beside) * pressed
    rest = np.column_stack([beside, beside * pressed, on, beside[:, None] * to_sheet, on[:, None] * to_tape])
    rest *= np.float32(gain)
    return np.column_stack([rest[:, :1], clamp(height, -1, 3), rest[:, 1:]])


def expected_yaw(obs: np.ndarray) -> np.ndarray:
    """The yaw (N, 1) to expect at the tape, per 0.1 rad, and its product (N, 2) with the displacement to the tape.

    Across that displacement, the product points to where the tip should press.
    """
    end = arrival_yaw(obs[:, OBS["tip_pos"]][:, :2], *sheet_pose(obs))[:, None]
    return np.concatenate([end / 0.1, end * obs[:, OBS["tape_minus_sheet"]][:, :2] / 0.01], axis=1)


SHEET_TO_TIP = Derived(sheet_to_tip, (1, -1))
EXPECTED_YAW = Derived(expected_yaw, (-1, -1, 1))


def contact_features(gain: float) -> Derived:
    """The feature `contact` with this gain."""
    return Derived(functools.partial(contact, gain=gain), (1, 1, 1, 1, 1, -1, 1, -1))


class Features(nn.Module):
    """What a network sees of observations (B, D): (B, views, F), normalised parts and derived features.

    The views are the scene and, with symmetry, its left-right mirror image. Normalisation and mirror signs are buffers,
    so they are saved with the weights.

    Args:
        parts: parts of the observation.
        derived: features to compute from it.
        symmetry: also show the mirror image.
    """

    def __init__(
        self, parts: Mapping[str, Part] = OBSERVATION, derived: Sequence[Derived] = (SHEET_TO_TIP,),
        symmetry: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.functions = [each.function for each in derived]

        def column(field: str) -> np.ndarray:
            values = [np.broadcast_to(getattr(part, field), len(part.names)) for part in parts.values()]
            return np.concatenate(values).astype(np.float32)

        signs = np.concatenate([column("mirror"), *(each.mirror for each in derived)]).astype(np.float32)
        views = 1 + symmetry
        buffers = {"obs_mean": column("mean"), "obs_scale": column("scale")}
        buffers |= {"signs": np.stack([np.ones_like(signs), signs])[:views]}
        buffers |= {"action_signs": np.array([[1] * ACT_DIM, JOINT_MIRROR], np.float32)[:views]}
        for name, array in buffers.items():
            self.register_buffer(name, torch.from_numpy(array))
        self.dim = len(signs)

    def forward(self, obs: np.ndarray) -> torch.Tensor:
        """Features (B, views, F). In NumPy, whose calls cost a third of PyTorch's on the few rows of a step."""
        if obs.shape[1] != len(self.obs_mean):
            given, wanted = obs.shape[1], len(self.obs_mean)
            raise SO101Error(f"the policy was made for {wanted} observations, this environment has {given}")
        scaled = clamp((obs - self.obs_mean.numpy()) / self.obs_scale.numpy(), -10.0, 10.0)
        x = np.concatenate([scaled, *(function(obs) for function in self.functions)], axis=1, dtype=np.float32)
        return torch.from_numpy(x[:, None] * self.signs.numpy())


# scale of the sheet's pose in networks: x and y from the tape's centre, and yaw
POSE_SCALE = np.array([0.1, 0.1, 0.3], np.float32)  # m, m, rad
MEASURED_MEAN, MEASURED_SCALE = (
    np.concatenate([
        np.broadcast_to(getattr(part, key), len(part.names)) for part in (OBSERVATION[name] for name in MEASURED)
    ]).astype(np.float32)
    for key in ("mean", "scale")
)  # fmt: skip
MEASURED_DIM = len(MEASURED_MEAN)


def scaled_measurements(state: np.ndarray) -> torch.Tensor:
    """Normalised measurements (N, 15) of what a camera policy observes besides pictures, (N, 15 or more)."""
    scaled = (state[:, :MEASURED_DIM] - MEASURED_MEAN) / MEASURED_SCALE
    return torch.from_numpy(clamp(scaled, -10.0, 10.0).astype(np.float32))


def scaled_pose(obs: np.ndarray) -> np.ndarray:
    """The sheet's true pose (N, 3) float32 in observations (N, 25): from the tape's centre, in units of POSE_SCALE."""
    xy, yaw = sheet_pose(obs)
    return (np.column_stack([xy - TAPE_CENTER_M, yaw]) / POSE_SCALE).astype(np.float32)


class SheetFinder(nn.Module):
    """Estimates the sheet's pose, and a latent vector, from pictures and measurements.

    One convolutional trunk per camera; a head on their features and the measurements gives the pose.

    Args:
        num_cameras, image_size: number and side, in pixels, of the square pictures.
        measured_dim: number of measurements, of which the first are the normalised parts of MEASURED.
        width: number of features and of hidden units.
        latent: size of the latent vector; 0: none.
    """

    LATENT = 32
    DIM = 3 + 2 + LATENT  # size of the result

    def __init__(self, num_cameras: int, image_size: int, measured_dim: int, width: int, latent: int = LATENT):
        super().__init__()
        size = -(-image_size // 8)  # side of the last feature map

        def trunk() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(3, 32, 7, 4, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
                nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Flatten(),
            ).to(memory_format=torch.channels_last)  # fmt: skip

        self.trunks = nn.ModuleList([trunk() for _ in range(num_cameras)])
        self.features = nn.Sequential(nn.Linear(32 * size**2 * num_cameras, width), nn.LayerNorm(width), nn.ReLU())
        self.pose = nn.Sequential(nn.Linear(width + measured_dim, width), nn.ReLU(), nn.Linear(width, 3))
        self.latent = nn.Linear(width, latent) if latent else None
        inner = SHEET_HALF_M - SHAPING_INSET_M
        buffers = {"tip_scale_m": OBSERVATION["tip_pos"].scale[:2], "pose_scale": POSE_SCALE, "inner_half_m": inner}
        for name, array in buffers.items():
            self.register_buffer(name, torch.tensor(np.asarray(array), dtype=torch.float32))

    def forward(self, images: list[torch.Tensor], measured: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything found (B, 37), the input of a policy's network, and its first part, the pose (B, 3) in POSE_SCALE.

        Args:
            images: (B, H, W, 3) uint8 for each camera.
            measured: (B, measured_dim), normalised.
        """
        maps = [trunk((image.permute(0, 3, 1, 2).float() - 128) / 64) for trunk, image in zip(self.trunks, images)]
        features = self.features(torch.cat(maps, dim=1))
        pose = self.pose(torch.cat([features, measured], dim=1))
        found = [pose, self.sheet_to_tip(pose, measured), *([self.latent(features)] if self.latent else [])]
        return torch.cat(found, dim=1), pose

    def sheet_to_tip(self, pose: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """`sheet_to_tip` (B, 2) for an estimated pose; differentiable."""
        tip = slice(MEASURED_DIM - 3, MEASURED_DIM - 1)
        x, y = (measured[:, tip] * self.tip_scale_m - pose[:, :2] * self.pose_scale[:2]).unbind(1)
        c, s = torch.cos(pose[:, 2] * self.pose_scale[2]), torch.sin(pose[:, 2] * self.pose_scale[2])
        point = torch.stack([c * x + s * y, c * y - s * x], dim=1)
        return (point - torch.clamp(point, -self.inner_half_m, self.inner_half_m)) / 0.03
