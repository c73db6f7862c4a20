"""Policies that say where the gripper's tip goes, and the scripted pusher `jacobian`."""

from __future__ import annotations

from collections.abc import Mapping

import mujoco
import mujoco.batch
import numpy as np

from so101.base import BasePolicy, flat_observation
from so101_env import ACT_DIM, COMMAND, HOME_RAD, OBS, SHEET_HALF_M, load_model, sheet_pose
from so101_sim.control import COMMAND_WINDOW_RAD, FIRMWARE_P
from so101_sim.geometry import distance_to_rectangle

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
    LEAD_RAD = COMMAND_WINDOW_RAD  # largest lead of a joint's target, at P = 32
    LEAD_S = 0.012  # targets of joints in motion may lead by this much more: a command takes effect late
    gain_factor = 1.0  # ratio of the servos' gain to the one that firmware_p implies

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

    def lean_rad(self, obs: np.ndarray) -> np.ndarray:
        """By how much the gripper leans outwards (N,), rad."""
        return np.zeros(len(obs))

    def joint_steps(
        self, obs: np.ndarray, jacobian: np.ndarray, motion_m: np.ndarray, rise_m: np.ndarray
    ) -> np.ndarray:  # fmt: skip
        """Motion of the arm's joints in rad (N, 4) that moves the tip; arguments as in `move_tip`."""
        joints = obs[:, OBS["joint_pos"]]
        # the gripper points straight down, as at home: the three joints of the arm's plane add up to its pitch
        pitch = HOME_RAD[1:ARM].sum() - joints[:, 1:ARM].sum(1) - self.lean_rad(obs)
        weighted = np.broadcast_to(self.PITCH_M_PER_RAD * np.array([0.0, 1.0, 1.0, 1.0]), (len(obs), 1, ARM))
        rows = np.concatenate([jacobian, weighted], axis=1)  # (N, 4, 4)
        wanted = np.column_stack([motion_m, rise_m, self.PITCH_GAIN * self.PITCH_M_PER_RAD * pitch])
        transposed = rows.transpose(0, 2, 1)
        step = transposed @ np.linalg.solve(rows @ transposed + self.DAMPING * np.eye(4), wanted[:, :, None])
        return step[:, :, 0]

    def move_tip(
        self, obs: np.ndarray, command: np.ndarray, jacobian: np.ndarray, motion_m: np.ndarray, rise_m: np.ndarray,
        pressing: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """Joint deltas in rad (N, 6) that move the tip.

        Args:
            obs: (N, 25) float64.
            command: last commanded joint targets (N, 6), rad.
            jacobian: result of tip_jacobian for the same obs, whose gravity torques are used, too.
            motion_m, rise_m: wanted motion in this step, horizontally (N, 2) and upwards (N,).
            pressing: (N,) bool, whether to press by PRESS_N on what is below; or float, by how many times PRESS_N.
        """
        joints, velocity = obs[:, OBS["joint_pos"]], obs[:, OBS["joint_vel"]][:, :ARM]
        step = self.joint_steps(obs, jacobian, motion_m, rise_m)
        softer = FIRMWARE_P / (self.firmware_p * self.gain_factor)  # than the model's servos
        lead = self.LEAD_RAD * softer + self.LEAD_S * np.abs(velocity)
        step /= np.maximum((np.abs(step) / lead).max(1, keepdims=True), 1.0)

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

    fingerprint = "pusher 1"  # changes when it acts differently: a residual fits only the pusher it was trained on

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
        aside = distance_to_rectangle(tip[:, :2], *sheet_pose(obs), SHEET_HALF_M, self.INSET_M)
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
