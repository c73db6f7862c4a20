"""From what an SO-101 measures to where its joints go next, at 30 Hz: in the simulation, and on an arm.

The command law stands here once: the batched simulation asks `Controller.limit` for a row per environment. On one arm,
`Controller.measure` takes what the encoders say and `Controller.move` gives the next joint targets; units are those of
LeRobot's drivers, see `to_rad`. NumPy and MuJoCo are all it needs.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import mujoco
import numpy as np

from so101_scene import CONTROL_HZ, SO101Error, load_model

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
ACT_DIM = len(JOINTS)
# A target stays this close to the one a free arm would need for the same motion. Times the servo gain it bounds the
# torque against an obstacle to 0.21 N m, and so the press of a fingertip to about 1 N: light enough to drag a sheet.
COMMAND_WINDOW_RAD = 0.012
BACKLASH_RAD = float(np.deg2rad(1.0))  # of the arm's servos
FIRMWARE_P = 32  # for which assets/so101.xml has the servo gain; it is proportional. LeRobot's drivers set 16
LATENCY_S = 2 / CONTROL_HZ  # until a command takes effect, at most; of an arm nobody knows it better
TICKS_PER_TURN = 4096  # of an encoder


def clamp(x: np.ndarray, low: object, high: object) -> np.ndarray:
    """np.clip, which takes three times as long on the few rows of a step: 1 % of a training run in all."""
    return np.minimum(np.maximum(x, low), high)


# ---------------------------------------------------------------------------------------------------------------------
# units


UNITS = ("rad", "deg", "norm")


class Calibration(NamedTuple):
    """Ranges of an arm's joints, (6,) each, rad: what -100 and 100 mean, and of the gripper 0 and 100."""

    low_rad: np.ndarray
    high_rad: np.ndarray


def read_calibration(path: str | Path) -> Calibration:
    """The ranges in a calibration file of LeRobot's, `calibration/robots/so101_follower/ID.json` in its cache.

    It has range_min and range_max of each joint in encoder ticks; their middle is zero, the gripper's range_min closed.

    Raises:
        SO101Error: no such file, or not one of an SO-101.
    """
    try:
        motors = json.loads(Path(path).read_text())
        ticks = np.array([[motors[joint][end] for end in ("range_min", "range_max")] for joint in JOINTS], np.float64)
    except OSError as error:
        raise SO101Error(f"calibration {path}: cannot be read ({error.strerror}); calibrate the arm first") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SO101Error(f"calibration {path}: is no calibration of an SO-101 by LeRobot ({error!r})") from error
    spans = np.ptp(ticks, axis=1) * 2 * np.pi / TICKS_PER_TURN
    if not (ticks[:, 0] < ticks[:, 1]).all() or spans.max() > 2 * np.pi:
        raise SO101Error(f"calibration {path}: a joint's range_min is not below its range_max; calibrate the arm again")
    closed = _model_ranges().low_rad[5]
    low, high = -spans / 2, spans / 2
    low[5], high[5] = closed, closed + spans[5]
    return Calibration(low, high)


@functools.cache
def _model_ranges() -> Calibration:
    """The ranges of the model's joints, which a calibration that reached the arm's stops has as well."""
    return Calibration(*load_model().actuator_ctrlrange.T.copy())


def _unit_scale(unit: str, ranges: Calibration | None) -> tuple[np.ndarray, np.ndarray]:
    """Scale and offset (6,) that turn joint angles in `unit` into rad."""
    low, high = ranges or _model_ranges()
    if unit == "rad":
        return np.ones(ACT_DIM), np.zeros(ACT_DIM)
    if unit not in UNITS:
        raise SO101Error(f"unknown unit {unit!r}; known are {', '.join(UNITS)}")
    # from -100 to 100 over each joint's range, but for the gripper: from 0 to 100
    scale, offset = (high - low) / 200.0, (high + low) / 2.0
    if unit == "deg":
        scale, offset = np.full(ACT_DIM, np.pi / 180.0), np.zeros(ACT_DIM)
    scale[5], offset[5] = (high[5] - low[5]) / 100.0, low[5]
    return scale, offset


def to_rad(joints: np.ndarray, unit: str, ranges: Calibration | None = None) -> np.ndarray:
    """Joint angles (..., 6) in rad.

    Args:
        joints: in `unit`, JOINTS order.
        unit: "rad"; "deg", as LeRobot has them with use_degrees, its default since 0.4.4: the gripper is then in 0 to
            100; "norm", LeRobot's -100 to 100 over each joint's range, and 0 to 100 for the gripper.
        ranges: of the arm's calibration; None: those of the model, which is as good as the arm's calibration reaches
            its stops.

    Raises:
        SO101Error: an unknown unit, or numbers that no such unit can have.
    """
    scale, offset = _unit_scale(unit, ranges)
    result = np.asarray(joints, np.float64) * scale + offset
    if np.abs(result).max() > 2 * np.pi:
        raise SO101Error(f"joint angles of {np.abs(result).max():.0f} rad: they are not in {unit}; see --units")
    return result


def from_rad(joints_rad: np.ndarray, unit: str, ranges: Calibration | None = None) -> np.ndarray:
    """Inverse of to_rad."""
    scale, offset = _unit_scale(unit, ranges)
    return (joints_rad - offset) / scale


# ---------------------------------------------------------------------------------------------------------------------
# the controller


BEYOND_RANGE_RAD = float(np.deg2rad(5.0))
WATCHDOG_S = 0.1  # a measurement that is older than this says nothing of where the arm is


