"""The command law: from measured joints to the next joint targets, at 30 Hz, in the simulation and on a real arm.

The batched simulation calls `Controller.limit` with a row per arm. For one real arm, `Controller.measure` takes the
encoder readings and `Controller.move` returns the next joint targets. Units are those of LeRobot's drivers, see
`to_rad`. NumPy and MuJoCo are the only dependencies.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np

from so101_sim.errors import BasePolicyError, SO101Error, check_arrays, strict_json
from so101_sim.scene import ASSETS, CONTROL_HZ

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
ACT_DIM = len(JOINTS)
JOINT_MIRROR = (-1, 1, 1, 1, -1, 1)  # in the left-right mirror image pan and roll turn the other way
SHOULDER_LIFT, ELBOW_FLEX, WRIST_ROLL, GRIPPER = 1, 2, 4, 5
# Largest distance of a target from the target that a free arm would need for the same motion. Times the servo gain it
# limits the torque against an obstacle to 0.21 N m and the force of a fingertip to about 1 N, light enough to drag
# a thin object over a table.
COMMAND_WINDOW_RAD = 0.012
BACKLASH_RAD = float(np.deg2rad(1.0))  # typical backlash of the servos
FIRMWARE_P = 32  # assets/so101.xml has the servo gain for this P; the gain is proportional. LeRobot's drivers set 16
LATENCY_S = 2 / CONTROL_HZ  # upper bound on command latency; not measured on a real arm
# Smallest possible ratio of the true servo gain to the expected one: by stall torque the 7.4 V servo has half the gain
# of the 12 V servo, which is the model's, and joints differ. Then the same for a gain that `learn_gain` has found.
GAIN_FLOOR, LEARNED_GAIN_FLOOR = 0.4, 0.8
LARGEST_GAIN = 2.5  # that learn_gain can find, as a share of the expected one
MAX_DELTA_RAD = 6.3  # no joint has a wider range: a base policy that asks for more has its units wrong
HOLDING_N_M = 0.2  # a joint that carries more than this shows its servo's gain
TICKS_PER_TURN = 4096  # encoder resolution
# Accepted spans of the joints that a hand sweeps from stop to stop, degrees. In published calibrations of SO-101
# followers they are 182 to 242, 203 to 222, 192 to 196, 198 to 211 and, of the gripper, 109 to 140.
SPANS_DEG = {
    "shoulder_pan": (170, 300), "shoulder_lift": (185, 240), "elbow_flex": (180, 215), "wrist_flex": (180, 230),
    "wrist_roll": (180, 360), "gripper": (85, 160),
}  # fmt: skip


def clamp(x: np.ndarray, low: object, high: object) -> np.ndarray:
    """np.clip for small arrays: np.clip takes three times as long on the few rows of a step, 1 % of a training run."""
    return np.minimum(np.maximum(x, low), high)


def valid_delta(policy: Any, answer: Any, mask: np.ndarray) -> np.ndarray:
    """What a base policy's `act` has returned, as joint deltas (N, 6), rad, for the rows in mask, (N,) bool.

    Raises BasePolicyError unless they are finite numbers of this shape, and within reach.
    """
    name, expected = type(policy).__name__, (len(mask), ACT_DIM)
    try:
        delta = np.asarray(answer, np.float64)
    except (TypeError, ValueError) as error:
        raise BasePolicyError(f"base policy {name}: act() must return numbers {expected} ({error})") from error
    if delta.shape != expected or not np.isfinite(delta).all():
        found = "NaN or Inf" if delta.shape == expected else delta.shape
        raise BasePolicyError(f"base policy {name}: act() must return finite {expected}, got {found}")
    if (largest := float(np.abs(delta[mask]).max(initial=0.0))) > MAX_DELTA_RAD:
        raise BasePolicyError(
            f"base policy {name}: asks for a joint to move by {largest:.1f} rad in one step, at most "
            f"{MAX_DELTA_RAD:.1f} is within reach; are its actions in degrees?"
        )
    return delta


# ---------------------------------------------------------------------------------------------------------------------
# units


UNITS = ("rad", "deg", "deg-old", "norm")
OLD_UNIT = "deg-old"  # recordings from before LeRobot's change of calibration


class Calibration(NamedTuple):
    """Ranges of an arm's joints, (6,) each, rad: -100 and 100 in LeRobot's units; for the gripper 0 and 100."""

    low_rad: np.ndarray
    high_rad: np.ndarray


def read_calibration(path: str | Path) -> Calibration:
    """The joint ranges in LeRobot's calibration file, `calibration/robots/so_follower/ID.json` in LeRobot's cache.

    The file has range_min and range_max of each joint in encoder ticks, and no joint that turns the other way. The
    middle of the range is zero; the gripper is closed at range_min.

    Raises:
        SO101Error: there is no such file, it is not the calibration of an SO-101, or a joint's range is impossible.
    """
    try:
        motors = strict_json(Path(path).read_text(encoding="utf-8"))
        if motors.keys() != {*JOINTS} or any(motors[joint].get("drive_mode", 0) != 0 for joint in JOINTS):
            raise ValueError(f"it must have the joints {', '.join(JOINTS)}, each with drive_mode 0")
        ends = [[motors[joint][end] for end in ("range_min", "range_max")] for joint in JOINTS]
        if any(type(end) is not int for pair in ends for end in pair):
            raise ValueError("range_min and range_max must be encoder ticks, whole numbers")
        ticks = np.array(ends, np.float64)
    except OSError as error:
        raise SO101Error(f"calibration {path}: cannot be read ({error.strerror}); calibrate the arm first") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"{error!r:.200}"
        raise SO101Error(f"calibration {path}: is not a LeRobot calibration of an SO-101 ({reason})") from error
    spans = (ticks[:, 1] - ticks[:, 0]) * 2 * np.pi / TICKS_PER_TURN
    for joint, span in zip(JOINTS, np.rad2deg(spans)):
        low, high = SPANS_DEG[joint]
        if not low <= span <= high:
            raise SO101Error(
                f"calibration {path}: {joint} has a range of {span:.0f} degrees, and should have {low} to {high}; "
                "calibrate again: start with every joint in the middle, and move it to both of its stops"
            )
    closed = _usual_ranges().low_rad[GRIPPER]
    low, high = -spans / 2, spans / 2
    low[GRIPPER], high[GRIPPER] = closed, closed + spans[GRIPPER]
    return Calibration(low, high)


@functools.cache
def _usual_ranges() -> Calibration:
    """The joint ranges of a calibration that reached the arm's end stops, which are the model's, and the wrist roll's.

    LeRobot does not measure the range of wrist_roll: SOFollower.calibrate has `full_turn_motor = "wrist_roll"` and
    writes range_min 0 and range_max 4095 into every calibration.
    """
    low, high = mujoco.MjModel.from_xml_path(str(ASSETS / "so101.xml")).actuator_ctrlrange.T.copy()
    high[WRIST_ROLL] = (TICKS_PER_TURN - 1) / 2 * 2 * np.pi / TICKS_PER_TURN
    low[WRIST_ROLL] = -high[WRIST_ROLL]
    return Calibration(low, high)


def _unit_scale(unit: str, ranges: Calibration | None) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset, (6,) each, that convert joint angles in `unit` to rad."""
    low, high = ranges or _usual_ranges()
    if unit == "rad":
        return np.ones(ACT_DIM), np.zeros(ACT_DIM)
    if unit not in UNITS:
        raise SO101Error(f"unknown unit {unit!r}; known: {', '.join(UNITS)}")
    # -100 to 100 over each joint's range; the gripper 0 to 100
    scale, offset = (high - low) / 200.0, (high + low) / 2.0
    if unit in ("deg", OLD_UNIT):
        scale, offset = np.full(ACT_DIM, np.pi / 180.0), np.zeros(ACT_DIM)
    if unit == OLD_UNIT:
        scale[SHOULDER_LIFT], offset[SHOULDER_LIFT] = -np.pi / 180.0, np.pi / 2.0
        offset[ELBOW_FLEX] = -np.pi / 2.0
    scale[GRIPPER], offset[GRIPPER] = (high[GRIPPER] - low[GRIPPER]) / 100.0, low[GRIPPER]
    return scale, offset


