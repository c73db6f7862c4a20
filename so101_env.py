"""Paper in square: an SO-101 arm slides an A5 sheet over a table into a rectangle of red tape, in MuJoCo.

`SO101ResidualVectorEnv` steps a batch of simulations on MuJoCo's thread pool. `SO101ResidualEnv` is the same code with
a batch of one, so both give the same numbers for the same seeds and actions. World frame = base frame of the arm: x
straight ahead, y to the left, z up, origin at the base on the table. SI units throughout.

Train on it with ppo_residual_so101.py. A variant of the task is a subclass of `SO101ResidualVectorEnv` that overrides
`draw_start`, `observe`, `command_targets`, `success`, `failure`, `reward_terms` or `potential`; a task of your own is
built on so101_sim, see docs/own_task.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.registration import load_env_creator

from so101_sim.batch import FULL_ARM, KIT_ARM, ArmRandomization, Arms, is_like, log_uniform
from so101_sim.control import ACT_DIM, FIRMWARE_P, JOINT_MIRROR, JOINTS, valid_delta
from so101_sim.errors import BasePolicyError, SO101Error, check_ranges, require
from so101_sim.geometry import distance_to_rectangle, in_axes, wrap_angle
from so101_sim.scene import ASSETS, Paint, VisualRandomization, load_spec, tinted
from so101_sim.vector import LOAD, ArmEnv, ArmVectorEnv, BaseObservation, Part, slices

TASK_TEXT = "Slide the sheet of paper into the square of red tape."  # instruction in datasets and for language policies
MAX_EPISODE_STEPS = 400
SUCCESS_STEPS = 5  # consecutive control steps with all four corners inside

SHEET_HALF_M = np.array([0.074, 0.105])  # A5, x and y at yaw 0
SHEET_HALF_THICKNESS_M = 0.0005
SHEET_MEAN_RADIUS_M = 0.0691  # mean distance of the sheet's points from its centre
TAPE_CENTER_M = np.array([0.27, 0.0])
TAPE_WIDTH_M = 0.019
TAPE_MARGIN_M = 0.04  # between sheet and tape on every side, in the standard task
# gripper down, its tip over the tape's centre, jaws almost closed: both fingertips 10 mm above the sheet's surface.
# wrist_roll .047 puts the jaws into the arm's plane of symmetry.
HOME_RAD = np.array([0.0, 0.4759, -0.2335, 1.3284, 0.0470, 0.0])
SHEET_REACH_M = 0.42  # stretched arm, tip on the table, measured from the shoulder_pan axis
PAN_AXIS_M = np.array([0.0388353, 0.0])

# potential of the shaping term, per metre: tip to sheet, sheet to tape; radians of yaw are converted to metres
SHAPING_PER_M, SHAPING_YAW_M_PER_RAD = 100.0, 0.05
# A sheet that is dragged by a point beside its centre turns: rad per m of lever across the drag and m of drag.
# Fitted to drags of the scripted pusher.
TURN_RAD_PER_M2 = 39.0
SHAPING_INSET_M = 0.01  # the tip counts as over the sheet this far inside its edges
TIP_PRESSED_M = 0.0073  # height of the gripper tip when the fingertips touch the sheet
# With a limp sheet, a spot below each fingertip that presses carries the press. It reaches SPOT_GAP_M out of the sheet.
FINGER_RADIUS_M, SPOT_RADIUS_M, SPOT_GAP_M = 0.008, 0.004, 0.0001
FINGERS = ("fixed", "moving")
# one standard deviation at `DomainRandomization.observation_noise = 1`
NOISE_JOINT_RAD, NOISE_VELOCITY_RAD_S, NOISE_TIP_M, NOISE_SHEET_M, NOISE_YAW_RAD = 0.003, 0.05, 0.001, 0.002, 0.01

# makes a base policy of a spec string; named as text, as Gymnasium names entry points, so that torch is not imported
POLICY_LOADER = "so101.policies:load_policy"
BASE_POLICY_NAMES = ("reset", "act", "close", "memory", "fingerprint", "cameras", "image_size", "max_envs", "quit")


# ---------------------------------------------------------------------------------------------------------------------
# settings


@dataclasses.dataclass(frozen=True)
class Task:
    """The settings of the task: arguments of the environment, and flags of the scripts."""

    alpha: float = 0.7
    """share of act_scale that the residual commands, in [0, 1]"""
    act_scale: float = 0.02
    """joint delta in rad per control step of a full residual at alpha 1"""
    residual_penalty: float = 0.001
    """reward lost per squared norm of the residual"""
    tape_margin: float = TAPE_MARGIN_M
    """m between sheet and tape on every side: 0.04 standard, 0.02 precise"""
    randomize: bool = True
    """domain randomisation of the friction of table and fingertips; without it only the start pose is drawn"""
    full_randomization: bool = False
    """also randomise sheet mass, servo gain and damping, latency, joint offsets, backlash and observation noise, and
    simulate a limp sheet, which is pressed to the table below the finger instead of at its four corners"""
    arm_randomization: bool = False
    """full_randomization in the wider ranges of arms from a kit, with a sheet that is out of view now and then"""
    visual_randomization: bool = False
    """randomise what cameras see: light, shadows, colours, table texture, camera poses, image noise"""
    observe_load: bool = False
    """append the load on each joint, in which an arm feels contacts, to the observation: 6 more numbers"""
    firmware_p: int = FIRMWARE_P
    """P coefficient that the servos are set to, to which their gain is proportional; LeRobot's driver sets 16"""
    arrival_yaw_weight: float = 0.0
    """m per rad: weight, in the shaping, of the yaw that a straight drag to the tape would end with, which the networks
    then also see; 0: the present yaw with weight 0.05"""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "alpha": (0.0, 1.0), "act_scale": (1e-6, 1.0), "residual_penalty": (0.0, 1e3), "tape_margin": (1e-3, 0.1),
        "arrival_yaw_weight": (0.0, 1e3), "firmware_p": (4, 64),
    }  # fmt: skip

    def randomization(self) -> DomainRandomization:
        """The ranges that the three flags of randomisation stand for. Raises SO101Error if they contradict."""
        if self.arm_randomization and self.full_randomization:
            raise SO101Error(
                "--full-randomization contradicts --arm-randomization: drop it, or add --no-arm-randomization"
            )
        wide = "arm" if self.arm_randomization else "full" if self.full_randomization else ""
        if wide and not self.randomize:
            raise SO101Error(f"--{wide}-randomization contradicts --no-randomize: drop one of them")
        kind = DomainRandomization
        return {"arm": kind.arm, "full": kind.full, "": kind if self.randomize else kind.nominal}[wide]()