class Controller:
    """Where the joints of arms go next: `limit` for a row per arm, `measure` and `move` for one that is measured.

    Args:
        model: the scene, with the arm's kinematics, joint limits, and servos at P = 32.
        firmware_p: the P coefficient that the servos are set to. Their gain is proportional to it, and the command
            window inversely: a fingertip presses with the same force.
        backlash_rad: how far a joint moves before its servo minds: the window is wider by half of it.
        latency_s: until a command takes effect, at most: a joint in motion gets a window as much wider.
        max_speed_rad_s: how fast the targets of `move` may go.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        firmware_p: int = FIRMWARE_P,
        backlash_rad: float = 0.0,
        latency_s: float = 0.0,
        max_speed_rad_s: float = 2.0,
    ):
        self.gain = model.actuator_gainprm[:, 0] * (firmware_p / FIRMWARE_P)  # N m/rad, (6,)
        self.damping = model.dof_damping[:ACT_DIM].copy()  # N m s/rad, (6,)
        self.latency_s = latency_s
        self.window_rad = COMMAND_WINDOW_RAD * FIRMWARE_P / firmware_p + backlash_rad / 2
        self.low_rad, self.high_rad = model.actuator_ctrlrange.T.copy()
        self.max_step_rad = max_speed_rad_s / CONTROL_HZ
        self._model = model
        self.reset()

    @functools.cached_property
    def _data(self) -> mujoco.MjData:
        """For the kinematics of an arm that is measured."""
        return mujoco.MjData(self._model)

    def limit(
        self,
        target_rad: np.ndarray,
        joints_rad: np.ndarray,
        velocity_rad_s: np.ndarray,
        gravity_n_m: np.ndarray,
    ) -> np.ndarray:
        """Wanted joint targets (N, 6), rad as the encoders count, held within the joints' limits and the window.

        Args:
            target_rad, joints_rad, velocity_rad_s: wanted and measured, (N, 6).
            gravity_n_m: torque that holds the joints at rest there, (N, 6).
        """
        # the targets of a free arm in this motion: what it measures, plus its lag under gravity and damping
        holding = joints_rad + (gravity_n_m + self.damping * velocity_rad_s) / self.gain
        lower, upper = holding - self.window_rad, holding + self.window_rad
        if self.latency_s:  # and under a latency from none to this
            lead = velocity_rad_s * self.latency_s
            lower, upper = lower + np.minimum(lead, 0.0), upper + np.maximum(lead, 0.0)
        return clamp(target_rad, np.maximum(self.low_rad, lower), np.minimum(self.high_rad, upper))

    # -- one arm that is measured

    def reset(self) -> None:
        """Forget what was measured and commanded: the next measurement is one of an arm at rest."""
        self.time_s = -np.inf  # of the last measurement
        self.joints_rad, self.velocity_rad_s = np.zeros(ACT_DIM), np.zeros(ACT_DIM)
        self.command_rad: np.ndarray | None = None  # the last target, rad

    def measure(self, joints_rad: np.ndarray, time_s: float) -> None:
        """Take what the encoders say, (6,), rad, and when, s.

        Brings up to date velocity_rad_s, the difference to the last measurement; gravity_n_m, what holds the arm there;
        tip_m (3,), by forward kinematics; and at first command_rad, the targets at which the arm stays where it is.

        Raises:
            SO101Error: numbers that are not finite, or farther outside of a joint's range than backlash and calibration
                explain.
        """
        joints_rad = np.asarray(joints_rad, np.float64)
        if not np.isfinite(joints_rad).all():
            raise SO101Error(f"the arm says that its joints are at {joints_rad}: check cables and power")
        outside = np.maximum(self.low_rad - joints_rad, joints_rad - self.high_rad)
        if (outside > BEYOND_RANGE_RAD).any():
            joint = int(outside.argmax())
            raise SO101Error(
                f"{JOINTS[joint]} is {np.rad2deg(outside[joint]):.0f} degrees outside of its range: calibrate the arm, "
                "and see --units"
            )
        elapsed, moved = time_s - self.time_s, joints_rad - self.joints_rad
        self.velocity_rad_s = moved / elapsed if 0 < elapsed < WATCHDOG_S else np.zeros(ACT_DIM)
        self.joints_rad, self.time_s = joints_rad, time_s
        self._data.qpos[:ACT_DIM] = joints_rad
        mujoco.mj_forward(self._model, self._data)
        self.gravity_n_m = self._data.qfrc_bias[:ACT_DIM].copy()
        self.tip_m = self._data.site("gripperframe").xpos.copy()
        if self.command_rad is None:
            self.command_rad = clamp(joints_rad + self.gravity_n_m / self.gain, self.low_rad, self.high_rad)

    def move(self, delta_rad: np.ndarray, time_s: float) -> np.ndarray:
        """The next joint targets (6,), rad: the last ones and delta (6,), within the limits, the window and the speed.

        Raises:
            SO101Error: the last measurement is older than WATCHDOG_S: nobody knows where the arm is.
        """
        if not time_s - self.time_s <= WATCHDOG_S:
            age = f"{1000 * (time_s - self.time_s):.0f} ms ago" if np.isfinite(self.time_s) else "never"
            raise SO101Error(f"the arm was measured last {age}: it gets no further target")
        wanted = self.command_rad + clamp(np.asarray(delta_rad), -self.max_step_rad, self.max_step_rad)
        row = self.limit(wanted[None], self.joints_rad[None], self.velocity_rad_s[None], self.gravity_n_m[None])
        self.command_rad = row[0]
        return self.command_rad.copy()