def to_rad(joints: np.ndarray, unit: str, ranges: Calibration | None = None) -> np.ndarray:
    """Joint angles (..., 6) in rad.

    Args:
        joints: in `unit`, JOINTS order.
        unit: "rad"; "deg", LeRobot's use_degrees (its default since 0.4.4), with the gripper in 0 to 100; "norm",
            LeRobot's -100 to 100 over each joint's range, with the gripper in 0 to 100; "deg-old", the degrees of an
            SO-100 or SO-101 from before LeRobot's change of calibration (pull request 777, June 2025), with the gripper
            in 0 to 100. The arm was then zero when stretched out horizontally. In present degrees, shoulder_lift is
            -(old - 90) and elbow_flex is old - 90, as in LeRobot's docs/source/backwardcomp.mdx and
            examples/backward_compatibility/replay.py.
        ranges: joint ranges of the arm's calibration; None: those of the model, which are right if the calibration
            reached the arm's end stops, and a full turn of wrist_roll, which LeRobot's calibrations always have.

    Raises:
        SO101Error: unknown unit, or numbers that are impossible in this unit.
    """
    scale, offset = _unit_scale(unit, ranges)
    result = np.asarray(joints, np.float64) * scale + offset
    if np.abs(result).max() > 2 * np.pi:
        raise SO101Error(f"joint angles of {np.abs(result).max():.0f} rad: they are not in {unit}")
    return result