@dataclasses.dataclass(frozen=True)
class DomainRandomization(ArmRandomization):
    """What is resampled every episode. A fraction f means uniform in nominal x [1 - f, 1 + f]."""

    sheet_distance_m: tuple[float, float] = (0.04, 0.12)
    """initial distance of the sheet's centre from the tape's centre, in a uniform direction"""
    sheet_yaw_rad: float = 0.3
    """initial yaw, uniform in +- this"""
    sheet_friction: float = 0.20
    """fraction, friction between sheet and table"""
    finger_friction: float = 0.15
    """fraction, friction between fingertips and sheet"""
    sheet_friction_factor: tuple[float, float] = (1.0, 1.0)
    """a further factor of the friction between sheet and table, log-uniform between these"""
    finger_friction_factor: tuple[float, float] = (1.0, 1.0)
    """a further factor of the friction between fingertips and sheet, log-uniform between these"""
    least_grip: float = 0.0
    """least ratio of fingertip friction to table friction; fingertips that cannot drag a sheet teach nothing"""
    sheet_mass: float = 0.0
    """fraction, mass and inertia of the sheet"""
    observation_noise: float = 0.0
    """Gaussian noise on the observation, in units of the NOISE_* constants"""
    pose_dropout: float = 0.0
    """probability per control step that the sheet goes out of view for up to half a second, in which its last pose is
    observed"""
    limp_sheet: bool = False
    """the table carries a press below the fingertip, as under real paper, instead of at the sheet's four corners, and
    fingertips resist twisting"""

    @classmethod
    def nominal(cls) -> DomainRandomization:
        """Nominal physics. Only the sheet's start pose is drawn, since that is the task itself."""
        return cls(sheet_friction=0.0, finger_friction=0.0)

    @classmethod
    def full(cls, **ranges: Any) -> DomainRandomization:
        """Everything on: also the arm's properties, mass, observation noise and a limp sheet; or other ranges."""
        return cls(**{**FULL_ARM, "sheet_mass": 0.10, "observation_noise": 1.0, "limp_sheet": True, **ranges})

    @classmethod
    def arm(cls) -> DomainRandomization:
        """Everything on, in the wider ranges of arms from a kit, and of their tables and fingertips."""
        frictions = {"finger_friction_factor": (0.33, 1.0), "sheet_friction_factor": (0.8, 1.8), "least_grip": 1.1}
        return cls.full(**KIT_ARM, **frictions, pose_dropout=0.003)


