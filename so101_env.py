"""Paper in square: an SO-101 arm slides an A5 sheet over a table into a rectangle of red tape, in MuJoCo.

`SO101ResidualVectorEnv` steps a batch of simulations on MuJoCo's thread pool; `SO101ResidualEnv` is the same code with
a batch of one, so both give the same numbers from the same seeds and actions. World frame = base frame of the arm:
x straight ahead, y to the left, z up, origin at the base on the table. SI units throughout.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import gymnasium as gym
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

ASSET = Path(__file__).resolve().parent / "assets" / "paper_in_square.xml"
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
OBS_DIM, ACT_DIM = 25, 6
CONTROL_HZ = 30
MAX_EPISODE_STEPS = 400
SUCCESS_STEPS = 5  # consecutive control steps with all four corners inside

SHEET_HALF_M = np.array([0.074, 0.105])  # A5, x and y at yaw 0
SHEET_HALF_THICKNESS_M = 0.0005
TAPE_CENTER_M = np.array([0.27, 0.0])
TAPE_WIDTH_M = 0.019
# gripper down, its tip over the tape's centre, jaws almost closed: both fingertips 10 mm above the sheet's surface.
# wrist_roll .047 puts the jaws into the arm's plane of symmetry.
HOME_RAD = np.array([0.0, 0.4759, -0.2335, 1.3284, 0.0470, 0.0])
# A target stays this close to the one a free arm would need for the same motion. Times the servo gain it bounds the
# torque against an obstacle to 0.21 N m, and so the press of a fingertip to about 1 N: light enough to drag a sheet.
COMMAND_WINDOW_RAD = 0.012
MAX_DELTA_RAD = 6.3  # no joint's range is wider: a base policy that asks for more is wrong about its units
SHEET_REACH_M = 0.42  # stretched arm, tip on the table, from the shoulder_pan axis
PAN_AXIS_M = np.array([0.0388353, 0.0])

# potential of the shaping term, per metre: tip-to-sheet, sheet-to-tape, and radians of yaw counted as metres
SHAPING_PER_M, SHAPING_YAW_M_PER_RAD = 100.0, 0.05
# A sheet that is dragged by a point beside its centre turns: rad per m of that lever across the way, and m of the way.
# Fitted to drags of the scripted pusher.
TURN_RAD_PER_M2 = 39.0
SHAPING_INSET_M = 0.01  # the tip counts as over the sheet this far inside its edges
TIP_PRESSED_M = 0.0073  # height of the gripper tip when the fingertips touch the sheet
# one standard deviation of `DomainRandomization.observation_noise = 1`
NOISE_JOINT_RAD, NOISE_VELOCITY_RAD_S, NOISE_TIP_M, NOISE_SHEET_M, NOISE_YAW_RAD = 0.003, 0.05, 0.001, 0.002, 0.01

REWARD_TERMS = ("distance", "yaw", "time", "residual", "success", "failure", "shaping")


@dataclasses.dataclass(frozen=True)
class DomainRandomization:
    """What is drawn anew for every episode. A fraction f means uniform in nominal x [1 - f, 1 + f]."""

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
    observation_noise: float = 0.0
    """Gaussian noise on the observation, in units of the NOISE_* constants"""

    @classmethod
    def nominal(cls) -> DomainRandomization:
        """Nominal physics; only the sheet's start pose is drawn, since that is the task itself."""
        return cls(sheet_friction=0.0, finger_friction=0.0)

    @classmethod
    def full(cls) -> DomainRandomization:
        """Everything on: also mass, servo gain and damping, latency, joint offsets and observation noise."""
        return cls(
            sheet_mass=0.10,
            servo_gain=0.15,
            servo_damping=0.15,
            latency_steps=2,
            joint_offset_rad=float(np.deg2rad(1.0)),
            observation_noise=1.0,
        )


class BasePolicyError(ValueError):
    """A base policy that cannot act, or acts in a way that no arm can follow. It ends the run."""