def from_rad(joints_rad: np.ndarray, unit: str, ranges: Calibration | None = None) -> np.ndarray:
    """Inverse of to_rad."""
    scale, offset = _unit_scale(unit, ranges)
    return (joints_rad - offset) / scale


# ---------------------------------------------------------------------------------------------------------------------
# the controller


BEYOND_RANGE_RAD = float(np.deg2rad(5.0))  # a joint may be measured this far outside of its range
WATCHDOG_S = 0.1  # a measurement older than this is not used


class Controller:
    """The command law: `limit` for a batch of arms, `measure` and `move` for one arm that is measured.

    Args:
        model: the scene, with the arm's kinematics, joint limits, and servo gains at P = 32.
        firmware_p: the P coefficient the servos are set to. The servo gain is proportional to it and the command window
            inversely proportional, so the force of a fingertip does not depend on it.
        backlash_rad: play before a servo reacts; the window is wider by half of it.
        latency_s: largest command latency; the window of a moving joint is wider by the motion in this time.
        max_speed_rad_s: largest speed of the targets of `move`.
        gain_factor: what is known of the servos' gain beyond that: its ratio to the gain for firmware_p. A 7.4 V servo
            has about 0.5. An array (N, 1) for a batch of arms.
        gain_floor: smallest possible ratio of the true gain to the known one. Below 1 the window
            is wider on the side that carries the arm, and in the direction of its motion, so that a weak arm does not
            sink. A finger at rest presses no harder on the table.
        measured: joint ranges of the arm's calibration, within which `measure` accepts readings, too: an arm that is
            folded lies beyond the limits of the model, because a hand presses it against its stops.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        firmware_p: int = FIRMWARE_P,
        backlash_rad: float = 0.0,
        latency_s: float = 0.0,
        max_speed_rad_s: float = 2.0,
        gain_factor: float | np.ndarray = 1.0,
        gain_floor: float = 1.0,
        measured: Calibration | None = None,
    ):
        self._nominal_gain = model.actuator_gainprm[:, 0] * (firmware_p / FIRMWARE_P)
        self._expected_gain = gain_factor, gain_floor
        self.damping = model.dof_damping[:ACT_DIM].copy()  # N m s/rad, (6,)
        self.latency_s = latency_s
        self.slack_rad = 0.0  # a wider window, for motions in the air of an arm whose gain is not known yet
        self._nominal_window_rad, self._backlash_rad = COMMAND_WINDOW_RAD * FIRMWARE_P / firmware_p, backlash_rad
        self.low_rad, self.high_rad = model.actuator_ctrlrange.T.copy()
        measured = measured or Calibration(self.low_rad, self.high_rad)
        self._lowest_rad = np.minimum(self.low_rad, measured.low_rad) - BEYOND_RANGE_RAD
        self._highest_rad = np.maximum(self.high_rad, measured.high_rad) + BEYOND_RANGE_RAD
        self.max_step_rad = max_speed_rad_s / CONTROL_HZ
        self._model = model
        self.reset()

    @property
    def gain_known(self) -> bool:
        """Whether learn_gain is not needed: the gain is known, or was learned since the last reset."""
        return self.gain_floor >= LEARNED_GAIN_FLOOR

    @property
    def gain(self) -> np.ndarray:
        """Servo gain as far as it is known, N m/rad, (6,) or (N, 6)."""
        return self._nominal_gain * self.gain_factor

    @property
    def window_rad(self) -> float | np.ndarray:
        """Largest distance of a target from that of a free arm, rad; (N, 1) if gain_factor is an array."""
        return self._nominal_window_rad / self.gain_factor + self._backlash_rad / 2 + self.slack_rad

    @functools.cached_property
    def _data(self) -> mujoco.MjData:
        """Kinematics of the measured arm."""
        return mujoco.MjData(self._model)

    def free_target(
        self, joints_rad: np.ndarray, velocity_rad_s: np.ndarray, gravity_n_m: np.ndarray
    ) -> np.ndarray:  # fmt: skip
        """Joint targets (..., 6), rad, of a free arm in this motion: positions plus lag; arguments as in `limit`."""
        return joints_rad + (gravity_n_m + self.damping * velocity_rad_s) / self.gain

    def load(
        self, command_rad: np.ndarray, joints_rad: np.ndarray, velocity_rad_s: np.ndarray, gravity_n_m: np.ndarray
    ) -> np.ndarray:  # fmt: skip
        """Load (..., 6) float32 on each joint, rad: torque against contacts over the expected servo gain.

        It is the last target minus that of a free arm, times gain_factor; arguments as in `limit`. Errors of the gain,
        backlash and dry friction are part of it.
        """
        ahead = command_rad - self.free_target(joints_rad, velocity_rad_s, gravity_n_m)
        return (ahead * self.gain_factor).astype(np.float32)

    def limit(
        self,
        target_rad: np.ndarray,
        joints_rad: np.ndarray,
        velocity_rad_s: np.ndarray,
        gravity_n_m: np.ndarray,
    ) -> np.ndarray:
        """Wanted joint targets (N, 6), rad in encoder coordinates, clipped to the joint limits and to the window.

        Args:
            target_rad, joints_rad, velocity_rad_s: wanted and measured, (N, 6).
            gravity_n_m: torque that holds the joints at rest in this pose, (N, 6).
        """
        holding = self.free_target(joints_rad, velocity_rad_s, gravity_n_m)
        lower, upper = holding - self.window_rad, holding + self.window_rad
        if self.gain_floor < 1.0:  # plus what the weakest arm lags more
            for torque in (gravity_n_m, self.damping * velocity_rad_s):
                lag = torque / self.gain * (1.0 / self.gain_floor - 1.0)
                lower, upper = lower + np.minimum(lag, 0.0), upper + np.maximum(lag, 0.0)
        if self.latency_s:  # plus the lag for any latency from none to this
            lead = velocity_rad_s * self.latency_s
            lower, upper = lower + np.minimum(lead, 0.0), upper + np.maximum(lead, 0.0)
        # the window comes last: an arm outside of its limits, as one that is folded, moves in at the window's pace
        return clamp(clamp(target_rad, self.low_rad, self.high_rad), lower, upper)

    # -- one arm that is measured

    def reset(self) -> None:
        """Forget measurements, commands and the learned gain: the next measurement counts as that of an arm at rest."""
        self.gain_factor, self.gain_floor = self._expected_gain
        self.time_s = -np.inf  # time of the last measurement
        self.joints_rad, self.velocity_rad_s = np.zeros(ACT_DIM), np.zeros(ACT_DIM)
        self.command_rad: np.ndarray | None = None  # the last target, rad

    def measure(self, joints_rad: np.ndarray, time_s: float) -> None:
        """Take encoder readings (6,), rad, and their time, s.

        Updates velocity_rad_s, the difference to the last measurement; gravity_n_m, the torque that holds the arm in
        this pose; tip_m (3,), by forward kinematics; and, on the first call, command_rad, the targets at which the arm
        stays where it is.

        Raises:
            SO101Error: readings that are not finite, or farther outside a joint's range than backlash and calibration
                explain.
        """
        joints_rad = np.asarray(joints_rad, np.float64)
        if not np.isfinite(joints_rad).all():
            raise SO101Error(f"the arm reports joint positions {joints_rad}: check cables and power")
        outside = np.maximum(self._lowest_rad - joints_rad, joints_rad - self._highest_rad)
        if (outside > 0).any():
            joint = int(outside.argmax())
            degrees = np.rad2deg(outside[joint] + BEYOND_RANGE_RAD)
            raise SO101Error(f"{JOINTS[joint]} is {degrees:.0f} degrees outside its range: calibrate the arm")
        elapsed, moved = time_s - self.time_s, joints_rad - self.joints_rad
        self.velocity_rad_s = moved / elapsed if 0 < elapsed < WATCHDOG_S else np.zeros(ACT_DIM)
        self.time_s = time_s
        self._set_joints(joints_rad)
        if self.command_rad is None:
            self.command_rad = clamp(joints_rad + self.gravity_n_m / self.gain, self.low_rad, self.high_rad)

    def _set_joints(self, joints_rad: np.ndarray) -> None:
        """The arm is at joint positions (6,), rad."""
        self.joints_rad = self._data.qpos[:ACT_DIM] = joints_rad
        mujoco.mj_forward(self._model, self._data)
        self.gravity_n_m = self._data.qfrc_bias[:ACT_DIM].copy()
        self.tip_m = self._data.site("gripperframe").xpos.copy()

    def get_state(self) -> dict[str, np.ndarray]:
        """What the next measurement and move depend on."""
        names = ("gain_factor", "gain_floor", "time_s", "joints_rad", "velocity_rad_s", "command_rad")
        return {name: np.array(getattr(self, name), np.float64) for name in names}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on where get_state of a measured arm was called. Raises SO101Error for a state that does not fit."""
        numbers, joints = ("gain_factor", "gain_floor", "time_s"), ("joints_rad", "velocity_rad_s", "command_rad")
        own = dict.fromkeys(numbers, np.zeros(())) | dict.fromkeys(joints, np.zeros(ACT_DIM))
        check_arrays(own, state, "state of the controller")
        if state["gain_factor"] <= 0 or state["gain_floor"] <= 0:
            raise SO101Error("state of the controller: no servo has such a gain")
        self.gain_factor, self.gain_floor, self.time_s = (float(state[name]) for name in numbers)
        self.velocity_rad_s, self.command_rad = state["velocity_rad_s"].copy(), state["command_rad"].copy()
        self._set_joints(state["joints_rad"].copy())

    def learn_gain(self) -> None:
        """Estimate gain_factor from how far the arm, at rest in the air, hangs below its last targets.

        Least squares over the joints that carry weight. Half of the expected backlash is part of the sag. An arm that
        leans on something, and so does not sag, teaches nothing.
        """
        loaded = np.abs(self.gravity_n_m) > HOLDING_N_M
        gravity = self.gravity_n_m[loaded]
        sag = (self.command_rad - self.joints_rad)[loaded] - np.sign(gravity) * self._backlash_rad / 2
        torque = self._nominal_gain[loaded] * sag  # that servos of the expected gain would exert
        if torque @ gravity > 0:
            self.gain_factor = float(clamp(gravity @ torque / (torque @ torque), GAIN_FLOOR, LARGEST_GAIN))
            self.gain_floor = LEARNED_GAIN_FLOOR

    def move(self, delta_rad: np.ndarray, time_s: float) -> np.ndarray:
        """The next joint targets (6,), rad: the last targets plus delta (6,), within limits, window and speed.

        Raises:
            SO101Error: the delta is not six finite numbers, or the last measurement is older than WATCHDOG_S.
        """
        delta_rad = np.asarray(delta_rad, np.float64)
        if delta_rad.shape != (ACT_DIM,) or not np.isfinite(delta_rad).all():
            got = delta_rad.tolist()
            raise SO101Error(f"joint deltas must be {ACT_DIM} finite numbers, got {got}: no further target is sent")
        if not time_s - self.time_s <= WATCHDOG_S:
            age = f"was {1000 * (time_s - self.time_s):.0f} ms ago" if np.isfinite(self.time_s) else "never happened"
            raise SO101Error(f"the last measurement of the arm {age}: no further target is sent")
        wanted = self.command_rad + clamp(delta_rad, -self.max_step_rad, self.max_step_rad)
        row = self.limit(wanted[None], self.joints_rad[None], self.velocity_rad_s[None], self.gravity_n_m[None])
        self.command_rad = row[0]
        return self.command_rad.copy()
