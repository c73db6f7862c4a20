"""Base policies: what the residual corrects, named by one spec string (`--base-policy`).

A base policy is an object with `reset(mask)`, `act(obs, command, mask)` and `close()`, see so101_env.BasePolicy. One
that cannot act raises; none ever falls back to zeros.
"""

import hashlib

import mujoco
import mujoco.batch
import numpy as np
import torch

from so101_env import (
    ACT_DIM,
    COMMAND_WINDOW_RAD,
    HOME_RAD,
    BasePolicy,
    BasePolicyError,
    distance_to_sheet,
    load_model,
)

ARM = 4  # shoulder_pan, shoulder_lift, elbow_flex and wrist_flex move the tip; wrist_roll and gripper keep still
SPECS = "zero, jacobian, checkpoint:PATH, bc:PATH"


# stages of the scripted pusher
REACH, LOWER, DRAG, PULL_OUT, LIFT = range(5)


class JacobianPolicy:
    """Scripted pusher: go over the sheet, press, drag the sheet's centre to the tape's, hold. It ignores the yaw.

    If the sheet is there and still no success, or stays stuck near by, the pusher tries again: it pulls the sheet out,
    lifts, and goes over the sheet anew. The wanted motion of the tip becomes one of the joints by damped least squares
    on the model's own Jacobian. A servo's target is then where its joint should be next, plus what the servo needs
    against gravity and damping, plus the torque of the press.
    """

    REACH_M, DRAG_M, LIFT_M, SINK_M = 0.006, 0.004, 0.004, 0.003  # largest motion of the tip per control step
    HOVER_M = 0.016  # height of the tip on the way
    INSET_M = 0.02  # go this far inside the sheet's edge
    SLACK_M = 0.025  # once down, the tip may be this far outside that before it is lifted
    CONTACT_M, MISREAD_M = 0.0085, 0.0175  # below this height the tip is on the sheet; is, if it does not sink
    SINKING_M_S = -0.03
    PRESS_N = 0.6  # enough to drag the sheet without slipping, too little to stall the arm by friction on the table
    TOLERANCE_M = 0.005  # near enough to the goal
    HOLD_STEPS = 10  # at the goal before the next try
    PATIENCE_STEPS, NEAR_M = 120, 0.04  # a drag that lasts this long, and is this near, is stuck
    PULL_OUT_M, PULL_OUT_STEPS = np.array([0.05, 0.0]), 60  # where to, and at most how long
    PITCH_M_PER_RAD, PITCH_GAIN = 0.1, 0.3  # weight of a rad of pitch in the least squares; share corrected per step
    DAMPING = 1e-4  # m^2 per rad^2
    LEAD_S = 0.012  # targets of joints in motion may lead by this much more: a command takes effect late
    fingerprint = ""

    def __init__(self) -> None:
        self.model = load_model()
        site = self.model.site("gripperframe")
        self.site, self.body = site.id, int(site.bodyid[0])
        self.batch: mujoco.batch.Batch | None = None
        self.memory: dict[str, np.ndarray] = {}

    def reset(self, mask: np.ndarray) -> None:
        """Start with reaching."""
        if not self.memory or len(self.memory["stage"]) != len(mask):
            self.memory = {name: np.zeros(len(mask), np.int64) for name in ("stage", "steps", "count")}
        for array in self.memory.values():
            array[mask] = 0

    def act(self, obs: np.ndarray, command: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6), for observations (N, 25) and the last commanded targets (N, 6)."""
        n, obs = len(obs), obs.astype(np.float64)
        if self.batch is None or self.batch.nsim != n:
            self.batch = mujoco.batch.Batch(self.model, nsim=n, nthread=1)
            self.qpos, self.qvel, self.gravity = (self.batch.bind(key) for key in ("qpos", "qvel", "qfrc_bias"))
            self.tip = self.batch.bind("site_xpos")[:, self.site]
        self.qpos[:, :ACT_DIM], self.qvel[:, :ACT_DIM] = obs[:, 0:6], obs[:, 6:12]
        self.batch.forward(stage=mujoco.mjtStage.mjSTAGE_VEL.value)
        jacobian = self.batch.jac(self.body, self.tip)[0][:, :, :ARM]  # (N, 3, 4)
        velocity = obs[:, 6 : 6 + ARM]

        sheet, tip = obs[:, 12:14], obs[:, 22:25]
        stage = self._next_stage(obs, np.einsum("nj,nj->n", jacobian[:, 2], velocity), mask)
        pressing = (stage == DRAG) | (stage == PULL_OUT)
        to_goal = obs[:, 19:21] + self.PULL_OUT_M * (stage == PULL_OUT)[:, None]
        far = np.maximum(np.linalg.norm(to_goal, axis=1, keepdims=True), 1e-9)
        to_goal = to_goal * np.maximum(1.0 - self.TOLERANCE_M / far, 0.0)
        reach = np.where((stage == REACH)[:, None], sheet - tip[:, :2], 0.0)
        way = np.where(pressing[:, None], to_goal, reach)
        length = np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 1e-9)
        way *= np.minimum(np.where(pressing, self.DRAG_M, self.REACH_M)[:, None] / length, 1.0)
        rise = np.clip(self.HOVER_M - tip[:, 2], -self.SINK_M, self.LIFT_M)
        rise = np.select([pressing, stage == LOWER], [0.0, -self.SINK_M], rise)
        # the gripper points straight down, as at home: the three joints of the arm's plane add up to its pitch
        pitch = HOME_RAD[1:ARM].sum() - obs[:, 1:ARM].sum(1)
        weighted = np.broadcast_to(self.PITCH_M_PER_RAD * np.array([0.0, 1.0, 1.0, 1.0]), (n, 1, ARM))
        rows = np.concatenate([jacobian, weighted], axis=1)  # (N, 4, 4)
        wanted = np.column_stack([way, rise, self.PITCH_GAIN * self.PITCH_M_PER_RAD * pitch])
        transposed = rows.transpose(0, 2, 1)
        motion = transposed @ np.linalg.solve(rows @ transposed + self.DAMPING * np.eye(4), wanted[:, :, None])
        lead = COMMAND_WINDOW_RAD + self.LEAD_S * np.abs(velocity)
        motion = motion[:, :, 0] / np.maximum((np.abs(motion[:, :, 0]) / lead).max(1, keepdims=True), 1.0)

        torque = self.gravity[:, :ARM] + self.model.dof_damping[:ARM] * velocity
        torque -= self.PRESS_N * jacobian[:, 2] * pressing[:, None]
        # wrist_roll and gripper stay where they were told to be: a residual may turn them
        delta = np.zeros((n, ACT_DIM))
        delta[:, :ARM] = obs[:, :ARM] + motion + torque / self.model.actuator_gainprm[:ARM, 0] - command[:, :ARM]
        return delta

    def _next_stage(self, obs: np.ndarray, tip_velocity_z: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The stage to be in (N,); remembered, as is how long it lasts, for the environments in mask."""
        old, steps, count = (self.memory[name] for name in ("stage", "steps", "count"))
        tip, goal_distance = obs[:, 22:25], np.linalg.norm(obs[:, 19:21], axis=1)
        pulled_out = np.linalg.norm(obs[:, 19:21] + self.PULL_OUT_M, axis=1) < 1.5 * self.TOLERANCE_M
        yaw = 2.0 * np.arctan2(obs[:, 18], obs[:, 15])
        aside = distance_to_sheet(tip[:, :2], obs[:, 12:14], yaw, self.INSET_M)
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

    def close(self) -> None:
        """Nothing to release."""


