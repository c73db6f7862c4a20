"""Paper in square: an SO-101 arm slides an A5 sheet over a table into a rectangle of red tape, in MuJoCo.

`SO101ResidualVectorEnv` steps a batch of simulations on MuJoCo's thread pool; `SO101ResidualEnv` is the same code with
a batch of one, so both give the same numbers from the same seeds and actions. World frame = base frame of the arm:
x straight ahead, y to the left, z up, origin at the base on the table. SI units throughout.

Another task is a subclass that overrides `draw_start`, `observe`, `command_targets`, `success`, `failure`,
`reward_terms` or `potential`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

from so101_control import ACT_DIM, BACKLASH_RAD, FIRMWARE_P, JOINTS, Controller, clamp
from so101_scene import (
    CONTROL_HZ,
    SHEET_HALF_M,
    SHEET_HALF_THICKNESS_M,
    TAPE_CENTER_M,
    TAPE_MARGIN_M,
    Look,
    Painter,
    SO101Error,
    Viewer,
    VisualRandomization,
    add_noise,
    camera_names,
    check_display,
    draw_look,
    load_model,
)

TASK_TEXT = (
    "Slide the sheet of paper into the square of red tape."  # for datasets, and policies that are told what to do
)
MAX_EPISODE_STEPS = 400
SUCCESS_STEPS = 5  # consecutive control steps with all four corners inside

# gripper down, its tip over the tape's centre, jaws almost closed: both fingertips 10 mm above the sheet's surface.
# wrist_roll .047 puts the jaws into the arm's plane of symmetry.
HOME_RAD = np.array([0.0, 0.4759, -0.2335, 1.3284, 0.0470, 0.0])
# makes a base policy of a spec string; by name, as Gymnasium names entry points: most users of this file need no torch
POLICY_LOADER = "so101_policies:load_policy"
BASE_POLICY_NAMES = ("reset", "act", "close", "memory", "fingerprint", "cameras", "image_size", "max_envs", "quit")
MAX_DELTA_RAD = 6.3  # no joint's range is wider: a base policy that asks for more is wrong about its units
SHEET_REACH_M = 0.42  # stretched arm, tip on the table, from the shoulder_pan axis
PAN_AXIS_M = np.array([0.0388353, 0.0])

# potential of the shaping term, per metre: tip to sheet, sheet to tape, and radians of yaw counted as metres
SHAPING_PER_M, SHAPING_YAW_M_PER_RAD = 100.0, 0.05
# A sheet that is dragged by a point beside its centre turns: rad per m of lever across the drag and m of drag.
# Fitted to drags of the scripted pusher.
TURN_RAD_PER_M2 = 39.0
SHAPING_INSET_M = 0.01  # the tip counts as over the sheet this far inside its edges
TIP_PRESSED_M = 0.0073  # height of the gripper tip when the fingertips touch the sheet
# With a limp sheet, a fingertip nearer than this presses, and a spot below it reaches out of the sheet as far.
FINGER_RADIUS_M, SPOT_RADIUS_M, SPOT_GAP_M = 0.008, 0.004, 0.0001
# one standard deviation of `DomainRandomization.observation_noise = 1`
NOISE_JOINT_RAD, NOISE_VELOCITY_RAD_S, NOISE_TIP_M, NOISE_SHEET_M, NOISE_YAW_RAD = 0.003, 0.05, 0.001, 0.002, 0.01


# ---------------------------------------------------------------------------------------------------------------------
# settings


class BasePolicyError(SO101Error):
    """A base policy that cannot act, or acts in a way that no arm can follow. It ends the run."""


def check_ranges(settings: Any, ranges: Mapping[str, tuple[float, float]], name: Callable[[str], str] = str) -> None:
    """Raise SO101Error for the first field of a dataclass that is not finite, or outside its closed range.

    Args:
        settings: the dataclass instance; fields that are None pass.
        ranges: (lowest, highest) by field.
        name: how the message calls a field; scripts name its flag.
    """
    for field in dataclasses.fields(settings):
        value, (low, high) = getattr(settings, field.name), ranges.get(field.name, (-np.inf, np.inf))
        if isinstance(value, (int, float)) and not (low <= value <= high and np.isfinite(value)):
            bounds = f"in [{low}, {high}]" if np.isfinite([low, high]).all() else "a finite number"
            raise SO101Error(f"{name(field.name)} must be {bounds}, got {value}")


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything about the task that can be set: the environment's arguments, and flags of the scripts."""

    alpha: float = 0.7
    """share of act_scale that the residual commands, in [0, 1]"""
    act_scale: float = 0.02
    """joint delta in rad per control step of a full residual at alpha 1"""
    residual_penalty: float = 0.001
    """reward lost per squared norm of the residual"""
    tape_margin: float = TAPE_MARGIN_M
    """m between sheet and tape on every side: 0.04 standard, 0.02 precise"""
    randomize: bool = True
    """domain randomisation: friction of table and fingertips; without it only the sheet's start pose is drawn"""
    full_randomization: bool = False
    """also randomise sheet mass, servo gain and damping, latency, joint offsets, backlash and observation noise; and
    the sheet is limp: it is pressed to the table below the finger, instead of at its four corners"""
    visual_randomization: bool = False
    """randomise what cameras see: light, shadows, colours, the table's texture, where the cameras stand, image noise"""
    firmware_p: int = FIRMWARE_P
    """P coefficient of the servos, to which their gain is proportional; LeRobot's driver sets 16"""
    arrival_yaw_weight: float = 0.0
    """m per rad, in the shaping, of the yaw that a straight drag from here would end with, which the networks then see,
    too; 0: the present yaw counts 0.05"""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "alpha": (0.0, 1.0), "act_scale": (1e-6, 1.0), "residual_penalty": (0.0, 1e3), "tape_margin": (1e-3, 0.1),
        "arrival_yaw_weight": (0.0, 1e3), "firmware_p": (4, 64),
    }  # fmt: skip

    def randomization(self) -> DomainRandomization:
        """The ranges that randomize and full_randomization stand for."""
        if not self.randomize:
            return DomainRandomization.nominal()
        return DomainRandomization.full() if self.full_randomization else DomainRandomization()


@dataclasses.dataclass(frozen=True)
class DomainRandomization:
    """What is resampled every episode. A fraction f means uniform in nominal x [1 - f, 1 + f]."""

    sheet_distance_m: tuple[float, float] = (0.04, 0.12)
    """initial distance of the sheet's centre from the tape's, in a uniform direction"""
    sheet_yaw_rad: float = 0.3
    """initial yaw, uniform in +- this"""
    sheet_friction: float = 0.20
    """fraction, friction between sheet and table"""
    finger_friction: float = 0.15
    """fraction, friction between fingertips and sheet"""
    sheet_mass: float = 0.0
    """fraction, mass and inertia of the sheet"""
    servo_gain: float = 0.0
    """fraction, proportional gain, each joint its own"""
    servo_damping: float = 0.0
    """fraction, joint damping, each joint its own"""
    latency_steps: int = 0
    """a command takes effect 0 to this many control steps late (integer, fixed within an episode)"""
    joint_offset_rad: float = 0.0
    """calibration error of the joint encoders, each joint its own, uniform in +- this"""
    backlash_rad: tuple[float, float] = (0.0, 0.0)
    """how far a joint moves before its servo minds, each joint its own, uniform between these"""
    observation_noise: float = 0.0
    """Gaussian noise on the observation, in units of the NOISE_* constants"""
    limp_sheet: bool = False
    """the table carries a press below the fingertip, as under paper, instead of at the sheet's four corners; and
    fingertips resist twisting"""

    @classmethod
    def nominal(cls) -> DomainRandomization:
        """Nominal physics; only the sheet's start pose is drawn, since that is the task itself."""
        return cls(sheet_friction=0.0, finger_friction=0.0)

    @classmethod
    def full(cls) -> DomainRandomization:
        """Everything on: also mass, servos, latency, offsets, backlash, observation noise, and a sheet that is limp."""
        return cls(
            sheet_mass=0.10,
            servo_gain=0.15,
            servo_damping=0.15,
            latency_steps=2,
            joint_offset_rad=float(np.deg2rad(1.0)),
            backlash_rad=(0.0, BACKLASH_RAD),
            observation_noise=1.0,
            limp_sheet=True,
        )


