"""Policies as the residual's base, named by one spec string, and the files that policies are kept in.

`load_policy(spec)` makes a base policy: `zero`, `jacobian` (a scripted pusher), `keyboard` (a person, or a gamepad),
`checkpoint:PATH`, `onnx:PATH`, `bc:PATH`, `server:HOST:PORT` (a policy of LeRobot's or GR00T's behind a server),
`opencv:SPEC` (another one, told by OpenCV where the sheet lies), or `MODULE:CLASS[:ARGUMENT]` for a BasePolicy of your
own. A base policy that cannot act raises; none falls back to zeros.

A policy's file names the script that wrote it and holds all of that script's settings. It is loaded through that
script, which must lie beside so101_env.py: a copy that you have changed builds its own networks.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import ipaddress
import os
import re
import sys
import types
import typing
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import mujoco
import mujoco.batch
import numpy as np
import torch
import torch.nn as nn

from so101_control import COMMAND_WINDOW_RAD, FIRMWARE_P, clamp, from_rad, to_rad
from so101_env import (
    ACT_DIM,
    BASE_DELTA,
    COMMAND,
    DERIVED,
    HOME_RAD,
    IMAGES,
    JOINT_MIRROR,
    MEASURED,
    OBS,
    OBSERVATION,
    RESIDUAL,
    SHAPING_INSET_M,
    SHEET_HALF_M,
    STATE,
    TAPE_CENTER_M,
    TASK_TEXT,
    BaseObservation,
    BasePolicyError,
    Part,
    SO101Error,
    camera_names,
    distance_to_sheet,
    flat_observation,
    load_model,
    sheet_pose,
)
from so101_wire import JOINT_GROUPS, PolicyClient, WireError, check_action

HERE = Path(__file__).resolve().parent
SPECS = (
    "zero, jacobian, keyboard, checkpoint:PATH, onnx:PATH, bc:PATH, server:HOST:PORT, opencv:SPEC, "
    "MODULE:CLASS[:ARGUMENT]"
)


class BasePolicy:
    """What the residual corrects. Derive from it; only `act` must be written.

    A policy that cannot act raises BasePolicyError; it never returns zeros instead.
    """

    cameras: tuple[str, ...] = ()  # of the model, "top" or "wrist", that observation.images.* shows
    image_size: tuple[int, int] = (96, 96)  # height and width of those images, pixels
    fingerprint: str = ""  # hash of its weights: a residual fits the base that it was trained on only
    memory: Mapping[str, np.ndarray] = MappingProxyType({})  # all that it remembers, a row per environment; is saved
    max_envs: int | None = None  # how many environments it can act in at once: a person can in one
    # where it took the sheet to be in the last step: x, y (m), yaw (rad), (N, 3); NaN where it had no idea
    estimate: np.ndarray | None = None
    firmware_p: int = FIRMWARE_P  # P coefficient of the servos that it moves: the environment says so, or run_so101.py
    trouble: str = ""  # why it rests in this step, if it does: what it cannot see
    quit: bool = False  # a person has had enough: the episode under way does not count, and no other follows

    def reset(self, mask: np.ndarray) -> None:
        """Forget the episodes of the environments in mask, (N,) bool."""

    def act(self, obs: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad, (N, 6): by how much the commanded joint targets move in this control step.

        Called once per control step of the environments in mask, (N,) bool. For the others the answer does not matter,
        and memory must stay as it is.

        Args:
            obs: so101_env.BaseObservation: observation.state (N, 6), joint positions, rad;
                observation.environment_state (N, 19), see so101_env.ENVIRONMENT_NAMES; command (N, 6), the last
                commanded joint targets, rad; residual (N, 6), by how much the residual moved these in the last step,
                rad; observation.images.CAMERA (N, H, W, 3) uint8 for each of `cameras`.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Release what the policy holds."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Pictures, and a policy server as base policy."""

    cameras: tuple[str, ...] = ()
    """cameras to record, or that a policy server sees: top, wrist, or NAME=CAMERA where it is called otherwise"""
    image_size: tuple[int, ...] = (96,)
    """side of the pictures in pixels, or height and width"""
    units: Literal["deg", "norm", "rad"] | None = None
    """unit of the joints at a policy server, which no server tells: deg (gripper 0 to 100; LeRobot since 0.4.4, and
    what is recorded here), norm (-100 to 100; LeRobot before) or rad"""
    chunk_steps: int = 8
    """steps of each predicted chunk that are carried out before a policy server is asked again"""
    instruction: str = TASK_TEXT
    """what a policy server is told to do"""
    server_timeout: float = 15.0
    """seconds to wait for a policy server; the first action may take 60"""
    allow_remote: bool = False
    """let --base-policy server: name another machine; nothing on the wire is encrypted"""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {"chunk_steps": (1, 1000), "server_timeout": (0.1, 3600)}

    def camera_map(self) -> dict[str, str]:
        """The model's camera by the name that it has in datasets and at the server."""
        pairs = [text.split("=", 1) if "=" in text else (text, text) for text in self.cameras]
        if len({name for name, _ in pairs}) < len(pairs) or not all(name and camera for name, camera in pairs):
            raise SO101Error(f"--cameras {' '.join(self.cameras)}: give NAME or NAME=CAMERA, each name once")
        if unknown := [camera for _, camera in pairs if camera not in camera_names()]:
            known = " and ".join(camera_names())
            raise SO101Error(f"--cameras {unknown[0]}: the scene has no such camera, it has {known}")
        return dict(pairs)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures, pixels."""
        size = self.image_size
        if len(size) not in (1, 2) or not all(8 <= side <= 1024 and side % 2 == 0 for side in size):
            text = " ".join(map(str, size))
            raise SO101Error(f"--image-size {text}: give one side or height and width, even numbers from 8 to 1024")
        return size[0], size[-1]


# ---------------------------------------------------------------------------------------------------------------------
# policies that say where the tip goes, and the scripted pusher


ARM = 4  # shoulder_pan, shoulder_lift, elbow_flex and wrist_flex move the tip; wrist_roll and gripper keep still
# stages
REACH, LOWER, DRAG, PULL_OUT, LIFT = range(5)


class TipPolicy(BasePolicy):
    """A policy that says where the gripper's tip goes; the gripper points down.

    The wanted motion of the tip becomes one of the joints by damped least squares on the model's own Jacobian. A
    servo's target is then where its joint should be next, plus what the servo needs against gravity and damping, plus
    the torque of the press.
    """

    REACH_M, DRAG_M, LIFT_M, SINK_M = 0.006, 0.004, 0.004, 0.003  # largest motion of the tip per control step
    HOVER_M = 0.016  # height of the tip while it travels
    CONTACT_M = 0.0085  # below this height the tip is on the sheet
    PRESS_N = 0.6  # enough to drag the sheet without slipping, too little to stall the arm by friction on the table
    PITCH_M_PER_RAD, PITCH_GAIN = 0.1, 0.3  # weight of a rad of pitch in the least squares; share corrected per step
    DAMPING = 1e-4  # m^2 per rad^2
    LEAD_S = 0.012  # targets of joints in motion may lead by this much more: a command takes effect late

    def __init__(self) -> None:
        self.model = load_model()
        site = self.model.site("gripperframe")
        self.site, self.body = site.id, int(site.bodyid[0])
        self.batch: mujoco.batch.Batch | None = None

    def tip_jacobian(self, obs: np.ndarray) -> np.ndarray:
        """Motion of the tip per motion of the arm's joints, (N, 3, 4), m per rad, for observations (N, 25)."""
        if self.batch is None or self.batch.nsim != len(obs):
            self.batch = mujoco.batch.Batch(self.model, nsim=len(obs), nthread=1)
            self.qpos, self.qvel, self.gravity = (self.batch.bind(key) for key in ("qpos", "qvel", "qfrc_bias"))
            self.tip = self.batch.bind("site_xpos")[:, self.site]
        self.qpos[:, :ACT_DIM], self.qvel[:, :ACT_DIM] = obs[:, OBS["joint_pos"]], obs[:, OBS["joint_vel"]]
        self.batch.forward(stage=mujoco.mjtStage.mjSTAGE_VEL.value)
        return self.batch.jac(self.body, self.tip)[0][:, :, :ARM]

    def rise_to_hover(self, tip: np.ndarray) -> np.ndarray:
        """Motion in m (N,) that brings tips (N, 3) to the height they travel at."""
        return np.clip(self.HOVER_M - tip[:, 2], -self.SINK_M, self.LIFT_M)

    def move_tip(
        self, obs: np.ndarray, command: np.ndarray, jacobian: np.ndarray, motion_m: np.ndarray, rise_m: np.ndarray,
        pressing: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Joint deltas in rad (N, 6) that move the tip.

        Args:
            obs: (N, 25) float64.
            command: last commanded joint targets (N, 6), rad.
            jacobian: of tip_jacobian for the same obs, whose gravity torques are used, too.
            motion_m, rise_m: wanted motion in this step, horizontally (N, 2) and upwards (N,).
            pressing: (N,) bool, whether to press by PRESS_N on what is below.
        """
        joints, velocity = obs[:, OBS["joint_pos"]], obs[:, OBS["joint_vel"]][:, :ARM]
        # the gripper points straight down, as at home: the three joints of the arm's plane add up to its pitch
        pitch = HOME_RAD[1:ARM].sum() - joints[:, 1:ARM].sum(1)
        weighted = np.broadcast_to(self.PITCH_M_PER_RAD * np.array([0.0, 1.0, 1.0, 1.0]), (len(obs), 1, ARM))
        rows = np.concatenate([jacobian, weighted], axis=1)  # (N, 4, 4)
        wanted = np.column_stack([motion_m, rise_m, self.PITCH_GAIN * self.PITCH_M_PER_RAD * pitch])
        transposed = rows.transpose(0, 2, 1)
        step = transposed @ np.linalg.solve(rows @ transposed + self.DAMPING * np.eye(4), wanted[:, :, None])
        softer = FIRMWARE_P / self.firmware_p  # than the model's servos
        lead = COMMAND_WINDOW_RAD * softer + self.LEAD_S * np.abs(velocity)
        step = step[:, :, 0] / np.maximum((np.abs(step[:, :, 0]) / lead).max(1, keepdims=True), 1.0)

        torque = self.gravity[:, :ARM] + self.model.dof_damping[:ARM] * velocity
        torque -= self.PRESS_N * jacobian[:, 2] * pressing[:, None]
        # wrist_roll and gripper stay where they were told to be: a residual may turn them
        delta = np.zeros((len(obs), ACT_DIM))
        held = torque * softer / self.model.actuator_gainprm[:ARM, 0]
        delta[:, :ARM] = joints[:, :ARM] + step + held - command[:, :ARM]
        return delta


class JacobianPolicy(TipPolicy):
    """Scripted pusher: go over the sheet, press, drag the sheet's centre to the tape's, hold. It ignores the yaw.

    If the sheet is there and still no success, or stays stuck near by, the pusher tries again: it pulls the sheet out,
    lifts, and goes over the sheet again.
    """

    INSET_M = 0.02  # go this far inside the sheet's edge
    SLACK_M = 0.025  # once down, the tip may be this far outside that before it is lifted
    MISREAD_M, SINKING_M_S = 0.0175, -0.03  # a tip below this height is on the sheet, too, if it does not sink
    TOLERANCE_M = 0.005  # near enough to the goal
    HOLD_STEPS = 10  # at the goal before the next try
    PATIENCE_STEPS, NEAR_M = 120, 0.04  # a drag that lasts this long, and is this near, is stuck
    PULL_OUT_M, PULL_OUT_STEPS = np.array([0.05, 0.0]), 60  # where to, and at most how long

    def __init__(self) -> None:
        super().__init__()
        self.memory: dict[str, np.ndarray] = {}

    def reset(self, mask: np.ndarray) -> None:
        """Start with reaching."""
        if not self.memory or len(self.memory["stage"]) != len(mask):
            self.memory = {name: np.zeros(len(mask), np.int64) for name in ("stage", "steps", "count")}
        for array in self.memory.values():
            array[mask] = 0

    def act(self, obs: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6)."""
        command, obs = obs[COMMAND], flat_observation(obs).astype(np.float64)
        sheet, tip, to_tape = (obs[:, OBS[name]] for name in ("sheet_pos", "tip_pos", "tape_minus_sheet"))
        sheet, to_tape, jacobian = sheet[:, :2], to_tape[:, :2], self.tip_jacobian(obs)
        velocity_z = np.einsum("nj,nj->n", jacobian[:, 2], obs[:, OBS["joint_vel"]][:, :ARM])
        stage = self._next_stage(obs, velocity_z, mask)
        pressing = (stage == DRAG) | (stage == PULL_OUT)
        to_goal = to_tape + self.PULL_OUT_M * (stage == PULL_OUT)[:, None]
        far = np.maximum(np.linalg.norm(to_goal, axis=1, keepdims=True), 1e-9)
        to_goal = to_goal * np.maximum(1.0 - self.TOLERANCE_M / far, 0.0)
        reach = np.where((stage == REACH)[:, None], sheet - tip[:, :2], 0.0)
        motion = np.where(pressing[:, None], to_goal, reach)
        length = np.maximum(np.linalg.norm(motion, axis=1, keepdims=True), 1e-9)
        motion *= np.minimum(np.where(pressing, self.DRAG_M, self.REACH_M)[:, None] / length, 1.0)
        rise = np.select([pressing, stage == LOWER], [0.0, -self.SINK_M], self.rise_to_hover(tip))
        return self.move_tip(obs, command, jacobian, motion, rise, pressing)

    def _next_stage(self, obs: np.ndarray, tip_velocity_z: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The stage to be in (N,); remembered, as is how long it lasts, for the environments in mask."""
        old, steps, count = (self.memory[name] for name in ("stage", "steps", "count"))
        tip, to_tape = obs[:, OBS["tip_pos"]], obs[:, OBS["tape_minus_sheet"]][:, :2]
        goal_distance = np.linalg.norm(to_tape, axis=1)
        pulled_out = np.linalg.norm(to_tape + self.PULL_OUT_M, axis=1) < 1.5 * self.TOLERANCE_M
        aside = distance_to_sheet(tip[:, :2], *sheet_pose(obs), self.INSET_M)
        # with encoders that are off by a degree the tip seems millimetres too high: then it is stopped in its descent
        waiting = (old == LOWER) & (tip_velocity_z > self.SINKING_M_S)
        waiting |= (old == DRAG) & (goal_distance < 1.5 * self.TOLERANCE_M)
        count = (count + 1) * waiting
        stopped = (tip[:, 2] < self.MISREAD_M) & (count >= 3) & (steps > 4)
        stuck = (steps >= self.PATIENCE_STEPS) & (goal_distance < self.NEAR_M)

        stage = old.copy()
        stage[(old == REACH) & (aside < 0.004)] = LOWER
        stage[(old == LOWER) & (steps >= self.PATIENCE_STEPS)] = LIFT
        stage[(old == LOWER) & ((tip[:, 2] < self.CONTACT_M) | stopped)] = DRAG
        stage[(old == DRAG) & ((count > self.HOLD_STEPS) | stuck)] = PULL_OUT
        stage[(old == PULL_OUT) & (pulled_out | (steps > self.PULL_OUT_STEPS))] = LIFT
        stage[(old != REACH) & (old != LIFT) & (aside > self.SLACK_M)] = LIFT
        stage[(old == LIFT) & ((tip[:, 2] > self.HOVER_M - 0.003) | (steps > 15))] = REACH
        changed = stage != old
        now = {"stage": stage, "steps": (steps + 1) * ~changed, "count": count * ~changed}
        for name, array in now.items():
            self.memory[name][mask] = array[mask]
        return stage


# ---------------------------------------------------------------------------------------------------------------------
# what networks see


class Features(nn.Module):
    """What a network sees of observations (B, D): (B, views, F), normalised, with features derived from them.

    The views are the scene and, with symmetry, its left-right mirror image. Normalisation and mirror signs are buffers,
    so that they travel with the weights.

    Args:
        observe_base: whether the base policy's deltas are part of the observation.
        derived: names of features in so101_env.DERIVED.
        symmetry: show the mirror image, too.
        parts: of the observation without the base's deltas; those of your own environment, if it observes more.
    """

    def __init__(
        self,
        observe_base: bool = False,
        derived: tuple[str, ...] = ("sheet_to_tip",),
        symmetry: bool = True,
        parts: Mapping[str, Part] = OBSERVATION,
    ):
        super().__init__()
        parts = [*parts.values(), *([BASE_DELTA] * observe_base)]
        self.functions = [DERIVED[name][0] for name in derived]

        def column(field: str) -> np.ndarray:
            values = [np.broadcast_to(getattr(part, field), len(part.names)) for part in parts]
            return np.concatenate(values).astype(np.float32)

        signs = np.concatenate([column("mirror"), *(DERIVED[name][1] for name in derived)]).astype(np.float32)
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


# the sheet's pose as networks have it: x and y from the tape's centre, and yaw
POSE_SCALE = np.array([0.1, 0.1, 0.3], np.float32)  # m, m, rad
MEASURED_DIM = sum(len(OBSERVATION[name].names) for name in MEASURED)


def scaled_pose(obs: np.ndarray) -> np.ndarray:
    """The sheet's true pose (N, 3) float32, in POSE_SCALE from the tape's centre, in observations (N, 25)."""
    xy, yaw = sheet_pose(obs)
    return (np.column_stack([xy - TAPE_CENTER_M, yaw]) / POSE_SCALE).astype(np.float32)


class SheetFinder(nn.Module):
    """Where the sheet lies, and what else matters, from pictures and what the arm measures.

    A convolutional trunk for each camera; from their features and the measurements the sheet's pose.

    Args:
        num_cameras, image_size: of the pictures, which are square.
        measured_dim: of the measurements; the first are the normalised parts of MEASURED.
        width: of the features and of a hidden layer.
    """

    LATENT = 32
    DIM = 3 + 2 + LATENT  # of `found`

    def __init__(self, num_cameras: int, image_size: int, measured_dim: int, width: int):
        super().__init__()
        size = -(-image_size // 8)  # of the last feature map

        def trunk() -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(3, 32, 7, 4, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(),
                nn.Conv2d(32, 32, 3, 1, 1), nn.ReLU(), nn.Flatten(),
            ).to(memory_format=torch.channels_last)  # fmt: skip

        self.trunks = nn.ModuleList([trunk() for _ in range(num_cameras)])
        self.features = nn.Sequential(nn.Linear(32 * size**2 * num_cameras, width), nn.LayerNorm(width), nn.ReLU())
        self.pose = nn.Sequential(nn.Linear(width + measured_dim, width), nn.ReLU(), nn.Linear(width, 3))
        self.latent = nn.Linear(width, self.LATENT)
        inner = SHEET_HALF_M - SHAPING_INSET_M
        buffers = {"tip_scale_m": OBSERVATION["tip_pos"].scale[:2], "pose_scale": POSE_SCALE, "inner_half_m": inner}
        for name, array in buffers.items():
            self.register_buffer(name, torch.tensor(np.asarray(array), dtype=torch.float32))

    def forward(self, images: list[torch.Tensor], measured: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All that was found (B, 37), for a policy's network, and of it the sheet's pose (B, 3), in POSE_SCALE.

        Args:
            images: (B, H, W, 3) uint8 for each camera.
            measured: (B, measured_dim), normalised.
        """
        maps = [trunk((image.permute(0, 3, 1, 2).float() - 128) / 64) for trunk, image in zip(self.trunks, images)]
        features = self.features(torch.cat(maps, dim=1))
        pose = self.pose(torch.cat([features, measured], dim=1))
        return torch.cat([pose, self.sheet_to_tip(pose, measured), self.latent(features)], dim=1), pose

    def sheet_to_tip(self, pose: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
        """so101_env.sheet_to_tip_feature (B, 2) of an estimated pose: it can be differentiated."""
        tip = slice(MEASURED_DIM - 3, MEASURED_DIM - 1)
        x, y = (measured[:, tip] * self.tip_scale_m - pose[:, :2] * self.pose_scale[:2]).unbind(1)
        c, s = torch.cos(pose[:, 2] * self.pose_scale[2]), torch.sin(pose[:, 2] * self.pose_scale[2])
        point = torch.stack([c * x + s * y, c * y - s * x], dim=1)
        return (point - torch.clamp(point, -self.inner_half_m, self.inner_half_m)) / 0.03


# ---------------------------------------------------------------------------------------------------------------------
# files

# what every file of a kind holds; `script` reads `args` into its own Args
SCHEMAS: dict[str, dict[str, Any]] = {
    "so101 checkpoint 8": {
        "script": str, "args": dict, "agent": dict, "optimizer": dict, "generator": torch.Tensor, "envs": dict,
        "next_obs": torch.Tensor, "num_envs": int, "global_step": int, "recent_episodes": list,
        "finalists": list, "base_fingerprint": str,
    },
    "so101 clone 3": {"script": str, "args": dict, "clone": dict},
    "so101 student 2": {
        "script": str, "args": dict, "task": dict, "base": dict, "base_fingerprint": str, "teacher_fingerprint": str,
        "global_step": int, "student": dict, "training": (dict, type(None)),
    },
}  # fmt: skip
CHECKPOINT, CLONE, STUDENT = SCHEMAS
WEIGHTS = {CHECKPOINT: "agent", CLONE: "clone", STUDENT: "student"}  # where they are


def load_file(path: str | Path, *kinds: str) -> dict[str, Any]:
    """Read a policy's file, and check its checksums, its keys, and that its weights are finite.

    Args:
        path: the file.
        kinds: what it may be: CHECKPOINT, CLONE, STUDENT. The file says which, in "format".

    Raises:
        SO101Error: missing, damaged, or of another kind.
    """
    noun = kinds[0].split()[1]
    if not Path(path).is_file():
        raise SO101Error(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        saved = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        text = f"{path}: not a readable {noun}, perhaps truncated ({type(error).__name__}); take another one"
        raise SO101Error(text) from error
    if damaged:
        raise SO101Error(f"{path}: damaged, the checksum of {damaged} is wrong; take another {noun}")
    if not isinstance(saved, dict) or saved.get("format") not in kinds:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        known = " or ".join(map(repr, kinds))
        raise SO101Error(f"{path}: not a {noun} of this version, which reads {known}; the file says {found!r}")
    kind = saved["format"]
    for key, expected in SCHEMAS[kind].items():
        if not isinstance(saved.get(key, ...), expected):
            raise SO101Error(f"{path}: {key} is missing or of a wrong type; take another {noun}")
    for name, tensor in saved[WEIGHTS[kind]].items():
        if not isinstance(tensor, torch.Tensor) or not torch.isfinite(tensor).all():
            raise SO101Error(f"{path}: weight {name} is not finite; take another {noun}")
    return saved


def load_script(name: str, path: str | Path = "") -> types.ModuleType:
    """The script called name, which must lie beside so101_env.py, as a module.

    path is the file that names it. Raises SO101Error if there is no such script.
    """
    where = f"{path}: written by {name}, which" if path else f"script {name}:"
    script = HERE / name
    if not re.fullmatch(r"[A-Za-z_]\w*\.py", name) or not script.is_file():
        raise SO101Error(f"{where} is not beside so101_env.py; put it into {HERE}")
    for module in (sys.modules["__main__"], sys.modules.get(script.stem)):  # it runs, or has been loaded
        if getattr(module, "__file__", None) and Path(module.__file__).resolve() == script:
            return module
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = sys.modules[script.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def restore_settings(cls: type, values: Any, path: str | Path) -> Any:
    """A dataclass, nested ones included, from the plain values that a file keeps of it.

    Raises SO101Error, naming the field, for one that is missing, unknown, or of a wrong type: no default of today slips
    in.
    """
    if not isinstance(values, dict):
        raise SO101Error(f"{path}: its settings have no {cls.__name__}")
    hints, names = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
    script = f"{cls.__name__} of {cls.__module__}.py"
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
        restored[name] = value
    return cls(**restored)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a plain value fits a type hint of a flag."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(each, typing.get_args(hint)[0]) for each in value)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(hint))
    return type(value) is hint or (hint is float and type(value) is int)


def load_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load weights; raise SO101Error if they do not fit, as when the script has been changed since."""
    try:
        module.load_state_dict(state_dict)
    except RuntimeError as error:
        what = " ".join(str(error).split())[:200]
        text = f"{path}: its weights do not fit {type(module).__name__} of {type(module).__module__}.py ({what})"
        raise SO101Error(text) from error


class Checkpoint(NamedTuple):
    """A training script's checkpoint, and what is needed to use it."""

    saved: dict[str, Any]
    script: types.ModuleType  # the script that wrote it
    args: Any  # its Args, as they were

    def agent(self, path: str | Path) -> nn.Module:
        """The script's Agent with the weights of the checkpoint."""
        agent = self.script.Agent(self.args)
        load_weights(agent, self.saved["agent"], path)
        return agent


def check_base(saved: dict[str, Any], spec: str, base_policy: BasePolicy | None, path: str | Path) -> None:
    """Raise SO101Error if the base policy is no longer the one that the residual saved in path was trained on."""
    now, then = base_policy.fingerprint if base_policy else "", saved["base_fingerprint"]
    if now != then:
        raise SO101Error(
            f"{path}: trained on base policy {spec} with weights {then[:12] or 'none'}, it now has "
            f"{now[:12] or 'none'}; put the old one back"
        )


def load_checkpoint(path: str | Path, saved: dict[str, Any] | None = None) -> Checkpoint:
    """Read a checkpoint through the script that wrote it. Raises SO101Error, naming what is wrong with it.

    saved is what load_file read from path, if it has been read.
    """
    saved = saved or load_file(path, CHECKPOINT)
    script = load_script(saved["script"], path)
    for name in ("Args", "Agent", "make_envs", "check_args"):
        if not hasattr(script, name):
            raise SO101Error(f"{path}: written by {saved['script']}, which has no {name}; use the script that wrote it")
    args = restore_settings(script.Args, saved["args"], path)
    try:
        script.check_args(args)
    except SO101Error as error:
        raise SO101Error(f"{path}: {error}") from error
    return Checkpoint(saved, script, args)


def hash_weights(state_dict: dict[str, torch.Tensor], also: str = "") -> str:
    """SHA-256 of weights, and of a string."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# base policies from files and modules


def add_cameras(
    base: BasePolicy | None, cameras: tuple[str, ...], image_size: tuple[int, int], path: str | Path
) -> tuple[tuple[str, ...], tuple[int, int]]:
    """Cameras and size of the pictures for a policy and its base policy. Raises SO101Error if the sizes differ."""
    others = () if base is None else base.cameras
    if others and tuple(base.image_size) != tuple(image_size):
        raise SO101Error(
            f"{path}: looks at pictures of {image_size} pixels, its base policy at {tuple(base.image_size)}; one size "
            "must do for both"
        )
    return tuple(dict.fromkeys((*cameras, *others))), tuple(image_size)


class StackedPolicy(BasePolicy):
    """A frozen residual on a base policy of its own: residuals stack. Its `act` remains to be written."""

    def __init__(self, base: BasePolicy | None):
        self.base = base
        self.residual = np.zeros((0, ACT_DIM))  # its own, of the last step, rad
        if base is not None:
            self.cameras, self.image_size = base.cameras, base.image_size

    def reset(self, mask: np.ndarray) -> None:
        """Forget the last residual; passed on to its own base policy."""
        if len(self.residual) != len(mask):
            self.residual = np.zeros((len(mask), ACT_DIM))
        self.residual[mask] = 0.0
        if self.base is not None:
            self.base.reset(mask)

    @property
    def firmware_p(self) -> int:
        """P coefficient of the servos that it moves; passed on to its own base policy."""
        return FIRMWARE_P if self.base is None else self.base.firmware_p

    @firmware_p.setter
    def firmware_p(self, firmware_p: int) -> None:
        if self.base is not None:
            self.base.firmware_p = firmware_p

    @property
    def memory(self) -> Mapping[str, np.ndarray]:
        """Its own last residual, and what its own base policy remembers."""
        base = {} if self.base is None else self.base.memory
        return {"residual": self.residual, **{f"base.{name}": array for name, array in base.items()}}

    @memory.setter
    def memory(self, memory: Mapping[str, np.ndarray]) -> None:
        self.residual = memory["residual"]
        if self.base is not None:
            base = {name: array for name, array in memory.items() if name != "residual"}
            self.base.memory = {name.removeprefix("base."): array for name, array in base.items()}

    def base_delta(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6) of its own base policy, which is corrected twice."""
        if self.base is None:
            return np.zeros((len(mask), ACT_DIM))
        return self.base.act(obs.with_residual(obs[RESIDUAL] + self.residual), mask)

    def close(self) -> None:
        """Release what its own base policy holds."""
        if self.base is not None:
            self.base.close()


class CheckpointPolicy(StackedPolicy):
    """A frozen policy of a training script, its own base policy included."""

    def __init__(self, path: str, saved: dict[str, Any] | None = None):
        checkpoint = load_checkpoint(path, saved)
        self.args = args = checkpoint.args
        self.task = args.task
        super().__init__(load_policy(args.base.base_policy, args.base.server))
        self.agent = checkpoint.agent(path)
        check_base(checkpoint.saved, args.base.base_policy, self.base, path)
        self.observe_base = getattr(args.base, "observe_base", self.base is not None)  # one that sees always does
        self.scale_rad = args.task.alpha * args.task.act_scale
        self.own_cameras = tuple(getattr(self.agent, "cameras", ()))
        if self.own_cameras:
            self.cameras, self.image_size = add_cameras(self.base, self.own_cameras, self.agent.image_size, path)
        also = f"{checkpoint.saved['base_fingerprint']} {self.scale_rad}"
        self.fingerprint = hash_weights(checkpoint.saved["agent"], also)

    def agent_residual(self, obs: BaseObservation, base_delta: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The agent's residual (N, 6) in [-1, 1] for its base's deltas (N, 6), rad; zero where mask is not."""
        flat, residual = flat_observation(obs)[mask], np.zeros((len(mask), ACT_DIM), np.float32)
        if self.own_cameras:
            flat = np.concatenate([flat[:, OBS[name]] for name in MEASURED], axis=1)
        if self.observe_base:
            flat = np.concatenate([flat, base_delta[mask].astype(np.float32)], axis=1)
        seen = obs.rows(mask)
        pixels = {f"pixels_{camera}": seen[IMAGES + camera] for camera in self.own_cameras}
        residual[mask] = self.agent.act(pixels | {"state": flat} if pixels else flat)
        return residual

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): what its own base policy and its residual ask for together."""
        base = self.base_delta(obs, mask)
        residual = self.scale_rad * self.agent_residual(obs, base, mask).astype(np.float64)
        self.residual[mask] = residual[mask]
        return base + residual


def new_chunks(num_envs: int, steps: int) -> dict[str, np.ndarray]:
    """Memory of a base policy that plans `steps` joint targets at once: see follow_chunks."""
    targets = np.zeros((num_envs, steps, ACT_DIM))
    return {"step": np.zeros(num_envs, np.int64), "targets": targets, "moved": np.zeros((num_envs, ACT_DIM))}


def follow_chunks(memory: dict[str, np.ndarray], obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
    """Joint deltas in rad (N, 6) that follow planned targets, and on to the next step for the environments in mask.

    By what the residual has moved the arm since a plan was made, the rest of the plan is moved, too: a correction lasts
    until the base looks again. Otherwise the plan would undo it one step later, noise would hardly move the arm, and
    PPO would learn less: see benchmark/README.md.

    Args:
        memory: step (N,), how far each plan has been followed, 0 where it is new; targets (N, steps, 6), rad, the
            plans; moved (N, 6), rad.
        obs: with residual and command.
    """
    step, targets, moved = (memory[name] for name in ("step", "targets", "moved"))
    moved[mask] = (moved + obs[RESIDUAL])[mask] * (step[mask] > 0)[:, None]
    delta = targets[np.arange(len(step)), step] + moved - obs[COMMAND]
    step[mask] = (step[mask] + 1) % targets.shape[1]
    return delta


class ServerPolicy(BasePolicy):
    """A policy behind a server, as of LeRobot or GR00T, that sees through cameras: `server:HOST:PORT`.

    All environments that look in a step are one request. Of every predicted chunk the first chunk_steps absolute joint
    targets are carried out, see follow_chunks. Raises BasePolicyError for a server that is not there, that is no such
    policy's, or that fails.
    """

    def __init__(self, address: str, options: Server):
        host, _, port = address.rpartition(":")
        self.address, host = address, host.strip("[]")
        if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
            raise BasePolicyError(f"base policy server:{address}: give server:HOST:PORT, as in server:127.0.0.1:5555")
        if not options.allow_remote and not _is_loopback(host):
            raise BasePolicyError(
                f"base policy server:{address}: is another machine, and nothing on the wire is encrypted: tunnel it "
                f"(ssh -L {port}:127.0.0.1:{port} {host}), or say --allow-remote"
            )
        if options.units is None:
            raise BasePolicyError(
                f"base policy server:{address}: no server tells the unit of its joints: say --units deg (LeRobot since "
                "0.4.4, and what is recorded here), norm (LeRobot before) or rad"
            )
        self.options, self.image_size, self.memory = options, options.size, {}
        try:
            self.client = PolicyClient(
                host, int(port), options.server_timeout, api_token=os.environ.get("SO101_API_TOKEN")
            )
        except WireError as error:
            raise self._error(error) from error
        try:
            self._match_modalities()
            # grey pictures of an arm at home
            home, video, steps = HOME_RAD[None].astype(np.float32), self.client.modalities["video"], self.past + [0]
            grey = np.full((1, len(steps), *self.image_size, 3), 128, np.uint8)
            probe = self._question({key: grey for key in video.keys}, np.repeat(home[:, None], len(steps), axis=1))
            facts = {**dataclasses.asdict(options), "server_timeout": 0, "allow_remote": False}
            policy = self.client.identify(probe)
            self.fingerprint = hashlib.sha256(f"{policy} {sorted(facts.items())}".encode()).hexdigest()
        except WireError as error:
            self.close()
            raise self._error(error) from error
        except BaseException:
            self.close()
            raise

    def _error(self, problem: object) -> BasePolicyError:
        return BasePolicyError(f"base policy server:{self.address}: {problem}")

    def _match_modalities(self) -> None:
        """Find the scene's counterpart of all that the policy sees and gives."""
        video, state, action = (self.client.modalities[kind] for kind in ("video", "state", "action"))
        names = self.options.camera_map()
        self.camera_of = {key: names.get(key, key) for key in video.keys}
        if unknown := [key for key, camera in self.camera_of.items() if camera not in camera_names()]:
            example = " ".join(f"{key}={camera}" for key, camera in zip(video.keys, camera_names()))
            text = f"its policy looks through {' and '.join(video.keys)}; say which camera {unknown[0]} is, as in"
            raise self._error(f"{text} --cameras {example}")
        if unused := [name for name in names if name not in video.keys]:
            seen = " and ".join(video.keys) or "no camera"
            raise self._error(f"--cameras {unused[0]}: its policy does not look through that, but through {seen}")
        self.cameras = tuple(dict.fromkeys(self.camera_of.values()))
        for kind, keys in (("state", state.keys), ("action", action.keys)):
            if unknown := [key for key in keys if key not in JOINT_GROUPS]:
                known = " and ".join(JOINT_GROUPS)
                raise self._error(f"its policy has the {kind} {unknown[0]}; an SO-101's are {known}")
        if missing := [key for key in JOINT_GROUPS if key not in action.keys]:
            raise self._error(f"its policy gives no {missing[0]}, only {' and '.join(action.keys) or 'nothing'}")
        horizon = len(action.deltas)
        if action.deltas != list(range(horizon)):
            raise self._error(f"its policy predicts the steps {action.deltas}, not all from now on")
        if self.options.chunk_steps > horizon:
            raise self._error(f"--chunk-steps {self.options.chunk_steps}: its policy predicts {horizon} steps")
        self.past = video.deltas[:-1] if video.keys else state.deltas[:-1]
        deltas = [modality.deltas for modality in (video, state) if modality.keys]
        if any(each != [*self.past, 0] for each in deltas) or any(-d > self.options.chunk_steps for d in self.past):
            text = f"its policy looks at the steps {deltas[0]}; only 0 and at most --chunk-steps before it will do"
            raise self._error(text)

    def _question(self, video: dict[str, np.ndarray], joints_rad: np.ndarray) -> dict[str, Any]:
        """Arguments of PolicyClient.get_action: pictures (B, T, H, W, 3), joint positions (B, T, 6), rad."""
        joints = from_rad(joints_rad.astype(np.float64), self.options.units)
        state = {key: joints[:, :, JOINT_GROUPS[key]] for key in self.client.modalities["state"].keys}
        return {"video": video, "state": state, "text": self.options.instruction}

    def reset(self, mask: np.ndarray) -> None:
        """Look again before the next step."""
        n, steps = len(mask), self.options.chunk_steps
        if not self.memory or len(self.memory["step"]) != n:
            self.memory = new_chunks(n, steps)
            for back in self.past:  # what was seen then
                self.memory[f"joints{back}"] = np.zeros((n, ACT_DIM), np.float32)
                for camera in self.cameras:
                    self.memory[f"{camera}{back}"] = np.zeros((n, *self.image_size, 3), np.uint8)
            self.memory["new"] = np.zeros(n, bool)  # nothing was seen in this episode yet
        self.memory["step"][mask], self.memory["new"][mask] = 0, True

    def act(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): from the last commanded targets to the policy's."""
        memory, steps = self.memory, self.options.chunk_steps
        look = mask & (memory["step"] == 0)
        if look.any():
            memory["targets"][look] = self._look(obs.rows(look), look)
            memory["new"][look] = False
        for back in self.past:  # a policy that also sees the past will ask for what is seen now
            if (rows := mask & (memory["step"] == (steps + back) % steps)).any():
                seen = obs.rows(rows)
                memory[f"joints{back}"][rows] = seen[STATE]
                for camera in self.cameras:
                    memory[f"{camera}{back}"][rows] = seen[IMAGES + camera]
        return follow_chunks(memory, obs, mask)

    def _look(self, seen: BaseObservation, look: np.ndarray) -> np.ndarray:
        """The next joint targets (n, chunk_steps, 6), rad, of the n environments in look, (N,) bool."""
        new, n = self.memory["new"][look], int(look.sum())

        def over_time(name: str, now: np.ndarray) -> np.ndarray:
            """(n, T, ...): what was seen before, or, at the start of an episode, what is seen now."""
            past = [self.memory[f"{name}{back}"][look] for back in self.past]
            for array in past:
                array[new] = now[new]
            return np.stack([*past, now], axis=1)

        pictures = {camera: over_time(camera, seen[IMAGES + camera]) for camera in self.cameras}
        video = {key: pictures[camera] for key, camera in self.camera_of.items()}
        try:
            action = self.client.get_action(**self._question(video, over_time("joints", seen[STATE])))
            groups = [
                check_action(action, key, n, self.options.chunk_steps, group.stop - group.start)
                for key, group in JOINT_GROUPS.items()
            ]
            return to_rad(np.concatenate(groups, axis=2), self.options.units)
        except (WireError, SO101Error) as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the connection."""
        self.client.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_policy(spec: str, server: Server = Server()) -> BasePolicy | None:
    """Base policy of a spec string, see SPECS; None for zero. `server` is for server:HOST:PORT only.

    Raises SO101Error: an unknown spec, a file that cannot be used, a class that is no BasePolicy.
    """
    kind, _, rest = spec.partition(":")
    if spec == "zero":
        return None
    if spec == "jacobian":
        return JacobianPolicy()
    if spec == "keyboard":
        return _own_policy("so101_teleop", "KeyboardPolicy")
    if kind == "checkpoint" and rest:
        saved = load_file(rest, CHECKPOINT, STUDENT)
        if saved["format"] == STUDENT:
            return load_script(saved["script"], rest).load_student(saved, rest)
        return CheckpointPolicy(rest, saved)
    if kind == "bc" and rest:
        saved = load_file(rest, CLONE)
        return load_script(saved["script"], rest).ClonePolicy(saved, rest)
    if kind == "server":
        return ServerPolicy(rest, server)
    if kind == "onnx" and rest:
        return _own_policy("so101_onnx", "OnnxPolicy", rest)
    if kind == "opencv" and rest:
        return _own_policy("so101_vision", "OpenCVPolicy", rest)
    if rest and kind not in ("checkpoint", "onnx", "bc", "opencv"):
        return _own_policy(kind, *rest.split(":", 1))
    raise BasePolicyError(f"unknown base policy {spec!r}; known are {SPECS}")


def _own_policy(module_name: str, class_name: str, *argument: str) -> BasePolicy:
    """An instance of a class by module and name, from the module search path or the working directory."""
    where = f"base policy {module_name}:{class_name}"
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise  # an import inside that module
        raise BasePolicyError(f"{where}: no module {module_name} here; known specs are {SPECS}") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, BasePolicy) or cls.act is BasePolicy.act:
        raise BasePolicyError(f"{where}: must be a class in {module.__file__} that derives from BasePolicy, with act")
    return cls(*argument)