class BasePolicy(Protocol):
    """What the residual corrects. A policy that cannot act raises BasePolicyError; it never returns zeros instead."""

    fingerprint: str  # hash of its weights; empty if it has none
    memory: dict[str, np.ndarray]  # all that it remembers, a row per environment; empty if it remembers nothing

    def reset(self, mask: np.ndarray) -> None:
        """Forget the episodes of the environments in mask, (N,) bool."""

    def act(self, obs: np.ndarray, command: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad, (N, 6), for observations (N, 25) and the last commanded joint targets (N, 6), rad.

        Called once per control step of the environments in mask, (N,) bool. Answers and memory of the others: the
        former are not used, the latter must stay.
        """

    def close(self) -> None:
        """Release what the policy holds."""


# ---------------------------------------------------------------------------------------------------------------------
# the task as pure functions on arrays


def wrap_angle(angle_rad: np.ndarray) -> np.ndarray:
    """Angle in [-pi, pi)."""
    return (angle_rad + np.pi) % (2 * np.pi) - np.pi


def sheet_inside(sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray, tape_margin_m: float) -> np.ndarray:
    """Whether all four corners lie inside the tape's opening, (N,) bool, for centres (N, 2) and yaws (N,)."""
    c, s = np.abs(np.cos(sheet_yaw_rad)), np.abs(np.sin(sheet_yaw_rad))
    # half sides of the sheet's axis-aligned bounding box: its corners touch that box on all four sides
    half_box = c[:, None] * SHEET_HALF_M + s[:, None] * SHEET_HALF_M[::-1]
    return (np.abs(sheet_xy_m - TAPE_CENTER_M) + half_box <= SHEET_HALF_M + tape_margin_m).all(1)


def distance_to_sheet(
    point_xy_m: np.ndarray, sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray, inset_m: float = 0.0
) -> np.ndarray:
    """Horizontal distance of points (N, 2) to the nearest point at least inset_m inside the sheets' edges, (N,)."""
    c, s = np.cos(sheet_yaw_rad), np.sin(sheet_yaw_rad)
    d = point_xy_m - sheet_xy_m
    out_x = np.maximum(np.abs(c * d[:, 0] + s * d[:, 1]) - SHEET_HALF_M[0] + inset_m, 0.0)
    out_y = np.maximum(np.abs(c * d[:, 1] - s * d[:, 0]) - SHEET_HALF_M[1] + inset_m, 0.0)
    return np.hypot(out_x, out_y)


def sheet_distance(sheet_xy_m: np.ndarray) -> np.ndarray:
    """Distance of sheet centres (N, 2) from the tape's centre, (N,)."""
    return np.hypot(sheet_xy_m[:, 0] - TAPE_CENTER_M[0], sheet_xy_m[:, 1] - TAPE_CENTER_M[1])


def arrival_yaw(tip_xy_m: np.ndarray, sheet_xy_m: np.ndarray, sheet_yaw_rad: np.ndarray) -> np.ndarray:
    """Yaw (N,) that sheets would about have, were they pressed at the tips (N, 2) and dragged straight to the tape."""
    lever, way = tip_xy_m - sheet_xy_m, TAPE_CENTER_M - sheet_xy_m
    return sheet_yaw_rad + TURN_RAD_PER_M2 * (lever[:, 0] * way[:, 1] - lever[:, 1] * way[:, 0])


def potential(
    tip_m: np.ndarray,
    sheet_xy_m: np.ndarray,
    sheet_yaw_rad: np.ndarray,
    sheet_distance_m: np.ndarray,
    arrival_yaw_weight: float = 0.0,
) -> np.ndarray:
    """Shaping potential (N,), 0 at best: tip (N, 3) on the sheet, sheet (N, 2) at the tape's centre, without yaw.

    Any point of the sheet is as good as any other: pulling the tip to the sheet's centre drowned the signal of the drag
    in that of the tip's own motion and learned more slowly. The yaw is in [-pi, pi).
    """
    aside = distance_to_sheet(tip_m[:, :2], sheet_xy_m, sheet_yaw_rad, SHAPING_INSET_M)
    reach = np.hypot(aside, np.maximum(tip_m[:, 2] - TIP_PRESSED_M, 0.0))
    if arrival_yaw_weight == 0.0:
        turned = SHAPING_YAW_M_PER_RAD * np.abs(sheet_yaw_rad)
    else:
        turned = arrival_yaw_weight * np.abs(arrival_yaw(tip_m[:, :2], sheet_xy_m, sheet_yaw_rad))
    return -SHAPING_PER_M * (reach + sheet_distance_m + turned)


# ---------------------------------------------------------------------------------------------------------------------
# the batched simulation


class SO101ResidualVectorEnv(gym.vector.VectorEnv):
    """N arms at the same task, stepped together.

    Observation (N, 25) float32: joint positions (6, rad), joint velocities (6, rad/s), sheet position (3, m), sheet
    quaternion (4, wxyz), tape centre - sheet centre (3, m), gripper tip position (3, m).
    Action (N, 6) float32 in [-1, 1], the residual: `delta = base + alpha * act_scale * clip(action, -1, 1)` rad is
    added to the last commanded joint targets (JOINTS order).
    Reward: see `info["reward_terms"]`, a dict of (N,) arrays that add up to it; all but "shaping" make up the return in
    `info["final_info"]["episode"]["r"]`.

    Args:
        num_envs: number of environments N.
        base_policy: the policy to correct (see BasePolicy); None is zero.
        alpha: share of act_scale that the residual commands, in [0, 1].
        act_scale: rad per control step of a full residual at alpha 1.
        residual_penalty: reward per squared norm of the residual.
        randomize: False is the nominal physics; the sheet's start pose is drawn either way.
        render_mode: None or "rgb_array".
        tape_margin: m between sheet and tape on every side; 0.04 is standard, 0.02 precise.
        max_episode_steps: control steps until truncation.
        shaping_gamma: discount of the potential-based shaping; None switches the shaping off.
        randomization: ranges, used where randomize is True.
        num_threads: physics threads; None uses every core, at most one per environment. No result depends on it.
        autoreset_mode: SAME_STEP, or DISABLED: then a finished environment rests, unsimulated, until it is reset.
        arrival_yaw_weight: in the shaping, metres per radian of the yaw that a straight drag would end with (see
            `arrival_yaw`); 0 counts the present yaw.
        observe_base: append the base policy's joint deltas (6, rad) to the observation, which then has 31 numbers.

    Raises:
        ValueError: an argument outside its range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(
        self,
        num_envs: int = 8,
        base_policy: BasePolicy | None = None,
        alpha: float = 0.7,
        act_scale: float = 0.02,
        residual_penalty: float = 0.001,
        randomize: bool = True,
        render_mode: str | None = None,
        tape_margin: float = 0.04,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        shaping_gamma: float | None = 1.0,
        randomization: DomainRandomization | None = None,
        num_threads: int | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.SAME_STEP,
        observe_base: bool = False,
        arrival_yaw_weight: float = 0.0,
    ):
        _check(num_envs >= 1, "num_envs", num_envs, "at least 1")
        _check(0.0 <= alpha <= 1.0, "alpha", alpha, "in [0, 1]")
        _check(act_scale > 0.0, "act_scale", act_scale, "positive")
        _check(residual_penalty >= 0.0, "residual_penalty", residual_penalty, "at least 0")
        _check(0.0 < tape_margin <= 0.1, "tape_margin", tape_margin, "in (0, 0.1] m")
        _check(max_episode_steps >= 1, "max_episode_steps", max_episode_steps, "at least 1")
        _check(num_threads is None or num_threads >= 1, "num_threads", num_threads, "at least 1")
        _check(render_mode in (None, "rgb_array"), "render_mode", render_mode, "None or 'rgb_array'")
        _check(autoreset_mode != AutoresetMode.NEXT_STEP, "autoreset_mode", autoreset_mode, "SAME_STEP or DISABLED")
        _check(arrival_yaw_weight >= 0.0, "arrival_yaw_weight", arrival_yaw_weight, "at least 0")
        _check(base_policy is not None or not observe_base, "observe_base", observe_base, "False without a base policy")
        self.num_envs, self.render_mode = num_envs, render_mode
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}
        self.alpha, self.act_scale, self.residual_penalty = alpha, act_scale, residual_penalty
        self.tape_margin, self.max_episode_steps, self.shaping_gamma = tape_margin, max_episode_steps, shaping_gamma
        self.base_policy, self.observe_base, self.arrival_yaw_weight = base_policy, observe_base, arrival_yaw_weight
        self.randomization = (randomization or DomainRandomization()) if randomize else DomainRandomization.nominal()
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (OBS_DIM + ACT_DIM * observe_base,), np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (ACT_DIM,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        self.model = load_model(tape_margin)
        threads = min(num_threads or os.cpu_count() or 1, num_envs)
        # one state row per environment (warm start included), per-environment copies of the fields drawn below;
        # persistent: a step goes on from the quantities that were made current after the last one
        self.batch = mujoco.batch.Batch(self.model, nsim=num_envs, nthread=threads, persistent=True)
        self._substeps = round(1 / CONTROL_HZ / self.model.opt.timestep)
        self._qpos, self._qvel, self._ctrl = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self._tip = self.batch.bind("site_xpos")[:, self.model.site("gripperframe").id]
        self._gravity = self.batch.bind("qfrc_bias")
        self._stage = mujoco.mjtStage.mjSTAGE_VEL.value  # makes positions and gravity torques current after a step
        self._limits = self.model.actuator_ctrlrange.T.copy()
        self._home = self._home_state()
        fields = ["pair_friction"] if randomize else []
        fields += ["body_mass", "body_inertia"] if self.randomization.sheet_mass else []
        fields += ["actuator_gainprm", "actuator_biasprm"] if self.randomization.servo_gain else []
        fields += ["dof_damping"] if self.randomization.servo_damping else []
        self._fields = {name: self.batch.expand(name) for name in fields}
        # of every joint, (N, 6), as drawn: views, so that they follow each draw
        self._gain = self._parameter("actuator_gainprm")[:, :, 0]
        self._damping = self._parameter("dof_damping")[:, :ACT_DIM]

        n = num_envs
        self._rngs: list[np.random.Generator] = [None] * n
        # all below, the random generators, the state rows and the drawn fields are the whole state: see get_state
        self._command = np.zeros((n, ACT_DIM))  # last commanded joint targets, rad, in encoder coordinates
        self._delayed = np.zeros((n, self.randomization.latency_steps + 1, ACT_DIM))  # last commands, newest first
        self._latency = np.zeros(n, np.int64)
        self._joint_offset = np.zeros((n, ACT_DIM))  # encoder minus truth, rad
        self._phi = np.zeros(n)
        self._steps = np.zeros(n, np.int64)
        self._streak = np.zeros(n, np.int64)
        self._return = np.zeros(n)
        self._residual_sum = np.zeros(n)
        self._done = np.ones(n, bool)
        self._obs = np.zeros(self.observation_space.shape, np.float32)
        self._base = np.zeros((n, ACT_DIM))  # with observe_base: the base policy's deltas for self._obs, rad
        self._renderer: mujoco.Renderer | None = None

    # -- Gymnasium API

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: environment i gets seed + i, or seed[i] of a list; None goes on with the generators as they are.
            options: {"reset_mask": (N,) bool} resets only those environments; {"qpos": (N, 10)} starts them at rest at
                these positions instead of drawing the sheet's pose.

        Returns:
            Observations (N, 25) and an empty dict.
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
        return self._obs.copy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One control step, 1/30 s.

        Args:
            actions: residuals (N, 6), clipped to [-1, 1].

        Returns:
            obs (N, 25), reward (N,), terminated (N,), truncated (N,) and info: is_success, distance_m, yaw_error_rad,
            non_finite, out_of_reach, residual_magnitude (N,) each, reward_terms, and with a base policy base_delta_rad
            (N, 6). With SAME_STEP autoreset, obs of a finished environment is the next episode's first, and info has
            final_obs (N, 25) and final_info (the keys above, and episode: r and l), valid where _final_obs and
            _final_info are True.

        Raises:
            ValueError: actions of another shape, or not finite.
            BasePolicyError: a base policy's joint deltas likewise, or beyond every joint's range.
            RuntimeError: DISABLED autoreset and every environment has finished, or step before reset.
        """
        active = ~self._done
        everyone = bool(active.all())
        if not everyone and not active.any():
            raise RuntimeError("step() needs a running episode: call reset() first")
        rows = slice(None) if everyone else active
        residual = np.asarray(actions, np.float64)
        if residual.shape != (self.num_envs, ACT_DIM) or not np.isfinite(residual).all():
            raise ValueError(f"actions must be finite, of shape ({self.num_envs}, {ACT_DIM}); got {residual.shape}")
        residual = np.minimum(np.maximum(residual, -1.0), 1.0)  # np.clip takes three times as long on arrays this small
        delta = (self.alpha * self.act_scale) * residual
        base = None
        if self.base_policy is not None:
            base = self._base.copy() if self.observe_base else self._base_delta(active)
            delta += base

        # the targets of a free arm in this motion: what it measures, plus its lag under gravity, damping and latency
        load = self._gravity[:, :ACT_DIM] + self._damping * self._qvel[:, :ACT_DIM]
        holding = self._qpos[:, :ACT_DIM] + self._joint_offset + load / self._gain
        if self.randomization.latency_steps:
            holding += self._qvel[:, :ACT_DIM] * (self._latency / CONTROL_HZ)[:, None]
        lower = np.maximum(self._limits[0], holding - COMMAND_WINDOW_RAD)
        upper = np.minimum(self._limits[1], holding + COMMAND_WINDOW_RAD)
        command = np.minimum(np.maximum(self._command + delta, lower), upper)
        self._command[rows] = command[rows]
        if self.randomization.latency_steps:
            self._delayed[rows] = np.concatenate([command[:, None], self._delayed[:, :-1]], axis=1)[rows]
            command = self._delayed[np.arange(self.num_envs), self._latency]
        self._ctrl[rows] = (command - self._joint_offset)[rows]
        self.batch.step(None if everyone else np.flatnonzero(active), nstep=self._substeps, stage=self._stage)

        broken = active & ~np.isfinite(self.batch.state).all(1)
        if broken.any():  # such an episode ends here and is named; the numbers it reports are those of a fresh arm
            self._qpos[broken], self._qvel[broken] = self._home["qpos"], 0.0
            self.batch.forward(np.flatnonzero(broken), stage=self._stage)
        sheet, yaw = self._qpos[:, 6:8], wrap_angle(self._qpos[:, 9])
        self._observe(active, yaw)
        self._steps += active
        inside = sheet_inside(sheet, yaw, self.tape_margin) & ~broken
        self._streak = (self._streak + active) * inside
        success = active & (self._streak >= SUCCESS_STEPS)
        far = np.hypot(sheet[:, 0] - PAN_AXIS_M[0], sheet[:, 1] - PAN_AXIS_M[1]) > SHEET_REACH_M
        if far.any():  # the centre is; is all of the sheet?
            far = distance_to_sheet(np.broadcast_to(PAN_AXIS_M, (self.num_envs, 2)), sheet, yaw) > SHEET_REACH_M
        failure = active & (broken | far)
        terminated = success | failure
        truncated = active & (self._steps >= self.max_episode_steps) & ~terminated

        distance, yaw_error, square = sheet_distance(sheet), np.abs(yaw), np.square(residual).sum(1)
        rows_of_terms = np.zeros((len(REWARD_TERMS), self.num_envs))
        terms = dict(zip(REWARD_TERMS, rows_of_terms))
        terms["distance"][:] = -2.0 * distance
        terms["yaw"][:] = -0.1 * yaw_error
        terms["time"][:] = -0.01
        terms["residual"][:] = -self.residual_penalty * square
        terms["success"][:] = 10.0 * success
        if failure.any():  # costs what waiting for the time-out in that state would: pushing the sheet away never pays
            waiting = terms["distance"] + terms["yaw"] + terms["time"]
            terms["failure"][:] = failure * (self.max_episode_steps - self._steps) * waiting
        unshaped = rows_of_terms.sum(0)
        phi = potential(self._tip, sheet, yaw, distance, self.arrival_yaw_weight)
        if self.shaping_gamma is not None:
            # zero at terminal states: only then does shaping leave the best policy as it is (Ng et al. 1999)
            terms["shaping"][:] = self.shaping_gamma * (phi * ~terminated) - self._phi
        self._phi = phi
        reward = (unshaped + terms["shaping"]) * active
        magnitude = np.sqrt(square)
        self._return[rows] += unshaped[rows]
        self._residual_sum[rows] += magnitude[rows]

        info: dict[str, Any] = {
            "is_success": success,
            "distance_m": distance,
            "yaw_error_rad": yaw_error,
            "non_finite": broken,
            "out_of_reach": failure & ~broken,
            "residual_magnitude": magnitude,
            "reward_terms": terms,
        }
        if base is not None:
            info["base_delta_rad"] = base
        finished = terminated | truncated
        self._done |= finished
        if finished.any():
            episode = {"r": self._return.copy(), "l": self._steps.copy()}
            episode["residual_magnitude"] = self._residual_sum / np.maximum(self._steps, 1)
            if self.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
                info["final_obs"], info["_final_obs"] = self._obs.copy(), finished
                info["final_info"] = {**info, "episode": episode}
                info["_final_info"] = finished
                self._start_episodes(np.flatnonzero(finished))
            else:
                info["episode"], info["_episode"] = episode, finished
        return self._obs.copy(), reward, terminated, truncated, info

    @property
    def command(self) -> np.ndarray:
        """Copy of the last commanded joint targets (N, 6), rad, as the encoders count."""
        return self._command.copy()

    @property
    def qpos(self) -> np.ndarray:
        """Copy of the generalised positions (N, 10): joints (6, rad), sheet x, y, z (m) and yaw (rad)."""
        return self._qpos.copy()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """RGB frames (480, 640, 3) uint8 of all environments; None without a render mode."""
        if self.render_mode is None:
            return None
        return tuple(self.render_state(qpos) for qpos in self._qpos)

    def render_state(self, qpos: np.ndarray, camera: str | int = -1) -> np.ndarray:
        """The RGB frame (480, 640, 3) uint8 of positions (10,); camera "top", "wrist", or -1 for the free camera.

        Raises RuntimeError where the machine cannot render off screen.
        """
        if self._renderer is None:
            self._renderer = offscreen_renderer(self.model)
            self._render_data = mujoco.MjData(self.model)
        self._render_data.qpos[:] = qpos
        mujoco.mj_forward(self.model, self._render_data)
        self._renderer.update_scene(self._render_data, camera)
        return self._renderer.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Free the renderer and the base policy."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self.base_policy is not None:
            self.base_policy.close()

    # -- saving and restoring

    _STATE = ("_command", "_delayed", "_latency", "_joint_offset", "_phi", "_steps", "_streak", "_return",
              "_residual_sum", "_done", "_obs", "_base")  # fmt: skip

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

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue, to the bit, where get_state was called. Raises ValueError for another number of environments."""
        if state["batch"].shape != self.batch.state.shape:
            raise ValueError(f"state of {len(state['batch'])} environments does not fit {self.num_envs}")
        self.batch.state[:] = state["batch"]
        for name, array in self._fields.items():
            array[:] = state["fields"][name]
        if self.randomization.sheet_mass:
            self.batch.set_const()
        for i, rng_state in enumerate(state["rngs"]):
            if rng_state is not None:
                self._rngs[i] = np.random.Generator(np.random.PCG64())
                self._rngs[i].bit_generator.state = rng_state
        for name in self._STATE:
            getattr(self, name)[...] = state[name]
        if self.base_policy is not None:
            self.base_policy.memory = {name: array.copy() for name, array in state["base_memory"].items()}
        self.batch.forward(stage=self._stage)

    # -- internals

    def _parameter(self, name: str) -> np.ndarray:
        """A field of the model with a row per environment: the drawn copies, or the nominal one again and again."""
        nominal = getattr(self.model, name)
        return self._fields.get(name, np.broadcast_to(nominal, (self.num_envs, *nominal.shape)))

    def _base_delta(self, mask: np.ndarray) -> np.ndarray:
        """The base policy's joint deltas (N, 6) in rad for the observations of the environments in mask, checked."""
        base = np.asarray(self.base_policy.act(self._obs[:, :OBS_DIM].copy(), self._command.copy(), mask), np.float64)
        name, expected = type(self.base_policy).__name__, (self.num_envs, ACT_DIM)
        if base.shape != expected or not np.isfinite(base).all():
            raise BasePolicyError(f"base policy {name}: act() must return finite {expected}, got {base.shape}")
        largest = float(np.abs(base[mask]).max())
        if largest > MAX_DELTA_RAD:
            raise BasePolicyError(
                f"base policy {name}: asks for a joint to move by {largest:.1f} rad in one step, at most "
                f"{MAX_DELTA_RAD:.1f} is within reach; are its actions in degrees?"
            )
        return base

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
        """Draw and start new episodes in the environments ids, each from its own generator; qpos as in reset."""
        ranges, model = self.randomization, self.model
        for i in ids:
            rng = self._rngs[i]
            x, y, yaw = self._draw_sheet_pose(rng)
            self._qpos[i] = self._home["qpos"]
            self._qpos[i, 6:8], self._qpos[i, 9] = (x, y), yaw
            if qpos is not None:
                self._qpos[i] = qpos[i]
            if "pair_friction" in self._fields:
                scale = rng.uniform(-1.0, 1.0, 2) * (ranges.sheet_friction, ranges.finger_friction) + 1.0
                # by name: the compiler sorts pairs, so file order means nothing
                for name, factor in zip(("sheet_table", "fixed_finger_sheet", "moving_finger_sheet"), scale[[0, 1, 1]]):
                    pair = model.pair(name).id
                    self._fields["pair_friction"][i, pair, :2] = model.pair_friction[pair, :2] * factor
            if "body_mass" in self._fields:
                factor, sheet = 1.0 + ranges.sheet_mass * rng.uniform(-1.0, 1.0), model.body("sheet").id
                self._fields["body_mass"][i, sheet] = model.body_mass[sheet] * factor
                self._fields["body_inertia"][i, sheet] = model.body_inertia[sheet] * factor
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
            self._ctrl[i] = HOME_RAD + self._home["torque"] / self._gain[i]
        if "body_mass" in self._fields:
            self.batch.set_const(ids)
        self._qvel[ids] = 0.0
        self.batch.bind("time")[ids] = 0.0
        self.batch.bind("qacc_warmstart")[ids] = self._home["warmstart"]
        self.batch.forward(ids, stage=self._stage)
        if qpos is not None:
            self._ctrl[ids] = self._qpos[ids, :ACT_DIM] + self._gravity[ids, :ACT_DIM] / self._gain[ids]
        self._command[ids] = self._ctrl[ids] + self._joint_offset[ids]
        self._delayed[ids] = self._command[ids][:, None]
        self._steps[ids] = self._streak[ids] = 0
        self._return[ids] = self._residual_sum[ids] = 0.0
        self._done[ids] = False
        sheet, yaw = self._qpos[:, 6:8], wrap_angle(self._qpos[:, 9])
        self._phi[ids] = potential(self._tip, sheet, yaw, sheet_distance(sheet), self.arrival_yaw_weight)[ids]
        mask = np.zeros(self.num_envs, bool)
        mask[ids] = True
        if self.base_policy is not None:
            self.base_policy.reset(mask)
        self._observe(mask, yaw)

    def _draw_sheet_pose(self, rng: np.random.Generator) -> tuple[float, float, float]:
        """Start pose x, y (m), yaw (rad) of a sheet that is not already inside the tape."""
        ranges = self.randomization
        while True:
            radius, direction = rng.uniform(*ranges.sheet_distance_m), rng.uniform(-np.pi, np.pi)
            yaw = rng.uniform(-ranges.sheet_yaw_rad, ranges.sheet_yaw_rad)
            xy = TAPE_CENTER_M + radius * np.array([np.cos(direction), np.sin(direction)])
            if not sheet_inside(xy[None], np.array([yaw]), self.tape_margin)[0]:
                return xy[0], xy[1], yaw

    def _observe(self, mask: np.ndarray, yaw: np.ndarray) -> None:
        """Write the observations of the environments in mask from the state after the last substep, given all yaws."""
        everyone, qpos = mask.all(), self._qpos
        obs = self._obs if everyone else np.zeros_like(self._obs)
        obs[:, 0:6] = qpos[:, :6] + self._joint_offset
        obs[:, 6:12] = self._qvel[:, :6]
        obs[:, 12:15] = qpos[:, 6:9]
        obs[:, 22:25] = self._tip
        if self.randomization.joint_offset_rad:
            # a real arm computes its tip from the encoders: to first order, the Jacobian carries their error over
            site = self.model.site("gripperframe")
            jacobian, _ = self.batch.jac(int(site.bodyid[0]), self._tip)
            obs[:, 22:25] += np.einsum("nij,nj->ni", jacobian[:, :, :ACT_DIM], self._joint_offset)
        if self.randomization.observation_noise:
            yaw = yaw.copy()
            for i in np.flatnonzero(mask):
                noise = self.randomization.observation_noise * self._rngs[i].standard_normal(19)
                obs[i, 0:6] += NOISE_JOINT_RAD * noise[0:6]
                obs[i, 6:12] += NOISE_VELOCITY_RAD_S * noise[6:12]
                obs[i, 12:15] += NOISE_SHEET_M * noise[12:15]
                obs[i, 22:25] += NOISE_TIP_M * noise[15:18]
                yaw[i] += NOISE_YAW_RAD * noise[18]
        obs[:, 15], obs[:, 18] = np.cos(yaw / 2), np.sin(yaw / 2)
        obs[:, 19:21] = TAPE_CENTER_M - obs[:, 12:14]
        if not everyone:
            self._obs[mask] = obs[mask]
        if self.observe_base:
            self._base[mask] = self._base_delta(mask)[mask]
            self._obs[mask, OBS_DIM:] = self._base[mask]


class SO101ResidualEnv(gym.Env):
    """One arm: SO101ResidualVectorEnv with a batch of one; arguments, spaces and reward are described there.

    render_mode "human" opens MuJoCo's passive viewer and runs in real time. info holds floats and bools, and at the end
    of an episode "episode" with its unshaped return r and length l.
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(self, base_policy: BasePolicy | None = None, render_mode: str | None = None, **kwargs: Any):
        _check(render_mode in (None, *self.metadata["render_modes"]), "render_mode", render_mode, "human or rgb_array")
        _check("num_envs" not in kwargs, "num_envs", kwargs.get("num_envs"), "left to SO101ResidualVectorEnv")
        self.render_mode = render_mode
        self._envs = SO101ResidualVectorEnv(
            1,
            base_policy,
            render_mode="rgb_array" if render_mode == "rgb_array" else None,
            num_threads=1,
            autoreset_mode=AutoresetMode.DISABLED,
            **kwargs,
        )
        self.observation_space = self._envs.single_observation_space
        self.action_space = self._envs.single_action_space
        self._viewer: Any = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the observation (25,) and an empty dict."""
        super().reset(seed=seed)
        self._envs._rngs[0] = self.np_random  # one generator, so that env.np_random is the one in use
        obs, info = self._envs.reset()
        if self.render_mode == "human":
            self.render()
        return obs[0], info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One control step with residual (6,); see SO101ResidualVectorEnv.step."""
        obs, reward, terminated, truncated, info = self._envs.step(np.asarray(action)[None])
        if self.render_mode == "human":
            self.render()
        info = _first({key: value for key, value in info.items() if not key.startswith("_")})
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | None:
        """An RGB frame (480, 640, 3) uint8 in mode rgb_array; in mode human the viewer is brought up to date."""
        if self.render_mode == "rgb_array":
            return self._envs.render()[0]
        if self.render_mode == "human":
            import mujoco.viewer  # needs a display, so only here

            if self._viewer is None:
                self._viewer_data = mujoco.MjData(self._envs.model)
                self._viewer = mujoco.viewer.launch_passive(self._envs.model, self._viewer_data)
                self._frame_due = time.perf_counter()
            with self._viewer.lock():
                self._envs.batch.get_data(0, self._viewer_data)
                mujoco.mj_forward(self._envs.model, self._viewer_data)
            self._viewer.sync()
            # real time; after a pause of the caller's, time starts anew instead of rushing to catch up
            now = time.perf_counter()
            self._frame_due = max(self._frame_due + 1 / CONTROL_HZ, now)
            time.sleep(self._frame_due - now)
        return None

    def close(self) -> None:
        """Close the viewer and the simulation."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        self._envs.close()


def load_model(tape_margin: float = 0.04) -> mujoco.MjModel:
    """The compiled scene with the tape laid tape_margin (m) outside the sheet's outline."""
    spec = mujoco.MjSpec.from_file(str(ASSET))
    spec.body("tape").pos = [*TAPE_CENTER_M, 0.0]
    half, width = SHEET_HALF_M + tape_margin, TAPE_WIDTH_M / 2
    for name, axis, sign in (("front", 0, 1), ("back", 0, -1), ("left", 1, 1), ("right", 1, -1)):
        geom = spec.geom(f"tape_{name}")
        pos, size = np.zeros(3), np.append(half + 2 * width, 0.0002)
        pos[axis], pos[2], size[axis] = sign * (half[axis] + width), 0.0002, width
        geom.pos, geom.size = pos, size
    return spec.compile()


def offscreen_renderer(model: mujoco.MjModel, height: int = 480, width: int = 640) -> mujoco.Renderer:
    """A renderer without a window: EGL on Linux unless MUJOCO_GL says otherwise. OpenGL is first touched here.

    Raises RuntimeError where there is none.
    """
    try:
        if sys.platform.startswith("linux") and not os.environ.get("MUJOCO_GL"):
            # MuJoCo chooses GLFW, which needs a display, when it is imported without MUJOCO_GL
            from mujoco.egl import GLContext
            from mujoco.rendering.classic import gl_context

            gl_context.GLContext = GLContext
        return mujoco.Renderer(model, height, width)
    except Exception as error:  # ImportError, AttributeError, RuntimeError, FatalError: each layer fails in its own way
        raise RuntimeError(
            f"off-screen rendering failed ({type(error).__name__}): install EGL (Debian: apt-get install libegl1) "
            "or set MUJOCO_GL=osmesa"
        ) from error


def _check(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value}")


def _first(info: dict[str, Any]) -> dict[str, Any]:
    """Environment 0 of a dict of (N,) arrays, as plain Python values."""
    return {key: _first(value) if isinstance(value, dict) else value[0].item() for key, value in info.items()}


gym.register(
    "SO101Residual-v0",
    entry_point="so101_env:SO101ResidualEnv",
    vector_entry_point="so101_env:SO101ResidualVectorEnv",
)