# ---------------------------------------------------------------------------------------------------------------------
# the observation: its parts, and how a network should see each


class Part(NamedTuple):
    """A named part of the observation."""

    names: tuple[str, ...]  # of its components
    mean: Any  # a network sees (x - mean) / scale
    scale: Any
    mirror: Any  # sign of each component in the left-right mirror image of the scene


def _xyz(name: str, axes: tuple[str, ...] = ("x", "y", "z")) -> tuple[str, ...]:
    return tuple(f"{name}.{axis}" for axis in axes)


# mirrored, pan and roll turn the other way; of a rotation, the parts about x and z
JOINT_MIRROR = (-1, 1, 1, 1, -1, 1)
OBSERVATION = {
    "joint_pos": Part(tuple(f"{joint}.pos" for joint in JOINTS), HOME_RAD, 0.3, JOINT_MIRROR),  # rad
    "joint_vel": Part(tuple(f"{joint}.vel" for joint in JOINTS), 0.0, 0.5, JOINT_MIRROR),  # rad/s
    "sheet_pos": Part(_xyz("sheet"), (*TAPE_CENTER_M, 0.0), 0.1, (1, -1, 1)),  # m
    "sheet_quat": Part(_xyz("sheet", ("qw", "qx", "qy", "qz")), (1.0, 0.0, 0.0, 0.0), 0.1, (1, -1, 1, -1)),
    "tape_minus_sheet": Part(_xyz("tape_minus_sheet"), 0.0, 0.1, (1, -1, 1)),  # m
    # millimetres of tip height decide about contact
    "tip_pos": Part(_xyz("tip"), (*TAPE_CENTER_M, 0.015), (0.1, 0.1, 0.02), (1, -1, 1)),  # m
}
# appended with observe_base: the base policy's joint deltas, rad
BASE_DELTA = Part(tuple(f"{joint}.base_delta" for joint in JOINTS), 0.0, 0.02, JOINT_MIRROR)


def slices(parts: Mapping[str, Part]) -> dict[str, slice]:
    """Where each part lies in an observation."""
    ends = np.cumsum([len(part.names) for part in parts.values()]).tolist()
    return {name: slice(end - len(part.names), end) for (name, part), end in zip(parts.items(), ends)}


OBS = slices(OBSERVATION)
MEASURED = ("joint_pos", "joint_vel", "tip_pos")  # what a real arm knows of itself
OBS_DIM = sum(len(part.names) for part in OBSERVATION.values())
# the same numbers by LeRobot's names, as datasets, base policies and policy servers have them
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
COMMAND, RESIDUAL, IMAGES = "command", "residual", "observation.images."
STATE_NAMES = list(OBSERVATION["joint_pos"].names)
ENVIRONMENT_NAMES = [name for part in list(OBSERVATION.values())[1:] for name in part.names]