@dataclasses.dataclass(frozen=True)
class PaperVisuals(VisualRandomization):
    """Visual randomisation of the task."""

    paper: tuple[float, float] = (0.85, 1.0)
    """brightness of the sheet; its lines get any colour, including that of the paper"""
    tape_red: tuple[float, float] = (0.5, 0.95)
    """red of the tape"""
    tape_other: tuple[float, float] = (0.02, 0.2)
    """green and blue of the tape"""

    def paint_objects(self, rng: np.random.Generator, paint: Paint) -> None:
        """Recolour sheet, lines and tape."""
        paper = tinted(rng, self.paper, 0.05)
        paint("paper", paper)
        for lines in ("heading", "lines"):
            paint(lines, rng.uniform(0, 1, 3) if rng.random() < 0.7 else paper)
        paint("tape", np.append(rng.uniform(*self.tape_red), rng.uniform(*self.tape_other, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# the observation


# in the mirror image rotations about x and z turn the other way
OBSERVATION = {
    "joint_pos": Part(tuple(f"{joint}.pos" for joint in JOINTS), HOME_RAD, 0.3, JOINT_MIRROR),  # rad
    "joint_vel": Part(tuple(f"{joint}.vel" for joint in JOINTS), 0.0, 0.5, JOINT_MIRROR),  # rad/s
    "sheet_pos": Part(("sheet.x", "sheet.y", "sheet.z"), (*TAPE_CENTER_M, 0.0), 0.1, (1, -1, 1)),  # m
    "sheet_quat": Part(tuple(f"sheet.q{axis}" for axis in "wxyz"), (1.0, 0.0, 0.0, 0.0), 0.1, (1, -1, 1, -1)),
    "tape_minus_sheet": Part(tuple(f"tape_minus_sheet.{axis}" for axis in "xyz"), 0.0, 0.1, (1, -1, 1)),  # m
    # z has a smaller scale: millimetres of tip height decide about contact
    "tip_pos": Part(("tip.x", "tip.y", "tip.z"), (*TAPE_CENTER_M, 0.015), (0.1, 0.1, 0.02), (1, -1, 1)),  # m
}
# appended with observe_base: the base policy's joint deltas, rad
BASE_DELTA = Part(tuple(f"{joint}.base_delta" for joint in JOINTS), 0.0, 0.02, JOINT_MIRROR)
OBS = slices(OBSERVATION)
SHEET_COLUMNS = slice(OBS["sheet_pos"].start, OBS["tape_minus_sheet"].stop)  # what a lost view leaves as it was
MEASURED = ("joint_pos", "joint_vel", "tip_pos")  # parts that a real arm measures
OBS_DIM = sum(len(part.names) for part in OBSERVATION.values())
# the same numbers by LeRobot's names, for datasets, base policies and policy servers
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
COMMAND, RESIDUAL, LOADS = "command", "residual", "load"
STATE_NAMES = list(OBSERVATION["joint_pos"].names)
ENVIRONMENT_NAMES = [name for part in list(OBSERVATION.values())[1:] for name in part.names]


def extra_parts(task: Task, observe_base: bool = False) -> dict[str, Part]:
    """The parts that follow OBSERVATION in an observation with these settings."""
    return ({"load": LOAD} if task.observe_load else {}) | ({"base_delta": BASE_DELTA} if observe_base else {})


def sheet_pose(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre (N, 2), m, and yaw (N,), rad, of the sheet in observations (N, 25)."""
    quat = obs[:, OBS["sheet_quat"]]
    return obs[:, OBS["sheet_pos"]][:, :2], 2.0 * np.arctan2(quat[:, 3], quat[:, 0])


def make_observation(
    joints_rad: np.ndarray, velocities_rad_s: np.ndarray, tip_m: np.ndarray, sheet_pose: np.ndarray
) -> np.ndarray:
    """Observations (N, 25) float32 from measured joints (N, 6), velocities (N, 6), tips (N, 3) and sheet poses (N, 3).

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


def base_observation(
    obs: np.ndarray, command: np.ndarray, residual: np.ndarray | None = None, load: np.ndarray | None = None,
    **cameras: Any,
) -> BaseObservation:  # fmt: skip
    """What base policies see, by LeRobot's names, a row per environment.

    observation.state (N, 6), joint positions, rad; observation.environment_state (N, 19), the rest of obs (N, 25);
    command (N, 6), last commanded joint targets, rad; residual (N, 6), what the residual added to them in the last
    step, and load (N, 6), see Controller.load, both rad, 0 by default; observation.images.CAMERA (N, H, W, 3) uint8
    """
    arrays = {STATE: obs[:, :ACT_DIM].copy(), ENVIRONMENT: obs[:, ACT_DIM:].copy(), COMMAND: command.copy()}
    for name, given in ((RESIDUAL, residual), (LOADS, load)):
        arrays[name] = np.zeros(command.shape) if given is None else given.copy()
    return BaseObservation(arrays, **cameras)


# ---------------------------------------------------------------------------------------------------------------------
# geometry of the task, as pure functions on arrays


def sheet_inside(sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray, tape_margin_m: float) -> np.ndarray:
    """Whether all four corners lie inside the tape's opening, (N,) bool, for centres (N, 2) and yaws (N,)."""
    c, s = np.abs(np.cos(sheet_yaw_rad)), np.abs(np.sin(sheet_yaw_rad))
    # half sides of the sheet's axis-aligned bounding box, which its corners touch on all four sides
    (half_x, half_y), (center_x, center_y) = SHEET_HALF_M.tolist(), TAPE_CENTER_M.tolist()
    fits_x = np.abs(sheet_xy_m[:, 0] - center_x) + (c * half_x + s * half_y) <= half_x + tape_margin_m
    fits_y = np.abs(sheet_xy_m[:, 1] - center_y) + (c * half_y + s * half_x) <= half_y + tape_margin_m
    return fits_x & fits_y


# ONNX export keeps module constants only as plain numbers, see so101/onnx_export.py
_TAPE_CENTER_M = tuple(TAPE_CENTER_M.tolist())


def arrival_yaw(tip_xy_m: np.ndarray, sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray) -> np.ndarray:
    """Approximate yaw (N,) of sheets after being pressed at the tips (N, 2) and dragged straight to the tape."""
    lever, drag = tip_xy_m - sheet_xy_m, np.array(_TAPE_CENTER_M) - sheet_xy_m
    return sheet_yaw_rad + TURN_RAD_PER_M2 * (lever[:, 0] * drag[:, 1] - lever[:, 1] * drag[:, 0])


@dataclasses.dataclass
class Scene:
    """The true state at the end of a control step, a row per environment."""

    tip_m: np.ndarray  # (N, 3)
    sheet_xy_m: np.ndarray  # (N, 2)
    sheet_yaw_rad: np.ndarray  # (N,), in [-pi, pi)
    sheet_distance_m: np.ndarray  # (N,), from the sheet's centre to the tape's


# ---------------------------------------------------------------------------------------------------------------------
# physics of the task: the arms of so101_sim with a sheet each; the simulated arm of so101.drive uses them, too


def load_model(tape_margin: float = TAPE_MARGIN_M, limp_sheet: bool = False) -> mujoco.MjModel:
    """The compiled scene with the tape laid tape_margin (m) outside the sheet's outline.

    With limp_sheet, spots below the fingertips carry their press, and fingertips resist twisting.
    """
    spec = load_spec((ASSETS / "paper_in_square.xml").read_text())
    if limp_sheet:  # the sheet's own weight rests on its whole area: friction on its centre and on its rotation
        friction_n = spec.pair("sheet_table").friction[0] * spec.body("sheet").mass * -spec.option.gravity[2]
        for joint, lever in (("sheet_x", 1.0), ("sheet_y", 1.0), ("sheet_yaw", SHEET_MEAN_RADIUS_M)):
            spec.joint(joint).frictionloss = friction_n * lever
    for finger in FINGERS:
        if limp_sheet:
            spec.pair(f"{finger}_finger_sheet").condim = 4
        else:
            spec.delete(spec.pair(f"{finger}_spot_table"))
            spec.delete(spec.geom(f"{finger}_spot_col"))
    spec.body("tape").pos = [*TAPE_CENTER_M, 0.0]
    half, width = SHEET_HALF_M + tape_margin, TAPE_WIDTH_M / 2
    for name, axis, sign in (("front", 0, 1), ("back", 0, -1), ("left", 1, 1), ("right", 1, -1)):
        geom = spec.geom(f"tape_{name}")
        pos, size = np.zeros(3), np.append(half + 2 * width, 0.0002)
        pos[axis], pos[2], size[axis] = sign * (half[axis] + width), 0.0002, width
        geom.pos, geom.size = pos, size
    return spec.compile()


def make_arms(num_arms: int, task: Task, ranges: DomainRandomization, num_threads: int | None = None) -> Arms:
    """The physics of N arms with their sheets."""
    home_qpos = [*HOME_RAD, *TAPE_CENTER_M, SHEET_HALF_THICKNESS_M, 0.0]
    factors = {ranges.sheet_friction_factor, ranges.finger_friction_factor}
    fields = ["pair_friction"] if ranges.sheet_friction or ranges.finger_friction or factors != {(1.0, 1.0)} else []
    fields += ["body_mass", "body_inertia"] if ranges.sheet_mass else []
    fields += ["geom_pos", "dof_frictionloss"] if ranges.limp_sheet else []
    model = load_model(task.tape_margin, ranges.limp_sheet)
    return Arms(model, home_qpos, num_arms, ranges, task.firmware_p, tuple(fields), num_threads)


def draw_start(rng: np.random.Generator, ranges: DomainRandomization, tape_margin: float) -> tuple[float, float, float]:
    """Start pose x, y (m), yaw (rad) of a sheet that is not already inside the tape."""
    for _ in range(10_000):
        radius, direction = rng.uniform(*ranges.sheet_distance_m), rng.uniform(-np.pi, np.pi)
        yaw = rng.uniform(-ranges.sheet_yaw_rad, ranges.sheet_yaw_rad)
        xy = TAPE_CENTER_M + radius * np.array([np.cos(direction), np.sin(direction)])
        if not sheet_inside(xy[None], np.array([yaw]), tape_margin)[0]:
            return xy[0], xy[1], yaw
    raise SO101Error(
        f"sheet_distance_m {ranges.sheet_distance_m}: all these starts lie inside the tape already; start farther out, "
        f"or lower tape_margin {tape_margin}"
    )


def start_qpos(arms: Arms, pose: tuple[float, float, float]) -> np.ndarray:
    """Positions (10,) of an arm at home with its sheet at pose x, y (m), yaw (rad)."""
    qpos = arms.home["qpos"].copy()
    qpos[[6, 7, 9]] = pose
    return qpos


def resample_sheet(arms: Arms, i: int, rng: np.random.Generator, ranges: DomainRandomization) -> None:
    """Draw friction and mass of the sheet of arm i."""
    model, fields, scale, factor = arms.model, arms.fields, np.ones(2), 1.0
    if "pair_friction" in fields:
        scale = rng.uniform(-1.0, 1.0, 2) * (ranges.sheet_friction, ranges.finger_friction) + 1.0
        scale *= [log_uniform(rng, each) for each in (ranges.sheet_friction_factor, ranges.finger_friction_factor)]
        # by name: the compiler sorts pairs, so their order in the file means nothing
        table, fingers = ["sheet_table"], [f"{finger}_finger_sheet" for finger in FINGERS]
        if ranges.limp_sheet:
            table += [f"{finger}_spot_table" for finger in FINGERS]
        nominal = [model.pair(names[0]).friction[0] for names in (table, fingers)]
        scale[1] = max(scale[1], ranges.least_grip * scale[0] * nominal[0] / nominal[1])
        for names, change in zip((table, fingers), scale):
            pairs = [model.pair(name).id for name in names]
            fields["pair_friction"][i, pairs, :3] = model.pair_friction[pairs, :3] * change
    if "body_mass" in fields:
        factor, sheet = 1.0 + ranges.sheet_mass * rng.uniform(-1.0, 1.0), model.body("sheet").id
        fields["body_mass"][i, sheet] = model.body_mass[sheet] * factor
        fields["body_inertia"][i, sheet] = model.body_inertia[sheet] * factor
    if ranges.limp_sheet:
        fields["dof_frictionloss"][i, ACT_DIM:] = model.dof_frictionloss[ACT_DIM:] * scale[0] * factor
        fields["geom_pos"][i] = model.geom_pos  # the spots drawn back


def support_presses(arms: Arms, mask: np.ndarray) -> None:
    """Put a spot below each fingertip that presses on its limp sheet, for the arms in mask, (N,) bool.

    The spot reaches below the sheet, so it carries the whole press and the corners nothing. A spot whose finger does
    not press is drawn back. Without a limp sheet there are no spots.
    """
    if "geom_pos" not in arms.fields:
        return
    for finger in FINGERS:
        tip = arms.geom_xpos_m[:, arms.model.geom(f"{finger}_finger_col").id]
        below = in_axes(tip[:, :2], arms.qpos[:, 6:8], arms.qpos[:, 9])
        gap = tip[:, 2] - FINGER_RADIUS_M - arms.qpos[:, 8] - SHEET_HALF_THICKNESS_M
        pressing = (np.abs(below) <= SHEET_HALF_M).all(1) & (gap < SPOT_GAP_M)
        spot = arms.fields["geom_pos"][:, arms.model.geom(f"{finger}_spot_col").id]
        spot[mask, :2] = below[mask]
        spot[mask, 2] = SPOT_RADIUS_M - SHEET_HALF_THICKNESS_M + np.where(pressing, -SPOT_GAP_M, 0.01)[mask]


def scene_of(arms: Arms) -> Scene:
    """The true state now."""
    sheet = arms.qpos[:, 6:8]
    return Scene(arms.tip_m, sheet, wrap_angle(arms.qpos[:, 9]), np.hypot(*(sheet - TAPE_CENTER_M).T))


# ---------------------------------------------------------------------------------------------------------------------
# the environment


class SO101ResidualVectorEnv(ArmVectorEnv):
    """N arms at the task, stepped together; the residual corrects a base policy.

    Observation (N, 25) float32, the parts of OBSERVATION: joint positions (6, rad), joint velocities (6, rad/s), sheet
    position (3, m), sheet quaternion (4, wxyz), tape centre - sheet centre (3, m), gripper tip position (3, m).
    Action (N, 6) float32 in [-1, 1], the residual: `delta = base + alpha * act_scale * clip(action, -1, 1)` rad is
    added to the last commanded joint targets (JOINTS order).
    Reward: the sum of info["reward_terms"], a dict of (N,) arrays. With shaping_gamma, which PPO needs to learn in few
    steps, they include "shaping", which is not counted in the return of info["episode_summary"].
    info: is_success, distance_m, yaw_error_rad, non_finite, out_of_reach, residual_magnitude (N,) each; reward_terms;
    episode_summary of the episode so far: return (unshaped), length, residual_magnitude (mean), (N,) each; with a base
    policy base_delta_rad (N, 6); with pixels full_observation (N, 25).

    Args:
        num_envs: number of environments N.
        base_policy: the policy to correct: an instance of so101.base.BasePolicy, or its spec string, as "jacobian";
            None is zero. It is closed with the environment.
        task: settings of the task; any field of Task can also be given by name, which wins: `tape_margin=0.02`.
        randomization: ranges to use instead of those that the task's flags stand for.
        max_episode_steps: control steps until truncation.
        shaping_gamma: discount of the potential-based shaping, the learner's own; None: no shaping.
        observe: "state"; or "pixels": the observation is a dict of what a real arm has, pixels_CAMERA (N, H, W, 3)
            uint8 for each camera, and state (N, 15) float32, the parts of MEASURED.
        observe_base: append the base policy's joint deltas (6, rad) to the observation, or to its state.
        visuals: ranges of visual randomisation; None: those of PaperVisuals if the task asks for it.
        num_threads: physics threads; None uses every core, at most one per environment. No result depends on it.
        options: cameras, image_size, render_mode, width, height, camera_name and autoreset_mode of ArmVectorEnv, and
            fields of Task.

    Raises:
        SO101Error: an argument outside its range; TypeError: an unknown argument; in step also BasePolicyError: joint
            deltas of a base policy that have another shape, are not finite, or exceed every joint's range.
    """

    parts: Mapping[str, Part] = OBSERVATION  # a subclass that observes more adds to them
    metrics = ("distance_m", "yaw_error_rad")  # values of info that evaluations report, at the start and at the end
    goal_xy_m = TAPE_CENTER_M
    _STATE = (*ArmVectorEnv._STATE, "_phi", "_streak", "_return", "_residual_sum", "_residual", "_base")

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
        visuals: VisualRandomization | None = None,
        num_threads: int | None = None,
        **options: Any,
    ):
        fields = {field.name for field in dataclasses.fields(task or Task())}
        settings = {name: options.pop(name) for name in [*options] if name in fields}
        self.task = dataclasses.replace(task or Task(), **settings)
        check_ranges(self.task, self.task.RANGES)
        require(num_envs >= 1, "num_envs", num_envs, "at least 1")
        require(num_threads is None or num_threads >= 1, "num_threads", num_threads, "at least 1")
        require(shaping_gamma is None or 0 <= shaping_gamma <= 1, "shaping_gamma", shaping_gamma, "in [0, 1], or None")
        require(observe in ("state", "pixels"), "observe", observe, "'state' or 'pixels'")
        self.base_policy = _usable(base_policy, num_envs)
        fits = self.base_policy is not None or not observe_base
        require(fits, "observe_base", observe_base, "False without a base policy")
        if self.base_policy is not None:
            self.base_policy.firmware_p = self.task.firmware_p
        self.shaping_gamma, self.observe_base = shaping_gamma, observe_base
        self.randomization = randomization or self.task.randomization()
        super().__init__(
            make_arms(num_envs, self.task, self.randomization, num_threads),
            max_episode_steps,
            extra_parts=extra_parts(self.task, observe_base),
            observe_pixels=observe == "pixels",
            measured=MEASURED,
            visuals=visuals or (PaperVisuals() if self.task.visual_randomization else None),
            **options,
        )
        self._phi = np.zeros(num_envs)  # shaping potential of the present state
        self._streak = np.zeros(num_envs, np.int64)  # consecutive steps with success
        self._return = np.zeros(num_envs)  # unshaped, of the episode so far
        self._residual_sum = np.zeros(num_envs)  # norms of the residuals of the episode so far
        self._residual = np.zeros((num_envs, ACT_DIM))  # residual of the last step, rad
        self._base = np.zeros((num_envs, ACT_DIM))  # with observe_base: base deltas for the present observation, rad
        self.base_time_s = 0.0  # wall time of the base policy, including its pictures

    @property
    def goal_half_m(self) -> np.ndarray:
        """Half sides of the tape's opening, x and y."""
        return SHEET_HALF_M + self.task.tape_margin

    # -- the task: what a subclass overrides

    def draw_start(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Start pose x, y (m), yaw (rad) of a sheet that is not already inside the tape."""
        return draw_start(rng, self.randomization, self.task.tape_margin)

    def observe(self, mask: np.ndarray, scene: Scene) -> np.ndarray:
        """Observations (N, 25), with sensor errors; rows that are not in mask, (N,) bool, may hold anything.

        A subclass that observes more appends its columns, and their Part to `parts`.
        """
        obs, yaw, arms = np.zeros((self.num_envs, OBS_DIM), np.float32), scene.sheet_yaw_rad, self.arms
        joints, velocities, sheet, tip = (obs[:, OBS[k]] for k in ("joint_pos", "joint_vel", "sheet_pos", "tip_pos"))
        joints[:] = arms.joints_rad
        velocities[:] = arms.joint_vel
        sheet[:] = arms.qpos[:, 6:9]
        tip[:] = arms.measured_tip_m
        if self.randomization.observation_noise:
            yaw, noise = yaw.copy(), np.zeros((self.num_envs, 19))
            for i in np.flatnonzero(mask):
                noise[i] = self.randomization.observation_noise * self._rngs[i].standard_normal(19)
            joints += NOISE_JOINT_RAD * noise[:, 0:6]
            velocities += NOISE_VELOCITY_RAD_S * noise[:, 6:12]
            sheet += NOISE_SHEET_M * noise[:, 12:15]
            tip += NOISE_TIP_M * noise[:, 15:18]
            yaw += NOISE_YAW_RAD * noise[:, 18]
        _complete(obs, yaw)
        if self.randomization.pose_dropout:
            hidden = self.lose_view(mask, self.randomization.pose_dropout)
            obs[hidden, SHEET_COLUMNS] = self._obs[hidden, SHEET_COLUMNS]
        return obs

    def command_targets(self, delta_rad: np.ndarray) -> np.ndarray:
        """Joint targets (N, 6), rad in encoder coordinates: the last ones plus delta, (N, 6), within the window."""
        return self.arms.limit(self.arms.command + delta_rad)

    def success(self, scene: Scene) -> np.ndarray:
        """Whether the goal is reached in this step, (N,) bool; SUCCESS_STEPS of these in a row end the episode."""
        return sheet_inside(scene.sheet_xy_m, scene.sheet_yaw_rad, self.task.tape_margin)

    def failure(self, scene: Scene) -> np.ndarray:
        """Whether the episode can no longer succeed, (N,) bool: the sheet is out of the arm's reach for good."""
        sheet = scene.sheet_xy_m
        far = np.hypot(sheet[:, 0] - PAN_AXIS_M[0], sheet[:, 1] - PAN_AXIS_M[1]) > SHEET_REACH_M
        if far.any():  # the centre is; is the whole sheet?
            axis = np.broadcast_to(PAN_AXIS_M, sheet.shape)
            far = distance_to_rectangle(axis, sheet, scene.sheet_yaw_rad, SHEET_HALF_M) > SHEET_REACH_M
        return far

    def reward_terms(
        self, scene: Scene, residual: np.ndarray, success: np.ndarray, failure: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The reward's terms by name, (N,) each, without the shaping: their sum is the return.

        Args:
            scene: at the end of the step.
            residual: the clipped action (N, 6).
            success, failure: whether the episode ends that way in this step, (N,) bool.
        """
        terms = {
            "distance": -2.0 * scene.sheet_distance_m,
            "yaw": -0.1 * np.abs(scene.sheet_yaw_rad),
            "time": np.full(self.num_envs, -0.01),
            "residual": -self.task.residual_penalty * np.square(residual).sum(1),
            "success": 10.0 * success,
            "failure": np.zeros(self.num_envs),
        }
        if failure.any():  # costs as much as waiting for the time-out in that state: pushing the sheet away never pays
            waiting = terms["distance"] + terms["yaw"] + terms["time"]
            terms["failure"] = failure * (self.max_episode_steps - self._steps) * waiting
        return terms

    def potential(self, scene: Scene) -> np.ndarray:
        """Shaping potential (N,), 0 at best: tip on the sheet, sheet at the tape's centre, no yaw.

        Any point of the sheet counts as on it. Pulling the tip to the sheet's centre hid the signal of the drag behind
        that of the tip's own motion, and learned more slowly.
        """
        tip, sheet, yaw = scene.tip_m, scene.sheet_xy_m, scene.sheet_yaw_rad
        aside = distance_to_rectangle(tip[:, :2], sheet, yaw, SHEET_HALF_M, SHAPING_INSET_M)
        reach = np.hypot(aside, np.maximum(tip[:, 2] - TIP_PRESSED_M, 0.0))
        if self.task.arrival_yaw_weight == 0.0:
            turned = SHAPING_YAW_M_PER_RAD * np.abs(yaw)
        else:
            turned = self.task.arrival_yaw_weight * np.abs(arrival_yaw(tip[:, :2], sheet, yaw))
        return -SHAPING_PER_M * (reach + scene.sheet_distance_m + turned)

    # -- a step

    def joint_targets(self, action: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Joint targets (N, 6), rad, for residuals (N, 6): here the residual corrects the base policy."""
        delta = (self.task.alpha * self.task.act_scale) * action
        if self.base_policy is not None:
            self._base_now = self._base.copy() if self.observe_base else self._base_delta(active)
            self._residual[active] = delta[active]
            delta += self._base_now
        return self.command_targets(delta)

    def judge(
        self, scene: Scene, action: np.ndarray, active: np.ndarray, broken: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Reward (N,), terminated (N,), and the info of a step; see ArmVectorEnv."""
        self._streak = (self._streak + active) * (self.success(scene) & ~broken)
        success = active & (self._streak >= SUCCESS_STEPS)
        failure = active & (broken | self.failure(scene))
        terminated = success | failure
        terms = self.reward_terms(scene, action, success, failure)
        unshaped, phi = sum(terms.values()), self.potential(scene)
        terms["shaping"] = np.zeros(self.num_envs)
        if self.shaping_gamma is not None:
            # zero at terminal states: only then does shaping leave the optimal policy unchanged (Ng et al. 1999)
            terms["shaping"] = self.shaping_gamma * (phi * ~terminated) - self._phi
        reward, self._phi = (unshaped + terms["shaping"]) * active, phi
        magnitude = np.sqrt(np.square(action).sum(1))
        self._return += unshaped * active
        self._residual_sum += magnitude * active
        results = {"is_success": success, "non_finite": broken, "out_of_reach": failure & ~broken}
        results |= {"residual_magnitude": magnitude, "reward_terms": terms}
        if self.base_policy is not None:
            results["base_delta_rad"] = self._base_now
        return reward, terminated, results

    def blank_results(self) -> dict[str, Any]:
        """The info of `judge` for episodes that have no steps yet."""
        n, nobody = self.num_envs, np.zeros(self.num_envs, bool)
        terms = [*self.reward_terms(self.scene(), np.zeros((n, ACT_DIM)), nobody, nobody), "shaping"]
        results: dict[str, Any] = {name: nobody.copy() for name in ("is_success", "non_finite", "out_of_reach")}
        results |= {"residual_magnitude": np.zeros(n), "reward_terms": {name: np.zeros(n) for name in terms}}
        if self.base_policy is not None:
            results["base_delta_rad"] = np.zeros((n, ACT_DIM))
        return results

    def describe(self, scene: Scene) -> dict[str, Any]:
        """The info that describes the state and the episode so far."""
        return {
            "distance_m": scene.sheet_distance_m,
            "yaw_error_rad": np.abs(scene.sheet_yaw_rad),
            "episode_summary": {
                "return": self._return.copy(),
                "length": self._steps.copy(),
                "residual_magnitude": self._residual_sum / np.maximum(self._steps, 1),
            },
        }

    # -- physics and the base policy

    def draw_qpos(self, rng: np.random.Generator) -> np.ndarray:
        """Start positions (10,) of an episode."""
        return start_qpos(self.arms, self.draw_start(rng))

    def resample(self, i: int, rng: np.random.Generator) -> None:
        """Draw what DomainRandomization describes for environment i."""
        resample_sheet(self.arms, i, rng, self.randomization)
        self.arms.resample(i, rng)

    def scene(self) -> Scene:
        """The true state now."""
        return scene_of(self.arms)

    def prepare_step(self, active: np.ndarray) -> None:
        """Support the presses on limp sheets."""
        support_presses(self.arms, active)

    def begin(self, ids: np.ndarray, scene: Scene) -> None:
        """Forget the last episodes of the environments ids."""
        for array in (self._streak, self._return, self._residual_sum, self._residual):
            array[ids] = 0
        self._phi[ids] = self.potential(scene)[ids]
        if self.base_policy is not None:
            mask = np.zeros(self.num_envs, bool)
            mask[ids] = True
            self.base_policy.reset(mask)

    def extend_observation(self, mask: np.ndarray) -> None:
        """With observe_base, append the base policy's joint deltas."""
        if self.observe_base:
            self._base[mask] = self._base_delta(mask)[mask]
            self._obs[mask, -ACT_DIM:] = self._base[mask]

    def _base_delta(self, mask: np.ndarray) -> np.ndarray:
        """The base policy's joint deltas (N, 6), rad, for the observations of the environments in mask, validated."""
        policy = self.base_policy
        if not mask.any():
            return np.zeros((self.num_envs, ACT_DIM))
        start = time.perf_counter()
        known = (self.full_observation, self.arms.command, self._residual, self.arms.load)
        pictures = {"cameras": policy.cameras, "render": self._current_images, "size": policy.image_size}
        seen = base_observation(*known, **pictures)
        base = policy.act(seen, mask)
        self.base_time_s += time.perf_counter() - start
        return valid_delta(policy, base, mask)

    # -- saving and closing

    def get_state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, including the base policy's memory."""
        memory = {} if self.base_policy is None else self.base_policy.memory
        return {**super().get_state(), "base_memory": {name: array.copy() for name, array in memory.items()}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where get_state was called. Raises SO101Error, and changes nothing, if it does not fit."""
        memory, own = state.get("base_memory"), {}
        if self.base_policy is not None:
            self.base_policy.reset(np.ones(self.num_envs, bool))  # now its memory has the names it should have
            own = self.base_policy.memory
        if not isinstance(memory, Mapping) or not all(is_like(memory.get(name), array) for name, array in own.items()):
            raise SO101Error("state of the environments: base_memory is not that of the base policy")
        super().set_state(state)
        if self.base_policy is not None:
            self.base_policy.memory = {name: array.copy() for name, array in memory.items()}

    def close_extras(self, **kwargs: Any) -> None:
        """Free the renderers and the base policy."""
        super().close_extras(**kwargs)
        if self.base_policy is not None:
            self.base_policy.close()


class SO101ResidualEnv(ArmEnv):
    """One arm: SO101ResidualVectorEnv with a batch of one; arguments, spaces and reward are described there."""

    vector_env = SO101ResidualVectorEnv  # a subclass of it makes the single environment of a variant of the task


def _usable(base_policy: Any, num_envs: int) -> Any:
    """The base policy, made of its spec string if it is one. Raises BasePolicyError if it cannot be used here."""
    if isinstance(base_policy, str):
        base_policy = load_env_creator(POLICY_LOADER)(base_policy)
    if base_policy is None:
        return None
    name = type(base_policy).__name__
    if missing := [each for each in BASE_POLICY_NAMES if not hasattr(base_policy, each)]:
        raise BasePolicyError(f"base policy {name} has no {missing[0]}: derive it from so101.base.BasePolicy")
    if num_envs > (base_policy.max_envs or num_envs):
        raise BasePolicyError(
            f"base policy {name} acts in {base_policy.max_envs} environment at a time, not in {num_envs}; to train on "
            "it, record it (python -m so101.record) and clone the recording (python -m so101.clone)"
        )
    return base_policy


gym.register(
    "SO101Residual-v0", max_episode_steps=MAX_EPISODE_STEPS,
    entry_point="so101_env:SO101ResidualEnv", vector_entry_point="so101_env:SO101ResidualVectorEnv",
)  # fmt: skip