class CheckpointPolicy:
    """A frozen policy of ppo_residual_so101.py, its own base policy included: residuals stack."""

    def __init__(self, path: str) -> None:
        # the trainer imports this module, so it is imported when needed
        from ppo_residual_so101 import check_base, checkpoint_args, load_agent, load_base_policy, load_checkpoint

        checkpoint = load_checkpoint(path, "--base-policy checkpoint:")
        args = checkpoint_args(checkpoint)
        self.base = load_base_policy(args.base_policy)
        check_base(checkpoint, self.base, f"--base-policy checkpoint:{path}")
        self.agent, self.observe_base, self.scale = (
            load_agent(checkpoint),
            args.observe_base,
            args.alpha * args.act_scale,
        )
        self.fingerprint = fingerprint(checkpoint["agent"], f"{checkpoint['base_fingerprint']} {self.scale}")

    def reset(self, mask: np.ndarray) -> None:
        """Passed on to its own base policy."""
        if self.base is not None:
            self.base.reset(mask)

    @property
    def memory(self) -> dict[str, np.ndarray]:
        """That of its own base policy."""
        return {} if self.base is None else self.base.memory

    @memory.setter
    def memory(self, memory: dict[str, np.ndarray]) -> None:
        if self.base is not None:
            self.base.memory = memory

    def act(self, obs: np.ndarray, command: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): what its own base policy and its residual ask for together."""
        base = np.zeros((len(obs), ACT_DIM)) if self.base is None else self.base.act(obs, command, mask)
        if self.observe_base:
            obs = np.concatenate([obs, base.astype(np.float32)], axis=1)
        with torch.inference_mode():
            return base + self.scale * self.agent.get_mean(self.agent.features(obs)).clamp(-1, 1).double().numpy()

    def close(self) -> None:
        """Release what its own base policy holds."""
        if self.base is not None:
            self.base.close()


class ClonePolicy:
    """A behaviour clone of bc_so101.py: it asks for absolute joint targets, a chunk of steps at a time."""

    def __init__(self, path: str) -> None:
        from bc_so101 import load_clone

        self.clone, state_dict = load_clone(path, "--base-policy bc:")
        self.fingerprint = fingerprint(state_dict)
        self.memory: dict[str, np.ndarray] = {}

    def reset(self, mask: np.ndarray) -> None:
        """Look again before the next step."""
        n, chunk = len(mask), self.clone.chunk_size
        if not self.memory or len(self.memory["step"]) != n:
            self.memory = {"step": np.zeros(n, np.int64), "targets": np.zeros((n, chunk, ACT_DIM), np.float32)}
        self.memory["step"][mask] = 0

    def act(self, obs: np.ndarray, command: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Joint deltas in rad (N, 6): from the last commanded targets to the clone's."""
        step, targets = self.memory["step"], self.memory["targets"]
        look = mask & (step == 0)
        if look.any():
            with torch.inference_mode():
                targets[look] = self.clone(obs[look]).numpy()
        delta = targets[np.arange(len(obs)), step].astype(np.float64) - command
        step[mask] = (step[mask] + 1) % self.clone.chunk_size
        return delta

    def close(self) -> None:
        """Nothing to release."""


def fingerprint(state_dict: dict[str, torch.Tensor], also: str = "") -> str:
    """SHA-256 of weights, and of a string."""
    digest = hashlib.sha256(also.encode())
    for name, tensor in sorted(state_dict.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def make_base_policy(spec: str) -> BasePolicy | None:
    """Base policy of a command-line spec string, None for zero. Raises BasePolicyError for an unknown spec."""
    kind, _, path = spec.partition(":")
    if spec == "zero":
        return None
    if spec == "jacobian":
        return JacobianPolicy()
    if kind == "checkpoint" and path:
        return CheckpointPolicy(path)
    if kind == "bc" and path:
        return ClonePolicy(path)
    raise BasePolicyError(f"unknown; known are {SPECS}")