def sheet_pose(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (N, 2), m, and yaw (N,), rad, of the sheet in observations (N, 25)."""
    quat = obs[:, OBS["sheet_quat"]]
    return obs[:, OBS["sheet_pos"]][:, :2], 2.0 * np.arctan2(quat[:, 3], quat[:, 0])


# features can be exported only if their constants are plain numbers, see so101_onnx.py
_INNER_HALF_M, _TAPE_CENTER_M = tuple((SHEET_HALF_M - SHAPING_INSET_M).tolist()), tuple(TAPE_CENTER_M.tolist())


def _to_inner(point: np.ndarray) -> np.ndarray:
    """From points (N, 2) in the sheets' axes to the nearest points well inside the sheets, (N, 2)."""
    half = np.array(_INNER_HALF_M, np.float32)
    return clamp(point, -half, half) - point


def sheet_to_tip_feature(obs: np.ndarray) -> np.ndarray:
    """Vector (N, 2) from the sheet's nearest point to the tip, in the sheet's axes, per 30 mm; zero over the sheet.

    It tells whether to press or to go to the sheet first. From a yaw and two positions the networks hardly learn it in
    so few steps.
    """
    tip = in_sheet_axes(obs[:, OBS["tip_pos"]][:, :2], *sheet_pose(obs))
    return _to_inner(tip) / np.float32(-0.03)


def contact_feature(obs: np.ndarray) -> np.ndarray:
    """What decides between pressing, lifting and dragging: 8 numbers (N, 8).

    Whether the tip is beside the sheet, in [0, 1]; its height above that of pressed fingertips, per 5 mm; whether it
    presses beside the sheet, and on it; if beside, the direction (2) to the sheet; if pressed on it, the direction (2)
    in which to drag it to the tape. Directions are unit vectors in the world frame.
    """
    tip, (sheet_xy, yaw) = obs[:, OBS["tip_pos"]], sheet_pose(obs)
    inside = in_sheet_axes(tip[:, :2], sheet_xy, yaw)
    away = _to_inner(inside)
    distance = np.hypot(away[:, 0], away[:, 1])
    beside = np.minimum(distance / np.float32(SHAPING_INSET_M), 1)
    height = (tip[:, 2] - np.float32(TIP_PRESSED_M)) / np.float32(0.005)
    pressed = clamp(1 - height, 0, 1)
    to_sheet = rotate(away / np.maximum(distance, 1e-6)[:, None], yaw)
    to_tape = obs[:, OBS["tape_minus_sheet"]][:, :2]
    to_tape = to_tape / np.maximum(np.hypot(to_tape[:, 0], to_tape[:, 1]), 1e-6)[:, None]
    on = (1 - beside) * pressed
    return np.column_stack([
        beside, clamp(height, -1, 3), beside * pressed, on, beside[:, None] * to_sheet, on[:, None] * to_tape
    ])  # fmt: skip


def arrival_yaw_feature(obs: np.ndarray) -> np.ndarray:
    """The yaw (N, 1) to expect on arrival, per 0.1 rad, and its product (N, 2) with the displacement to the tape.

    Across that displacement, the product points to where the tip should press.
    """
    end = arrival_yaw(obs[:, OBS["tip_pos"]][:, :2], *sheet_pose(obs))[:, None]
    return np.concatenate([end / 0.1, end * obs[:, OBS["tape_minus_sheet"]][:, :2] / 0.01], axis=1)


# what a network may see beside the observation: function of observations (N, 25), and mirror signs of its result
DERIVED = {
    "sheet_to_tip": (sheet_to_tip_feature, (1, -1)),
    "contact": (contact_feature, (1, 1, 1, 1, 1, -1, 1, -1)),
    "arrival_yaw": (arrival_yaw_feature, (-1, -1, 1)),
}


class BaseObservation(Mapping):
    """What a base policy sees, by LeRobot's names, a row per environment.

    observation.state (n, 6), joint positions, rad; observation.environment_state (n, 19), the rest of the observation;
    command (n, 6), last commanded joint targets, rad; residual (n, 6), by how much the residual moved them in the last
    step, rad; and observation.images.CAMERA (n, H, W, 3) uint8 for the cameras of the policy, rendered at the moment
    they are read: `obs.rows(mask)` first, and only those rows are rendered.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        cameras: tuple[str, ...] = (),
        render: Callable[[str, np.ndarray], np.ndarray] | None = None,
        ids: np.ndarray | None = None,
    ):
        self._arrays, self._cameras, self._render = dict(arrays), cameras, render
        self._ids = np.arange(len(self._arrays[STATE])) if ids is None else ids

    def __getitem__(self, key: str) -> np.ndarray:
        if key not in self._arrays and key.removeprefix(IMAGES) in self._cameras and key.startswith(IMAGES):
            self._arrays[key] = self._render(key.removeprefix(IMAGES), self._ids)
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        yield from (STATE, ENVIRONMENT, COMMAND, RESIDUAL, *(IMAGES + camera for camera in self._cameras))

    def __len__(self) -> int:
        return 4 + len(self._cameras)

    def rows(self, mask: np.ndarray) -> BaseObservation:
        """The same of the environments in mask only, (N,) bool."""
        arrays = {key: array[mask] for key, array in self._arrays.items()}
        return BaseObservation(arrays, self._cameras, self._render, self._ids[mask])

    def with_flat(self, flat: np.ndarray) -> BaseObservation:
        """The same with another observation (n, 25)."""
        arrays = {**self._arrays, STATE: flat[:, :ACT_DIM], ENVIRONMENT: flat[:, ACT_DIM:]}
        return BaseObservation(arrays, self._cameras, self._render, self._ids)

    def with_sheet(self, pose: np.ndarray) -> BaseObservation:
        """The same with the sheet where pose (n, 3), x and y (m), yaw (rad), says: nothing of the true one is left."""
        known = flat_observation(self)
        return self.with_flat(make_observation(*(known[:, OBS[name]] for name in MEASURED), pose))

    def with_residual(self, residual: np.ndarray) -> BaseObservation:
        """The same with another residual (n, 6), rad."""
        return BaseObservation({**self._arrays, RESIDUAL: residual}, self._cameras, self._render, self._ids)


def base_observation(
    obs: np.ndarray, command: np.ndarray, residual: np.ndarray | None = None, **cameras: Any
) -> BaseObservation:
    """Observations (N, 25 or more), last commanded targets and residuals (N, 6), rad, as base policies get them."""
    arrays = {STATE: obs[:, :ACT_DIM].copy(), ENVIRONMENT: obs[:, ACT_DIM:].copy(), COMMAND: command.copy()}
    arrays[RESIDUAL] = np.zeros(command.shape) if residual is None else residual.copy()
    return BaseObservation(arrays, **cameras)


def flat_observation(obs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Inverse of base_observation: observations (N, 25)."""
    return np.concatenate([obs[STATE], obs[ENVIRONMENT]], axis=1)


def make_observation(
    joints_rad: np.ndarray, velocities_rad_s: np.ndarray, tip_m: np.ndarray, sheet_pose: np.ndarray
) -> np.ndarray:
    """Observations (N, 25) float32 of what an arm measures, (N, 6), (N, 6), (N, 3), and of poses (N, 3) of sheets.

    A pose is x and y, m, and yaw, rad.
    """
    obs, yaw = np.zeros((len(joints_rad), OBS_DIM), np.float32), sheet_pose[:, 2]
    for name, measured in zip(MEASURED, (joints_rad, velocities_rad_s, tip_m)):
        obs[:, OBS[name]] = measured
    obs[:, OBS["sheet_pos"]] = np.column_stack([sheet_pose[:, :2], np.full(len(obs), SHEET_HALF_THICKNESS_M)])
    _complete(obs, yaw)
    return obs


def _complete(obs: np.ndarray, yaw_rad: np.ndarray) -> None:
    """Write what follows from the sheets' positions in observations (N, 25) and from their yaws (N,)."""
    quat = obs[:, OBS["sheet_quat"]]
    quat[:, 0], quat[:, 3] = np.cos(yaw_rad / 2), np.sin(yaw_rad / 2)
    obs[:, OBS["tape_minus_sheet"]][:, :2] = TAPE_CENTER_M - obs[:, OBS["sheet_pos"]][:, :2]


# ---------------------------------------------------------------------------------------------------------------------
# the task as pure functions on arrays


def wrap_angle(angle_rad: np.ndarray) -> np.ndarray:
    """Angle in [-pi, pi)."""
    return (angle_rad + np.pi) % (2 * np.pi) - np.pi


def in_sheet_axes(point_xy_m: np.ndarray, sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray) -> np.ndarray:
    """Points (N, 2) relative to the sheets' centres, in the sheets' axes, (N, 2)."""
    return rotate(point_xy_m - sheet_xy_m, -sheet_yaw_rad)


def rotate(vector: np.ndarray, angle_rad: np.ndarray) -> np.ndarray:
    """Vectors (N, 2) turned by angles (N,)."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    x, y = vector[:, 0], vector[:, 1]
    return np.column_stack([c * x - s * y, s * x + c * y])


def sheet_inside(sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray, tape_margin_m: float) -> np.ndarray:
    """Whether all four corners lie inside the tape's opening, (N,) bool, for centres (N, 2) and yaws (N,)."""
    c, s = np.abs(np.cos(sheet_yaw_rad)), np.abs(np.sin(sheet_yaw_rad))
    # half sides of the sheet's axis-aligned bounding box: its corners touch that box on all four sides
    (half_x, half_y), (center_x, center_y) = SHEET_HALF_M.tolist(), TAPE_CENTER_M.tolist()
    fits_x = np.abs(sheet_xy_m[:, 0] - center_x) + (c * half_x + s * half_y) <= half_x + tape_margin_m
    fits_y = np.abs(sheet_xy_m[:, 1] - center_y) + (c * half_y + s * half_x) <= half_y + tape_margin_m
    return fits_x & fits_y


def distance_to_sheet(
    point_xy_m: np.ndarray, sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray, inset_m: float = 0.0
) -> np.ndarray:
    """Horizontal distance of points (N, 2) to the nearest point at least inset_m inside the sheets' edges, (N,)."""
    point = np.abs(in_sheet_axes(point_xy_m, sheet_xy_m, sheet_yaw_rad))
    outside = np.maximum(point - SHEET_HALF_M + inset_m, 0.0)
    return np.hypot(outside[:, 0], outside[:, 1])


def sheet_distance(sheet_xy_m: np.ndarray) -> np.ndarray:
    """Distance of sheet centres (N, 2) from the tape's centre, (N,)."""
    return np.hypot(sheet_xy_m[:, 0] - TAPE_CENTER_M[0], sheet_xy_m[:, 1] - TAPE_CENTER_M[1])


def arrival_yaw(tip_xy_m: np.ndarray, sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray) -> np.ndarray:
    """Yaw (N,) that sheets would about have, were they pressed at the tips (N, 2) and dragged straight to the tape."""
    lever, drag = tip_xy_m - sheet_xy_m, np.array(_TAPE_CENTER_M) - sheet_xy_m
    return sheet_yaw_rad + TURN_RAD_PER_M2 * (lever[:, 0] * drag[:, 1] - lever[:, 1] * drag[:, 0])


@dataclasses.dataclass
class Scene:
    """The true state at the end of a control step, a row per environment."""

    tip_m: np.ndarray  # (N, 3)
    sheet_xy_m: np.ndarray  # (N, 2)
    sheet_yaw_rad: np.ndarray  # (N,), in [-pi, pi)
    sheet_distance_m: np.ndarray  # (N,), of the sheet's centre from the tape's


# ---------------------------------------------------------------------------------------------------------------------
# the batched simulation


class SO101ResidualVectorEnv(gym.vector.VectorEnv):
    """N arms at the same task, stepped together.

    Observation (N, 25) float32, the parts of OBSERVATION: joint positions (6, rad), joint velocities (6, rad/s), sheet
    position (3, m), sheet quaternion (4, wxyz), tape centre - sheet centre (3, m), gripper tip position (3, m).
    Action (N, 6) float32 in [-1, 1], the residual: `delta = base + alpha * act_scale * clip(action, -1, 1)` rad is
    added to the last commanded joint targets (JOINTS order).
    Reward: the task's, see `info["reward_terms"]`, a dict of (N,) arrays that add up to it. With shaping_gamma, without
    which PPO takes far longer to learn, they have "shaping", too, which no return in `info["episode_summary"]` counts.

    Args:
        num_envs: number of environments N.
        base_policy: the policy to correct: an instance of so101_policies.BasePolicy, or its spec string, as "jacobian";
            None is zero. It is closed with the environment.
        task: settings of the task; any of Task's fields can also be given by name, which wins: `tape_margin=0.02`.
        randomization: ranges to use instead of those that the task's flags stand for.
        max_episode_steps: control steps until truncation.
        shaping_gamma: discount of the potential-based shaping: the learner's own; None: no shaping.
        observe: "state"; or "pixels": the observation is then a dict of what a real arm has: pixels_CAMERA (N, H, W, 3)
            uint8 for each camera, and state (N, 15) float32, the parts of MEASURED: joint positions, joint velocities,
            gripper tip. What it leaves out is in info["full_observation"] (N, 25), for critics and teachers.
        observe_base: append the base policy's joint deltas (6, rad) to the observation, which then has 31 numbers; with
            "pixels", to state.
        cameras, image_size: with "pixels", which cameras are seen, and height and width of their pictures.
        visuals: what visual randomisation resamples; None: VisualRandomization() if the task asks for it, else nothing.
        render_mode: None or "rgb_array".
        width, height: of rendered frames, pixels.
        camera_name: "top" or "wrist" to render what that camera sees; None looks from the side.
        num_threads: physics threads; None uses every core, at most one per environment. No result depends on it.
        autoreset_mode: SAME_STEP, NEXT_STEP, or DISABLED: then a finished environment rests, unsimulated, until it is
            reset.

    Raises:
        ValueError: an argument outside its range; TypeError: one of an unknown name.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}
    parts: Mapping[str, Part] = OBSERVATION  # of the observation; a subclass that observes more adds to them

    def __init__(
        self,
        num_envs: int = 8,
        base_policy: Any = None,
        task: Task | None = None,
        randomization: DomainRandomization | None = None,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        shaping_gamma: float | None = None,
        observe: str = "state",
        observe_base: bool = False,
        cameras: tuple[str, ...] = ("top",),
        image_size: tuple[int, int] = (96, 96),
        visuals: VisualRandomization | None = None,
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
        camera_name: str | None = None,
        num_threads: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        **settings: Any,
    ):
        self.task = dataclasses.replace(task or Task(), **settings)
        check_ranges(self.task, self.task.RANGES)
        _check(num_envs >= 1, "num_envs", num_envs, "at least 1")
        _check(max_episode_steps >= 1, "max_episode_steps", max_episode_steps, "at least 1")
        _check(num_threads is None or num_threads >= 1, "num_threads", num_threads, "at least 1")
        _check(render_mode in (None, "rgb_array"), "render_mode", render_mode, "None or 'rgb_array'")
        _check(shaping_gamma is None or 0 <= shaping_gamma <= 1, "shaping_gamma", shaping_gamma, "in [0, 1], or None")
        _check(all(8 <= side <= 4096 for side in (width, height)), "width, height", (width, height), "in [8, 4096]")
        _check(camera_name in (None, *camera_names()), "camera_name", camera_name, " or ".join(camera_names()))
        _check(observe in ("state", "pixels"), "observe", observe, "'state' or 'pixels'")
        known = bool(cameras) and len({*cameras}) == len(cameras) and {*cameras} <= {*camera_names()}
        _check(known, "cameras", cameras, f"of {camera_names()}, each once")
        _check(all(8 <= side <= 1024 for side in image_size), "image_size", image_size, "in [8, 1024]")
        if isinstance(base_policy, str):
            base_policy = load_env_creator(POLICY_LOADER)(base_policy)
        _check(base_policy is not None or not observe_base, "observe_base", observe_base, "False without a base policy")
        missing = [name for name in BASE_POLICY_NAMES if base_policy is not None and not hasattr(base_policy, name)]
        if missing:
            name = type(base_policy).__name__
            raise BasePolicyError(f"base policy {name} has no {missing[0]}: derive it from so101_policies.BasePolicy")
        if base_policy is not None and num_envs > (base_policy.max_envs or num_envs):
            name = type(base_policy).__name__
            raise BasePolicyError(
                f"base policy {name} acts in {base_policy.max_envs} environment at a time, not in {num_envs}; to train "
                "on it, record it and clone what it did"
            )
        if base_policy is not None:
            base_policy.firmware_p = self.task.firmware_p
        self.num_envs, self.render_mode = num_envs, render_mode
        self.width, self.height, self.camera_name = width, height, camera_name
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode(autoreset_mode)}
        self.max_episode_steps, self.shaping_gamma = max_episode_steps, shaping_gamma
        self.base_policy, self.observe_base = base_policy, observe_base
        self.randomization = randomization or self.task.randomization()
        if observe_base:
            self.parts = {**self.parts, "base_delta": BASE_DELTA}
        obs_dim = sum(len(part.names) for part in self.parts.values())
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.observe_pixels, self.image_size = observe == "pixels", tuple(image_size)
        self.cameras = tuple(cameras) if self.observe_pixels else ()
        if self.observe_pixels:
            where = slices(self.parts)
            measured = [where[name] for name in (*MEASURED, "base_delta") if name in where]
            self._measured = np.concatenate([np.arange(obs_dim)[each] for each in measured])
            picture = gym.spaces.Box(0, 255, (*self.image_size, 3), np.uint8)
            state = gym.spaces.Box(-np.inf, np.inf, (len(self._measured),), np.float32)
            spaces = {f"pixels_{camera}": picture for camera in self.cameras} | {"state": state}
            self.single_observation_space = gym.spaces.Dict(spaces)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (ACT_DIM,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        ranges = self.randomization
        self.model = load_model(self.task.tape_margin, ranges.limp_sheet)
        # it knows what is known of a real arm: how bad backlash and latency may be, not what is drawn for an episode
        latency_s = ranges.latency_steps / CONTROL_HZ
        self._controller = Controller(self.model, self.task.firmware_p, ranges.backlash_rad[1], latency_s)
        for parameter in (self.model.actuator_gainprm[:, 0], self.model.actuator_biasprm[:, 1]):
            parameter *= self.task.firmware_p / FIRMWARE_P
        threads = min(num_threads or os.cpu_count() or 1, num_envs)
        self.visuals = visuals or (VisualRandomization() if self.task.visual_randomization else None)
        # one state row per environment (warm start included), per-environment copies of the fields resampled below;
        # persistent: a step goes on from the quantities that were made current after the last one
        self.batch = mujoco.batch.Batch(self.model, nsim=num_envs, nthread=threads, persistent=True)
        self.substeps = round(1 / CONTROL_HZ / self.model.opt.timestep)
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._geom_xpos = self.batch.bind("geom_xpos")
        self._tip = self.batch.bind("site_xpos")[:, self.model.site("gripperframe").id]
        self._gravity = self.batch.bind("qfrc_bias")[:, :ACT_DIM]  # torque that holds the joints at rest, N m
        self._joint_pos, self._joint_vel = self._qpos[:, :ACT_DIM], self._qvel[:, :ACT_DIM]
        self._stage = mujoco.mjtStage.mjSTAGE_VEL.value  # makes positions and gravity torques current after a step
        self._home = self._home_state()
        fields = ["pair_friction"] if ranges.sheet_friction or ranges.finger_friction else []
        fields += ["body_mass", "body_inertia"] if ranges.sheet_mass else []
        fields += ["actuator_gainprm", "actuator_biasprm"] if ranges.servo_gain else []
        fields += ["dof_damping"] if ranges.servo_damping else []
        fields += ["geom_pos", "dof_frictionloss"] if ranges.limp_sheet else []
        self._fields = {name: self.batch.expand(name) for name in fields}
        # of every joint, (N, 6), N m/rad: where it is resampled a view, which follows
        nominal = np.broadcast_to(self.model.actuator_gainprm[:, 0], (num_envs, ACT_DIM))
        self._gain = self._fields["actuator_gainprm"][:, :, 0] if ranges.servo_gain else nominal
        # of fingertips, and the contact spots below them: ids of their geoms
        self._fingers = [
            tuple(self.model.geom(f"{finger}_{part}_col").id for part in ("finger", "spot"))
            for finger in ("fixed", "moving") * ranges.limp_sheet
        ]

        n = num_envs
        self._rngs: list[np.random.Generator] = [None] * n
        # all below, the random generators, the state rows and the resampled fields are the whole state: see get_state
        self._command = np.zeros((n, ACT_DIM))  # last commanded joint targets, rad, in encoder coordinates
        self._delayed = np.zeros((n, ranges.latency_steps + 1, ACT_DIM))  # last commands, newest first
        self._latency = np.zeros(n, np.int64)
        self._joint_offset = np.zeros((n, ACT_DIM))  # encoder minus truth, rad
        self._backlash = np.zeros((n, ACT_DIM))  # rad
        self._phi = np.zeros(n)
        self._steps = np.zeros(n, np.int64)
        self._streak = np.zeros(n, np.int64)
        self._return = np.zeros(n)
        self._residual_sum = np.zeros(n)
        self._done = np.ones(n, bool)
        self._obs = np.zeros((n, obs_dim), np.float32)
        self._look_seed = np.zeros(n, np.int64)  # of visual randomisation
        self._residual = np.zeros((n, ACT_DIM))  # of the last step, rad
        self.base_time_s = 0.0  # wall time that the base policy has taken, its pictures included
        self._base = np.zeros((n, ACT_DIM))  # with observe_base: the base policy's deltas for self._obs, rad
        self._pixels = {camera: np.zeros((n, *self.image_size, 3), np.uint8) for camera in self.cameras}
        self._looks_by_seed: dict[int, Look] = {}
        # made when first used, freed by close; by the picture's size, and whether it is for policies
        self._painters: dict[tuple[tuple[int, int], bool], Painter] = {}

    # -- the task: what a subclass overrides

    def draw_start(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Start pose x, y (m), yaw (rad) of a sheet that is not already inside the tape."""
        ranges = self.randomization
        for _ in range(10_000):
            radius, direction = rng.uniform(*ranges.sheet_distance_m), rng.uniform(-np.pi, np.pi)
            yaw = rng.uniform(-ranges.sheet_yaw_rad, ranges.sheet_yaw_rad)
            xy = TAPE_CENTER_M + radius * np.array([np.cos(direction), np.sin(direction)])
            if not sheet_inside(xy[None], np.array([yaw]), self.task.tape_margin)[0]:
                return xy[0], xy[1], yaw
        raise SO101Error(
            f"sheet_distance_m {ranges.sheet_distance_m}: a sheet that starts so near lies inside the tape already; "
            f"start farther out, or lower tape_margin {self.task.tape_margin}"
        )

    def observe(self, mask: np.ndarray, scene: Scene) -> np.ndarray:
        """Observations (N, 25), as the sensors see the scene; rows that are not in mask, (N,) bool, may hold anything.

        A subclass that observes more appends its columns, and their Part to `parts`.
        """
        obs, yaw = np.zeros((self.num_envs, OBS_DIM), np.float32), scene.sheet_yaw_rad
        joints, velocities, sheet, tip = (obs[:, OBS[k]] for k in ("joint_pos", "joint_vel", "sheet_pos", "tip_pos"))
        joints[:] = self._joint_pos + self._joint_offset
        velocities[:] = self._joint_vel
        sheet[:] = self._qpos[:, 6:9]
        tip[:] = scene.tip_m
        if self.randomization.joint_offset_rad:
            # a real arm computes its tip from the encoders: to first order, the Jacobian carries their error over
            site = self.model.site("gripperframe")
            jacobian, _ = self.batch.jac(int(site.bodyid[0]), self._tip)
            tip += np.einsum("nij,nj->ni", jacobian[:, :, :ACT_DIM], self._joint_offset)
        if self.randomization.observation_noise:
            yaw = yaw.copy()
            for i in np.flatnonzero(mask):
                noise = self.randomization.observation_noise * self._rngs[i].standard_normal(19)
                joints[i] += NOISE_JOINT_RAD * noise[0:6]
                velocities[i] += NOISE_VELOCITY_RAD_S * noise[6:12]
                sheet[i] += NOISE_SHEET_M * noise[12:15]
                tip[i] += NOISE_TIP_M * noise[15:18]
                yaw[i] += NOISE_YAW_RAD * noise[18]
        _complete(obs, yaw)
        return obs

    def command_targets(self, delta_rad: np.ndarray) -> np.ndarray:
        """Joint targets (N, 6), rad, as the encoders count: the last ones plus delta, (N, 6), within the window."""
        joints = self._joint_pos + self._joint_offset
        return self._controller.limit(self._command + delta_rad, joints, self._joint_vel, self._gravity)

    def success(self, scene: Scene) -> np.ndarray:
        """Whether the goal is reached in this step, (N,) bool; SUCCESS_STEPS of these in a row end the episode."""
        return sheet_inside(scene.sheet_xy_m, scene.sheet_yaw_rad, self.task.tape_margin)

    def failure(self, scene: Scene) -> np.ndarray:
        """Whether the episode cannot succeed any more, (N,) bool: the sheet is out of the arm's reach for good."""
        sheet = scene.sheet_xy_m
        far = np.hypot(sheet[:, 0] - PAN_AXIS_M[0], sheet[:, 1] - PAN_AXIS_M[1]) > SHEET_REACH_M
        if far.any():  # the centre is; is all of the sheet?
            axis = np.broadcast_to(PAN_AXIS_M, sheet.shape)
            far = distance_to_sheet(axis, sheet, scene.sheet_yaw_rad) > SHEET_REACH_M
        return far

    def reward_terms(
        self, scene: Scene, residual: np.ndarray, success: np.ndarray, failure: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The reward's terms by name, (N,) each, but for the shaping: together they make up the return.

        Args:
            scene: at the end of the step.
            residual: the clipped action (N, 6).
            success, failure: whether the episode ends so in this step, (N,) bool.
        """
        terms = {
            "distance": -2.0 * scene.sheet_distance_m,
            "yaw": -0.1 * np.abs(scene.sheet_yaw_rad),
            "time": np.full(self.num_envs, -0.01),
            "residual": -self.task.residual_penalty * np.square(residual).sum(1),
            "success": 10.0 * success,
            "failure": np.zeros(self.num_envs),
        }
        if failure.any():  # costs what waiting for the time-out in that state would: pushing the sheet away never pays
            waiting = terms["distance"] + terms["yaw"] + terms["time"]
            terms["failure"] = failure * (self.max_episode_steps - self._steps) * waiting
        return terms

    def potential(self, scene: Scene) -> np.ndarray:
        """Shaping potential (N,), 0 at best: tip on the sheet, sheet at the tape's centre, without yaw.

        Any point of the sheet is as good as any other: pulling the tip to the sheet's centre drowned the signal of the
        drag in that of the tip's own motion and learned more slowly.
        """
        tip, sheet, yaw = scene.tip_m, scene.sheet_xy_m, scene.sheet_yaw_rad
        aside = distance_to_sheet(tip[:, :2], sheet, yaw, SHAPING_INSET_M)
        reach = np.hypot(aside, np.maximum(tip[:, 2] - TIP_PRESSED_M, 0.0))
        if self.task.arrival_yaw_weight == 0.0:
            turned = SHAPING_YAW_M_PER_RAD * np.abs(yaw)
        else:
            turned = self.task.arrival_yaw_weight * np.abs(arrival_yaw(tip[:, :2], sheet, yaw))
        return -SHAPING_PER_M * (reach + scene.sheet_distance_m + turned)

    # -- Gymnasium API

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: environment i gets seed + i, or seed[i] of a list; None goes on with the generators as they are.
            options: {"reset_mask": (N,) bool} resets only those environments; {"qpos": (N, 10)} starts them at rest at
                these positions instead of drawing the sheet's pose.

        Returns:
            Observations and info as from step, of episodes that have no steps yet.
        """
        mask = np.ones(self.num_envs, bool)
        if options and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
                raise ValueError("options['reset_mask'] must be bool of shape (num_envs,) with at least one True")
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        elif len(seed) == self.num_envs:
            seeds = list(seed)
        else:
            raise ValueError(f"reset got {len(seed)} seeds for {self.num_envs} environments")
        for i in np.flatnonzero(mask):
            if seeds[i] is not None or self._rngs[i] is None:
                self._rngs[i] = seeding.np_random(seeds[i])[0]
        self._start_episodes(np.flatnonzero(mask), options.get("qpos") if options else None)
        return self.observation, self._info(self._scene())

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step, 1/30 s.

        Args:
            actions: residuals (N, 6), clipped to [-1, 1].

        Returns:
            obs, reward (N,), terminated (N,), truncated (N,) and info: is_success, distance_m, yaw_error_rad,
            non_finite, out_of_reach, residual_magnitude (N,) each, reward_terms, episode_summary of the episode so far:
            return (unshaped), length, residual_magnitude (the mean), (N,) each; with a base policy base_delta_rad
            (N, 6); with pixels full_observation (N, 25). With SAME_STEP autoreset, obs and info of a finished
            environment are the next episode's first, and info has final_obs and final_info (all of the above), valid
            where _final_obs and _final_info are True. With NEXT_STEP, they are the next episode's in the step after,
            whose action counts for nothing.

        Raises:
            ValueError: actions of another shape, or not finite.
            BasePolicyError: a base policy's joint deltas of another shape, not finite, or beyond every joint's range.
            RuntimeError: DISABLED autoreset and every environment has finished, or step before reset.
        """
        active, restarting = ~self._done, np.zeros(self.num_envs, bool)
        if self.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP and None not in self._rngs:
            restarting = ~active
        elif not active.any():
            raise RuntimeError("step() needs a running episode: call reset() first")
        residual = np.asarray(actions, np.float64)
        if residual.shape != (self.num_envs, ACT_DIM) or not np.isfinite(residual).all():
            raise ValueError(f"actions must be finite, of shape ({self.num_envs}, {ACT_DIM}); got {residual.shape}")
        residual = clamp(residual, -1.0, 1.0)
        delta, base = (self.task.alpha * self.task.act_scale) * residual, None
        if self.base_policy is not None:
            base = self._base.copy() if self.observe_base else self._base_delta(active)
            self._residual[active] = delta[active]
            delta += base  # here the residual corrects the base policy

        broken = self._simulate(self.command_targets(delta), active)
        scene = self._scene()
        self._steps += active
        self._write_observation(active, scene)
        self._streak = (self._streak + active) * (self.success(scene) & ~broken)
        success = active & (self._streak >= SUCCESS_STEPS)
        failure = active & (broken | self.failure(scene))
        terminated = success | failure
        truncated = active & (self._steps >= self.max_episode_steps) & ~terminated

        terms = self.reward_terms(scene, residual, success, failure)
        unshaped, phi = sum(terms.values()), self.potential(scene)
        terms["shaping"] = np.zeros(self.num_envs)
        if self.shaping_gamma is not None:
            # zero at terminal states: only then does shaping leave the best policy as it is (Ng et al. 1999)
            terms["shaping"] = self.shaping_gamma * (phi * ~terminated) - self._phi
        reward, self._phi = (unshaped + terms["shaping"]) * active, phi
        magnitude = np.sqrt(np.square(residual).sum(1))
        self._return += unshaped * active
        self._residual_sum += magnitude * active

        results = {
            "is_success": success,
            "non_finite": broken,
            "out_of_reach": failure & ~broken,
            "residual_magnitude": magnitude,
            "reward_terms": terms,
        }
        if base is not None:
            results["base_delta_rad"] = base
        info = self._info(scene, results)
        self._done |= terminated | truncated
        if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP and (finished := terminated | truncated).any():
            final = {"final_obs": self._final_observation(finished), "final_info": info}
            info = self._restart(finished, info) | final | {f"_{name}": finished for name in final}
        if restarting.any():
            info = self._restart(restarting, info)
        return self.observation, reward, terminated, truncated, info

    @property
    def joint_offset(self) -> np.ndarray:
        """Copy of what the encoders say minus the truth, (N, 6), rad."""
        return self._joint_offset.copy()

    @property
    def command(self) -> np.ndarray:
        """Copy of the last commanded joint targets (N, 6), rad, as the encoders count."""
        return self._command.copy()

    @property
    def full_observation(self) -> np.ndarray:
        """Copy of the observation (N, 25) of "state", whatever is observed."""
        return self._obs[:, :OBS_DIM].copy()

    @property
    def qpos(self) -> np.ndarray:
        """Copy of the generalised positions (N, 10): joints (6, rad), sheet x, y, z (m) and yaw (rad)."""
        return self._qpos.copy()

    @property
    def look_seed(self) -> np.ndarray:
        """Copy of the seeds (N,) of how the episodes look under visual randomisation, see camera_images."""
        return self._look_seed.copy()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """RGB frames (height, width, 3) uint8 of all environments; None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(self.render_state(qpos, None, seed) for qpos, seed in zip(self._qpos, self._look_seed))

    def render_state(
        self, qpos: np.ndarray, size: tuple[int, int] | None = None, look_seed: int | None = None
    ) -> np.ndarray:
        """The RGB frame (H, W, 3) uint8 of positions (10,), for people.

        Args:
            size: height and width, pixels; None: those of the environment.
            look_seed: of the episode, under visual randomisation; None: the nominal look.

        Raises:
            SO101Error: the machine cannot render off screen.
        """
        painter = self._painter(size or (self.height, self.width), fast=False)
        return painter.paint(qpos, self.camera_name, self._draw_look(look_seed))

    def camera_images(
        self,
        qpos: np.ndarray,
        camera: str,
        size: tuple[int, int],
        look_seed: np.ndarray | None = None,
        steps: np.ndarray | None = None,
    ) -> np.ndarray:
        """What a camera of the model, "top" or "wrist", sees of positions (n, 10): (n, H, W, 3) uint8, for policies.

        Recordings, training and evaluation all see through this function, so a policy meets the pictures that it
        learned from: without antialiasing, and without shadows that nobody asked for, at a fortieth of the cost.

        Args:
            size: height and width, pixels.
            look_seed, steps: under visual randomisation, of the episodes, (n,), and how many steps they have had then:
                image noise depends on it. None: the nominal look.

        Raises:
            SO101Error: no such camera, or a machine that cannot render off screen.
        """
        if camera not in camera_names():
            raise SO101Error(f"camera {camera}: the scene has no such camera, it has {' and '.join(camera_names())}")
        pictures, number = np.empty((len(qpos), *size, 3), np.uint8), camera_names().index(camera)
        painter = self._painter(size, fast=True)
        for i, row in enumerate(qpos):
            look = None if look_seed is None else self._draw_look(look_seed[i])
            pictures[i] = painter.paint(row, camera, look)
            if look is not None:
                add_noise(pictures[i], look, 0 if steps is None else int(steps[i]), number)
        return pictures

    def _painter(self, size: tuple[int, int], fast: bool) -> Painter:
        """Draws in this thread: Mesa's software OpenGL crashes, rarely, when two threads draw at once."""
        if (size, fast) not in self._painters:
            self._painters[size, fast] = Painter(self.model, size, fast)
        return self._painters[size, fast]

    def _draw_look(self, seed: int | None) -> Look | None:
        """The look of an episode; None, the nominal one, without visual randomisation."""
        if self.visuals is None or seed is None:
            return None
        if seed not in self._looks_by_seed:
            if len(self._looks_by_seed) > 4 * self.num_envs:
                self._looks_by_seed.clear()
            self._looks_by_seed[seed] = draw_look(self.model, self.visuals, int(seed))
        return self._looks_by_seed[seed]

    def close_extras(self, **kwargs: Any) -> None:
        """Free the renderers and the base policy."""
        for painter in self._painters.values():
            painter.close()
        self._painters = {}
        if self.base_policy is not None:
            self.base_policy.close()

    # -- saving and restoring

    _STATE = ("_command", "_delayed", "_latency", "_joint_offset", "_backlash", "_phi", "_steps", "_streak", "_return",
              "_residual_sum", "_done", "_obs", "_residual", "_base", "_look_seed")  # fmt: skip

    def get_state(self) -> dict[str, Any]:
        """All that the next steps depend on, a base policy's memory included: arrays, and the generators as dicts."""
        memory = {} if self.base_policy is None else self.base_policy.memory
        return {
            "base_memory": {name: array.copy() for name, array in memory.items()},
            "batch": self.batch.state.copy(),
            "fields": {name: array.copy() for name, array in self._fields.items()},
            "rngs": [None if rng is None else rng.bit_generator.state for rng in self._rngs],
            **{name: getattr(self, name).copy() for name in self._STATE},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue, to the bit, where get_state was called.

        Raises SO101Error, and changes nothing, for a state that does not fit this environment.
        """
        own = {"batch": self.batch.state, **{name: getattr(self, name) for name in self._STATE}}
        saved_fields, generators = state.get("fields"), state.get("rngs")
        if not isinstance(saved_fields, Mapping) or not isinstance(state.get("base_memory"), Mapping):
            raise SO101Error("state of the environments: fields or base_memory is missing")
        for name, array in [*own.items(), *self._fields.items()]:
            saved = saved_fields.get(name) if name in self._fields else state.get(name)
            if getattr(saved, "shape", None) != array.shape or saved.dtype != array.dtype:
                raise SO101Error(f"state of the environments: {name} must have shape {array.shape}, {array.dtype}")
        if not isinstance(generators, list) or len(generators) != self.num_envs:
            raise SO101Error(f"state of the environments: rngs must be {self.num_envs} generators")
        rngs = [np.random.Generator(np.random.PCG64()) for _ in generators]
        for rng, rng_state in zip(rngs, generators):
            try:
                rng.bit_generator.state = rng_state
            except (KeyError, TypeError, ValueError) as error:
                raise SO101Error(f"state of the environments: no generator's state ({error})") from error
        for name, array in own.items():
            array[...] = state[name]
        for name, array in self._fields.items():
            array[:] = saved_fields[name]
        if self.randomization.sheet_mass:
            self.batch.set_const()
        self._rngs = rngs
        if self.base_policy is not None:
            self.base_policy.memory = {name: array.copy() for name, array in state["base_memory"].items()}
        self.batch.forward(stage=self._stage)
        for camera, pixels in self._pixels.items():
            pixels[:] = self._camera_images(camera, np.arange(self.num_envs), self.image_size)

    # -- internals

    def _scene(self) -> Scene:
        """The true state now."""
        sheet = self._qpos[:, 6:8]
        return Scene(self._tip, sheet, wrap_angle(self._qpos[:, 9]), sheet_distance(sheet))

    def _simulate(self, command: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Let the servos of the environments in active track command (N, 6); returns which diverged, (N,) bool."""
        rows, ids = _rows_and_ids(active)
        self._command[rows] = command[rows]
        if self.randomization.latency_steps:
            self._delayed[rows] = np.concatenate([command[:, None], self._delayed[:, :-1]], axis=1)[rows]
            command = self._delayed[np.arange(self.num_envs), self._latency]
        self.carry_presses(active)
        if self.randomization.backlash_rad[1]:
            for _ in range(self.substeps):
                self.substep(command, active)
        else:
            self._ctrl[rows] = (command - self._joint_offset)[rows]
            self.batch.step(ids, nstep=self.substeps, stage=self._stage)
        broken = active & ~np.isfinite(self.batch.state).all(1)
        if broken.any():  # such an episode ends here and is named; the numbers it reports are those of a fresh arm
            self._qpos[broken], self._qvel[broken] = self._home["qpos"], 0.0
            self.batch.forward(np.flatnonzero(broken), stage=self._stage)
        return broken

    def substep(self, command_rad: np.ndarray, active: np.ndarray) -> None:
        """A `substeps`th of a control step, servos tracking commands (N, 6), rad, in the environments in active, (N,).

        With backlash: a servo does not feel the first part of its error. Nothing else of a step is done.
        """
        rows, ids = _rows_and_ids(active)
        error = command_rad - self._joint_offset - self._joint_pos
        felt = error - clamp(error, -self._backlash / 2, self._backlash / 2)
        self._ctrl[rows] = (self._joint_pos + felt)[rows]
        self.batch.step(ids, nstep=1, stage=self._stage)

    def carry_presses(self, mask: np.ndarray) -> None:
        """Put a spot below each fingertip that presses on its limp sheet, in the environments in mask, (N,) bool.

        It reaches below the sheet, so that it carries all that the finger presses with, and the corners nothing. A spot
        whose finger does not press is drawn back.
        """
        for finger, below_finger in self._fingers:
            tip = self._geom_xpos[:, finger]
            below = in_sheet_axes(tip[:, :2], self._qpos[:, 6:8], self._qpos[:, 9])
            gap = tip[:, 2] - FINGER_RADIUS_M - self._qpos[:, 8] - SHEET_HALF_THICKNESS_M
            pressing = (np.abs(below) <= SHEET_HALF_M).all(1) & (gap < SPOT_GAP_M)
            spot = self._fields["geom_pos"][:, below_finger]
            spot[mask, :2] = below[mask]
            spot[mask, 2] = SPOT_RADIUS_M - SHEET_HALF_THICKNESS_M + np.where(pressing, -SPOT_GAP_M, 0.01)[mask]

    def _write_observation(self, mask: np.ndarray, scene: Scene) -> None:
        """Bring the observations of the environments in mask up to date, the base policy's action included."""
        obs = self.observe(mask, scene)
        width = self._obs.shape[1] - ACT_DIM * self.observe_base
        if obs.shape != (self.num_envs, width):
            raise ValueError(f"observe() must return {(self.num_envs, width)}, as `parts` says; got {obs.shape}")
        if mask.all():
            self._obs[:, :width] = obs
        else:
            self._obs[mask, :width] = obs[mask]
        if self.observe_base:
            self._base[mask] = self._base_delta(mask)[mask]
            self._obs[mask, width:] = self._base[mask]
        for camera, pixels in self._pixels.items() if mask.any() else ():
            pixels[mask] = self._camera_images(camera, np.flatnonzero(mask), self.image_size)

    @property
    def observation(self) -> Any:
        """Copy of the observation that reset or step returned last."""
        if not self.observe_pixels:
            return self._obs.copy()
        pixels = {f"pixels_{camera}": pixels.copy() for camera, pixels in self._pixels.items()}
        return pixels | {"state": self._obs[:, self._measured]}

    def _final_observation(self, finished: np.ndarray) -> np.ndarray:
        """The same for info["final_obs"], a row per environment: with pixels a dict each, as Gymnasium has it."""
        obs = self.observation
        if not self.observe_pixels:
            return obs
        rows = np.full(self.num_envs, None)
        for i in np.flatnonzero(finished):
            rows[i] = _one_observation(obs, i)
        return rows

    def _base_delta(self, mask: np.ndarray) -> np.ndarray:
        """The base policy's joint deltas (N, 6) in rad for the observations of the environments in mask, checked."""
        policy, name, expected = self.base_policy, type(self.base_policy).__name__, (self.num_envs, ACT_DIM)
        if not mask.any():
            return np.zeros(expected)
        obs = self._obs[:, : self._obs.shape[1] - ACT_DIM * self.observe_base]
        size, start = tuple(policy.image_size), time.perf_counter()
        render = functools.partial(self._camera_images, size=size)
        seen = base_observation(obs, self._command, self._residual, cameras=policy.cameras, render=render)
        base = np.asarray(policy.act(seen, mask), np.float64)
        self.base_time_s += time.perf_counter() - start
        if base.shape != expected or not np.isfinite(base).all():
            raise BasePolicyError(f"base policy {name}: act() must return finite {expected}, got {base.shape}")
        largest = float(np.abs(base[mask]).max())
        if largest > MAX_DELTA_RAD:
            raise BasePolicyError(
                f"base policy {name}: asks for a joint to move by {largest:.1f} rad in one step, at most "
                f"{MAX_DELTA_RAD:.1f} is within reach; are its actions in degrees?"
            )
        return base

    def _camera_images(self, camera: str, ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """What a camera sees now in the environments ids, (n, H, W, 3) uint8."""
        return self.camera_images(self._qpos[ids], camera, size, self._look_seed[ids], self._steps[ids])

    def _home_state(self) -> dict[str, np.ndarray]:
        """Nominal resting state: joints at home, servo targets raised by gravity sag, sheet settled on the table."""
        data = mujoco.MjData(self.model)
        data.qpos[:ACT_DIM] = HOME_RAD
        data.qpos[6:8] = TAPE_CENTER_M
        data.qpos[8] = SHEET_HALF_THICKNESS_M
        mujoco.mj_forward(self.model, data)
        data.ctrl[:] = HOME_RAD + data.qfrc_bias[:ACT_DIM] / self.model.actuator_gainprm[:, 0]
        for _ in range(100):
            mujoco.mj_step(self.model, data)
        data.qpos[:ACT_DIM] = HOME_RAD
        return {"qpos": data.qpos.copy(), "warmstart": data.qacc_warmstart.copy(), "torque": data.qfrc_bias[:6].copy()}

    def _start_episodes(self, ids: np.ndarray, qpos: np.ndarray | None = None) -> None:
        """Start new episodes in the environments ids, each resampled from its own generator; qpos as in reset."""
        for i in ids:
            x, y, yaw = self.draw_start(self._rngs[i])
            self._qpos[i] = self._home["qpos"]
            self._qpos[i, 6:8], self._qpos[i, 9] = (x, y), yaw
            if qpos is not None:
                self._qpos[i] = qpos[i]
            self._resample_physics(i, self._rngs[i])
            if self.visuals is not None:  # drawn from nothing: with it and without, episodes are the same otherwise
                self._look_seed[i] = self._rngs[i].bit_generator.state["state"]["state"] % 2**63
            self._ctrl[i] = HOME_RAD + self._home["torque"] / self._gain[i]
        if "body_mass" in self._fields:
            self.batch.set_const(ids)
        self._qvel[ids] = 0.0
        self.batch.bind("time")[ids] = 0.0
        self.batch.bind("qacc_warmstart")[ids] = self._home["warmstart"]
        self.batch.forward(ids, stage=self._stage)
        if qpos is not None:
            self._ctrl[ids] = self._joint_pos[ids] + self._gravity[ids] / self._gain[ids]
        self._command[ids] = self._ctrl[ids] + self._joint_offset[ids]
        self._delayed[ids] = self._command[ids][:, None]
        self._steps[ids] = self._streak[ids] = 0
        self._return[ids] = self._residual_sum[ids] = 0.0
        self._done[ids], self._residual[ids] = False, 0.0
        scene = self._scene()
        self._phi[ids] = self.potential(scene)[ids]
        mask = np.zeros(self.num_envs, bool)
        mask[ids] = True
        if self.base_policy is not None:
            self.base_policy.reset(mask)
        self._write_observation(mask, scene)

    def _resample_physics(self, i: int, rng: np.random.Generator) -> None:
        """Resample what DomainRandomization says for environment i."""
        ranges, model, scale, factor = self.randomization, self.model, np.ones(2), 1.0
        if "pair_friction" in self._fields:
            scale = rng.uniform(-1.0, 1.0, 2) * (ranges.sheet_friction, ranges.finger_friction) + 1.0
            # by name: the compiler sorts pairs, so file order means nothing
            table, fingers = ["sheet_table"], ["fixed_finger_sheet", "moving_finger_sheet"]
            table += ["fixed_spot_table", "moving_spot_table"] * ranges.limp_sheet
            for names, change in zip((table, fingers), scale):
                pairs = [model.pair(name).id for name in names]
                self._fields["pair_friction"][i, pairs, :3] = model.pair_friction[pairs, :3] * change
        if "body_mass" in self._fields:
            factor, sheet = 1.0 + ranges.sheet_mass * rng.uniform(-1.0, 1.0), model.body("sheet").id
            self._fields["body_mass"][i, sheet] = model.body_mass[sheet] * factor
            self._fields["body_inertia"][i, sheet] = model.body_inertia[sheet] * factor
        if ranges.limp_sheet:
            self._fields["dof_frictionloss"][i, ACT_DIM:] = model.dof_frictionloss[ACT_DIM:] * scale[0] * factor
            self._fields["geom_pos"][i] = model.geom_pos  # the spots drawn back
        if "actuator_gainprm" in self._fields:
            gain = model.actuator_gainprm[:, 0] * (1.0 + ranges.servo_gain * rng.uniform(-1.0, 1.0, ACT_DIM))
            self._fields["actuator_gainprm"][i, :, 0] = gain
            self._fields["actuator_biasprm"][i, :, 1] = -gain
        if "dof_damping" in self._fields:
            factor = 1.0 + ranges.servo_damping * rng.uniform(-1.0, 1.0, ACT_DIM)
            self._fields["dof_damping"][i, :ACT_DIM] = model.dof_damping[:ACT_DIM] * factor
        self._latency[i] = rng.integers(ranges.latency_steps + 1) if ranges.latency_steps else 0
        if ranges.joint_offset_rad:
            self._joint_offset[i] = ranges.joint_offset_rad * rng.uniform(-1.0, 1.0, ACT_DIM)
        if ranges.backlash_rad[1]:
            self._backlash[i] = rng.uniform(*ranges.backlash_rad, ACT_DIM)

    def _info(self, scene: Scene, results: dict[str, Any] | None = None) -> dict[str, Any]:
        """The info of a step with these results, see `step`; without results, of episodes that have just begun."""
        if results is None:
            n, kinds = self.num_envs, ("is_success", "non_finite", "out_of_reach")
            residual, nobody = np.zeros((n, ACT_DIM)), np.zeros(n, bool)
            terms = [*self.reward_terms(scene, residual, nobody, nobody), "shaping"]
            results = {kind: np.zeros(n, bool) for kind in kinds} | {"residual_magnitude": np.zeros(n)}
            results["reward_terms"] = {name: np.zeros(n) for name in terms}
            if self.base_policy is not None:
                results["base_delta_rad"] = residual
        if self.observe_pixels:
            results = {**results, "full_observation": self.full_observation}
        return {
            "distance_m": scene.sheet_distance_m,
            "yaw_error_rad": np.abs(scene.sheet_yaw_rad),
            **results,
            "episode_summary": {
                "return": self._return.copy(),
                "length": self._steps.copy(),
                "residual_magnitude": self._residual_sum / np.maximum(self._steps, 1),
            },
        }

    def _restart(self, mask: np.ndarray, info: dict[str, Any]) -> dict[str, Any]:
        """Start the next episodes of the environments in mask; returns info with theirs instead."""
        self._start_episodes(np.flatnonzero(mask))

        def merge(now: Any, new: Any) -> Any:
            if isinstance(now, dict):
                return {key: merge(value, new[key]) for key, value in now.items()}
            return np.where(mask.reshape(-1, *[1] * (now.ndim - 1)), new, now)

        return merge(info, self._info(self._scene()))


class SO101ResidualEnv(gym.Env):
    """One arm: SO101ResidualVectorEnv with a batch of one; arguments, spaces and reward are described there.

    render_mode "human" opens MuJoCo's passive viewer and runs in real time. info is that of the vector environment, as
    plain floats, ints and bools, and the same keys in every step and from reset.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": CONTROL_HZ}
    vector_env = SO101ResidualVectorEnv  # a subclass of it makes the single environment of another task

    def __init__(self, base_policy: Any = None, render_mode: str | None = None, **kwargs: Any):
        _check(render_mode in (None, *self.metadata["render_modes"]), "render_mode", render_mode, "human or rgb_array")
        _check("num_envs" not in kwargs, "num_envs", kwargs.get("num_envs"), "left to SO101ResidualVectorEnv")
        self.render_mode = render_mode
        self._envs = self.vector_env(
            1,
            base_policy,
            render_mode="rgb_array" if render_mode == "rgb_array" else None,
            num_threads=1,
            autoreset_mode=AutoresetMode.DISABLED,
            **kwargs,
        )
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self._data = mujoco.MjData(self._envs.model)
        self._viewer: Viewer | None = None
        if render_mode == "human":
            check_display()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; returns the observation and info. options {"qpos": (10,)} as in the vector env."""
        super().reset(seed=seed)
        self._envs._rngs[0] = self.np_random  # one generator, so that env.np_random is the one in use
        qpos = (options or {}).get("qpos")
        obs, info = self._envs.reset(options=None if qpos is None else {"qpos": np.asarray(qpos)[None]})
        if self.render_mode == "human":
            self.render()
        return _one_observation(obs), _first(info)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One control step with residual (6,); see SO101ResidualVectorEnv.step."""
        obs, reward, terminated, truncated, info = self._envs.step(np.asarray(action)[None])
        if self.render_mode == "human":
            self.render()
        return _one_observation(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), _first(info)

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled scene, with nominal parameters."""
        return self._envs.model

    @property
    def data(self) -> mujoco.MjData:
        """The simulation's present state: the same object again and again, a copy. To set a state, see reset."""
        return self._envs.batch.get_data(0, self._data)

    def render(self) -> np.ndarray | None:
        """An RGB frame (height, width, 3) uint8 in mode rgb_array; in mode human the viewer is brought up to date."""
        if self.render_mode == "rgb_array":
            return self._envs.render()[0]
        if self.render_mode == "human":
            if self._viewer is None:
                self._viewer = Viewer(self._envs.model, self._envs.camera_name)
            self._viewer.show(self._envs.qpos[0])
        return None

    def close(self) -> None:
        """Close the viewer and the simulation."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        self._envs.close()


def _check(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise SO101Error(f"{name} must be {expected}, got {value}")


def _rows_and_ids(active: np.ndarray) -> tuple[Any, np.ndarray | None]:
    """Index of rows, and ids for mujoco.batch, of the environments in active, (N,) bool: cheaper if that is all."""
    return (slice(None), None) if active.all() else (active, np.flatnonzero(active))


def _one_observation(obs: Any, i: int = 0) -> Any:
    """The observation of one environment."""
    return {key: array[i] for key, array in obs.items()} if isinstance(obs, dict) else obs[i]


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """Environment 0 of a dict of arrays (N, ...), numbers as plain Python values."""
    first = {key: _first(value) if isinstance(value, dict) else value[0] for key, value in info.items()}
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in first.items()}


gym.register(
    "SO101Residual-v0",
    entry_point="so101_env:SO101ResidualEnv",
    vector_entry_point="so101_env:SO101ResidualVectorEnv",
)
