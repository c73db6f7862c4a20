"""Measures an arm before its first run: servo gain, joint offsets, the camera's side, directions, fingertip friction.

`ArmCheck` has one method per step. Each moves the arm through the loop of so101.drive and returns what it measured.
`ArmProfile` is the file that keeps the results.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np

from so101.camera import NotSeen, project
from so101.extras import import_extra
from so101.files import write_json
from so101.locator import SheetLocator
from so101.loop import ASIDE_RAD, RAISED_RAD, Loop
from so101.robot import RobotError
from so101_env import FINGER_RADIUS_M, HOME_RAD, PAN_AXIS_M, SHEET_HALF_M, TAPE_CENTER_M, load_model
from so101_sim.control import ACT_DIM, ELBOW_FLEX, JOINTS, SHOULDER_LIFT
from so101_sim.errors import SO101Error, strict_json
from so101_sim.geometry import distance_to_rectangle, rotate
from so101_sim.scene import CONTROL_HZ

# ---------------------------------------------------------------------------------------------------------------------
# what is known of an arm

PROFILE_VERSION = 1
GAIN_RANGE = (0.35, 2.5)  # plausible gains, as factors; others stop the check
MAX_OFFSET_RAD = float(np.deg2rad(10.0))  # larger ones are for a new calibration, not for a correction


@dataclasses.dataclass(frozen=True)
class ArmProfile:
    """The results of the check of one arm, and the file that keeps them."""

    robot_id: str
    """name under which LeRobot has stored the arm's calibration"""
    offset_rad: tuple[float, ...] = (0.0,) * ACT_DIM
    """encoder minus true position of each joint, rad"""
    gain_factor: float = 1.0
    """servo gain, as a factor of the gain at the servos' P coefficient"""
    camera_turned: bool = False
    """whether the camera stands on the arm's side of the table"""
    steps: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """what each step that is done has measured, by the step's name, with its date"""

    def with_step(self, step: str, result: Mapping[str, Any], **changes: Any) -> ArmProfile:
        """The profile after a step: its result, plain JSON values, with today's date, and changes of other fields."""
        date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        return dataclasses.replace(self, steps={**self.steps, step: {"date": date, **result}}, **changes)

    def save(self, path: Path) -> None:
        """Write the profile to a JSON file."""
        write_json(path, {"version": PROFILE_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: Path, robot_id: str) -> ArmProfile:
        """The profile in a file. Raises SO101Error if the file is damaged, or of another arm or version."""
        try:
            content = strict_json(Path(path).read_bytes())
            version = content.pop("version")
            if version != PROFILE_VERSION:
                raise ValueError(f"version {version!r:.20}, expected {PROFILE_VERSION}")
            profile = cls(**{**content, "offset_rad": tuple(content["offset_rad"])})
            profile._validate({field.name for field in dataclasses.fields(cls)} - {*content})
        except OSError as error:
            raise SO101Error(f"{path}: cannot be read ({error.strerror}); run the check first") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error!r:.150}"
            raise SO101Error(f"{path}: is no arm profile ({reason}); delete it and run the check again") from error
        if profile.robot_id != robot_id:
            raise SO101Error(
                f"{path}: is the profile of {profile.robot_id!r:.50}, not of {robot_id!r}; name another file"
            )
        return profile

    def _validate(self, missing: set[str]) -> None:
        """Raise ValueError for fields that are missing, of a wrong type, or impossible."""
        low, high = GAIN_RANGE
        valid = {
            "robot_id": isinstance(self.robot_id, str),
            "offset_rad": len(self.offset_rad) == ACT_DIM
            and all(_is_number(each) and abs(each) <= MAX_OFFSET_RAD for each in self.offset_rad),
            "gain_factor": _is_number(self.gain_factor) and low <= self.gain_factor <= high,
            "camera_turned": isinstance(self.camera_turned, bool),
            "steps": isinstance(self.steps, dict)
            and all(isinstance(each, dict) and isinstance(each.get("date"), str) for each in self.steps.values()),
        }
        for name, good in valid.items():
            if name in missing or not good:
                raise ValueError(f"{name} is {'missing' if name in missing else 'impossible'}")


def _is_number(value: Any) -> bool:
    """Whether a JSON value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---------------------------------------------------------------------------------------------------------------------
# kinematics of the fingertip

WRIST_FLEX = 3
OPEN_RAD = 0.4  # the gripper, open: only the fixed finger touches the table


class Place(NamedTuple):
    """Where and how the fixed fingertip is held."""

    reach_m: float  # horizontal distance from the shoulder_pan axis
    pan_rad: float  # positive to the right of the arm, as the joint counts
    tilt_rad: float  # from the gripper's pitch at home, where it points down; negative points outwards


class Fingertip:
    """Kinematics of the fixed finger's lowest point."""

    def __init__(self) -> None:
        self.model = load_model()
        self.data = mujoco.MjData(self.model)
        self.geom = self.model.geom("fixed_finger_col").id
        self.body = int(self.model.geom_bodyid[self.geom])

    def point_m(self, joints_rad: np.ndarray) -> np.ndarray:
        """Position (3,), m, of the point at joint positions (6,), rad."""
        self.data.qpos[:ACT_DIM] = joints_rad
        mujoco.mj_kinematics(self.model, self.data)
        return self.data.geom_xpos[self.geom] - (0.0, 0.0, FINGER_RADIUS_M)

    def jacobian(self, joints_rad: np.ndarray) -> np.ndarray:
        """Motion of the point per motion of each joint, (3, 6), m per rad."""
        point = self.point_m(joints_rad) + (0.0, 0.0, FINGER_RADIUS_M)
        mujoco.mj_comPos(self.model, self.data)
        matrix = np.zeros((3, self.model.nv))
        mujoco.mj_jac(self.model, self.data, matrix, None, point, self.body)
        return matrix[:, :ACT_DIM]

    def gravity_n_m(self, joints_rad: np.ndarray) -> np.ndarray:
        """Torque (6,), N m, that holds the joints at rest at joint positions (6,), rad."""
        self.data.qpos[:ACT_DIM], self.data.qvel[:] = joints_rad, 0.0
        mujoco.mj_forward(self.model, self.data)
        return self.data.qfrc_bias[:ACT_DIM].copy()

    def force_n(self, joints_rad: np.ndarray, torque_n_m: np.ndarray) -> float:
        """Upward force, N, on the point that changes the servos' torques at rest by torque_n_m, (6,)."""
        matrix = self.jacobian(joints_rad)[:, : WRIST_FLEX + 1]
        return -float(np.linalg.lstsq(matrix.T, torque_n_m[: WRIST_FLEX + 1], rcond=None)[0][2])

    def joints_at(self, place: Place, height_m: float) -> np.ndarray:
        """Joint positions (6,), rad, with the point at a place and height above the table, gripper open."""
        joints = np.array([place.pan_rad, *HOME_RAD[1:5], OPEN_RAD])
        joints[WRIST_FLEX] += place.tilt_rad
        out = np.array([np.cos(place.pan_rad), -np.sin(place.pan_rad)])  # positive pan turns to the right
        for _ in range(30):
            left = self.point_m(joints)
            left = np.array([place.reach_m - (left[:2] - PAN_AXIS_M) @ out, height_m - left[2]])
            if np.abs(left).max() < 1e-6:
                break
            matrix = self.jacobian(joints)
            plane = np.stack([out @ matrix[:2], matrix[2]])
            # wrist_flex turns back what the other two turn, so that the gripper keeps its pitch
            plane = plane[:, SHOULDER_LIFT:WRIST_FLEX] - plane[:, [WRIST_FLEX]]
            step = np.linalg.solve(plane.T @ plane + 1e-8 * np.eye(2), plane.T @ left)
            step *= min(1.0, 0.3 / np.abs(step).max())
            joints[SHOULDER_LIFT : WRIST_FLEX + 1] += *step, -step.sum()
        low_rad, high_rad = self.model.actuator_ctrlrange.T
        if np.abs(left).max() < 1e-6 and (low_rad < joints).all() and (joints < high_rad).all():
            return joints
        raise SO101Error(f"the fingertip cannot be held {1000 * place.reach_m:.0f} mm ahead of the shoulder_pan axis")


# ---------------------------------------------------------------------------------------------------------------------
# the servo gain, from the sag under gravity

# The two joints that carry most weight each move down and up slowly, high above the table: number, pose at the start,
# and travel, rad. The torque keeps its sign, and changes by a factor of two to three.
SWEEPS = (
    (SHOULDER_LIFT, np.array([0.0, -0.35, -0.60, 0.80, HOME_RAD[4], OPEN_RAD]), 0.65),
    (ELBOW_FLEX, np.array([0.0, -0.40, -0.75, 0.60, HOME_RAD[4], OPEN_RAD]), 0.85),
)
SWEEP_RAD_S, SWEEP_SETTLE_S = 0.12, 0.6
# With less torque than this, friction and damping can turn its sign, and backlash no longer adds a constant
SWEEP_MIN_N_M = 0.2
# By how much the command window is wider in the air. Servos with 0.36 of the assumed gain sag by this much more. It
# allows a torque of 1.5 N m against an obstacle, so nothing may be in reach of the arm.
AIR_WINDOW_RAD = 0.14
# Motions in the air correct a smaller share of what is left per step than Loop.go does elsewhere, because servos with
# half of the gain that is assumed are slow: with more, they oscillate about the goal
GO_SHARE = 0.07


class Gain(NamedTuple):
    """The servos' gain as measured, as a factor of the gain at their P coefficient."""

    factor: float  # mean of shoulder_lift and elbow_flex
    error: float  # half of their difference, plus the standard error of the fit
    joints: tuple[float, float]  # factors of shoulder_lift and elbow_flex
    backlash_rad: tuple[float, float]  # backlash of shoulder_lift and elbow_flex


MAX_BACKLASH_RAD = float(np.deg2rad(1.75))  # with more, the included policy succeeds less often
MAX_MISFIT_M = 0.0015


def servo_advice(gain: Gain, offsets: Offsets) -> list[str]:
    """What to mend on an arm before its first run, a sentence each; empty if nothing."""
    advice = []
    for joint, backlash_rad in zip((SHOULDER_LIFT, ELBOW_FLEX), gain.backlash_rad):
        if backlash_rad > MAX_BACKLASH_RAD:
            degrees = np.rad2deg(backlash_rad)
            advice.append(f"{JOINTS[joint]} has {degrees:.1f} degrees of backlash: tighten its horn and screws")
    if offsets.misfit_m > MAX_MISFIT_M:
        millimetres = 1000 * offsets.misfit_m
        advice.append(f"the touches miss a level table by {millimetres:.1f} mm: clamp the base, on a flat table")
    return advice


class Sag(NamedTuple):
    """One joint's slow motion in the air, in the coordinates of the encoders."""

    joint: int
    command_rad: np.ndarray  # (T,), of this joint
    joints_rad: np.ndarray  # (T, 6)
    direction: np.ndarray  # (T,), 1 or -1


# ---------------------------------------------------------------------------------------------------------------------
# touching the table

# Far apart, so that shoulder_lift and elbow_flex can be told apart, and tilted, so that the tip presses without jamming
TOUCHES = (Place(0.16, 0.5, -0.6), Place(0.28, 0.25, -0.3), Place(0.33, -0.25, -0.6), Place(0.20, -0.5, -0.6))
HOVER_M, LOWEST_M = 0.06, -0.03  # height, by the offsets known so far, where a touch begins, and where it is given up
LOWER_M_S, LIFT_M_S = 0.007, 0.04
# The tip touches when the servos' torques have changed as by a force of PRESS_N on it, and it has fallen by less than
# STALL_M in the last STALL_STEPS control steps (means over four). Torques are compared with those FREE_STEPS control
# steps ago, in the air, so that friction, backlash and a gain that is 20 % off are not taken for a force; the first
# SETTLE_STEPS are left out. The tip's goal is at most LEAD_M below the tip.
PRESS_N, STALL_STEPS, STALL_M, SETTLE_STEPS, FREE_STEPS, LEAD_M = 0.7, 12, 0.0006, 25, (54, 42), 0.008
OFFSET_PRIOR_RAD = float(np.deg2rad(3.0))  # standard deviation of the offsets that are fitted
WRIST_PRIOR_RAD = float(np.deg2rad(1.0))
CONTACT_ERROR_M = 0.0007  # standard deviation of a touch: table, encoder, shape of the fingertip


class Offsets(NamedTuple):
    """Joint offsets as measured by touching the table."""

    offset_rad: np.ndarray  # (6,), encoder minus true position; zero except for lift, elbow and wrist
    error_rad: np.ndarray  # (6,), standard deviation
    misfit_m: float  # root mean square of the fingertip's height at the touches, after the correction


def fit_offsets(finger: Fingertip, touched_rad: Sequence[np.ndarray]) -> Offsets:
    """Joint offsets that put the fingertip at the table's height in every touch.

    Only shoulder_lift and elbow_flex are well determined. wrist_flex is kept near zero by a tighter prior; with the
    gripper pointing down it moves the tip's height little.

    Args:
        finger: kinematics.
        touched_rad: joint positions (6,), rad, as the encoders measured them, of each touch.
    """
    fitted = [SHOULDER_LIFT, ELBOW_FLEX, WRIST_FLEX]
    prior = np.array([OFFSET_PRIOR_RAD, OFFSET_PRIOR_RAD, WRIST_PRIOR_RAD])
    offset = np.zeros(ACT_DIM)
    for _ in range(10):
        heights = np.array([finger.point_m(each - offset)[2] for each in touched_rad])
        rows = np.array([-finger.jacobian(each - offset)[2, fitted] for each in touched_rad])
        information = rows.T @ rows / CONTACT_ERROR_M**2 + np.diag(1 / prior**2)
        gradient = rows.T @ heights / CONTACT_ERROR_M**2 + offset[fitted] / prior**2
        offset[fitted] -= np.linalg.solve(information, gradient)
    heights = np.array([finger.point_m(each - offset)[2] for each in touched_rad])
    error = np.zeros(ACT_DIM)
    error[fitted] = np.sqrt(np.diag(np.linalg.inv(information)))
    return Offsets(offset, error, float(np.sqrt(np.mean(heights**2))))


def fit_gain(finger: Fingertip, sags: Sequence[Sag], gain_n_m: np.ndarray, offset_rad: np.ndarray) -> Gain:
    """The factor of the servo gain that explains how far the joints hang below their commands.

    Command minus position is torque / gain, plus half the backlash in the direction of the torque, plus what friction,
    damping and latency add in the direction of motion. The fit of all three leaves the gain free of the last two.

    Args:
        finger: kinematics and masses.
        sags: slow motions of joints, up and down.
        gain_n_m: gain (6,), N m/rad, that counts as 1.
        offset_rad: encoder minus true position, (6,), rad.

    Raises:
        RobotError: the motion does not fit any plausible servo.
    """
    factors, errors, backlashes = [], [], []
    for sag in sags:
        torque = np.array([finger.gravity_n_m(each - offset_rad)[sag.joint] for each in sag.joints_rad])
        hangs = sag.command_rad - sag.joints_rad[:, sag.joint]
        heavy = np.abs(torque) > SWEEP_MIN_N_M
        if heavy.sum() < CONTROL_HZ:
            raise RobotError(f"{JOINTS[sag.joint]} carries too little weight in its motion: calibrate the arm again")
        torque, hangs, direction = torque[heavy], hangs[heavy], sag.direction[heavy]
        columns = np.stack([torque / gain_n_m[sag.joint], np.sign(torque), direction], axis=1)
        (softness, play, _), residuals, _, _ = np.linalg.lstsq(columns, hangs, rcond=None)
        # samples are correlated: a second of them counts as three
        count = len(hangs) * 3 / CONTROL_HZ
        variance = residuals[0] / len(hangs) / count * np.linalg.inv(columns.T @ columns / len(hangs))[0, 0]
        low, high = GAIN_RANGE
        if not 1 / high < softness < 1 / low:
            raise RobotError(
                f"{JOINTS[sag.joint]} hangs {np.rad2deg(np.abs(hangs).max()):.1f} degrees below its command, which no "
                "servo explains: is something in the arm's way, a horn loose, or the supply too weak?"
            )
        factors.append(float(1 / softness))
        errors.append(float(np.sqrt(variance)) / softness**2)
        backlashes.append(float(max(2 * play, 0.0)))
    factor = float(np.mean(factors))
    error = abs(factors[0] - factors[1]) / 2 + float(np.hypot(*errors)) / 2
    return Gain(factor, error, tuple(factors), tuple(backlashes))


# ---------------------------------------------------------------------------------------------------------------------
# directions, the camera's side, friction

# what a person sees when a joint moves in its positive direction, from RAISED_OPEN_RAD
DIRECTIONS = (
    "the arm turn to its right, seen from behind its base",
    "the whole arm lean forwards, away from its base",
    "the forearm go down",
    "the gripper bend down and back, towards the base",
    "the gripper turn counterclockwise, seen from above",
    "the gripper open",
)
RAISED_OPEN_RAD = RAISED_RAD + np.array([0.0, 0.0, 0.0, 0.0, 0.0, OPEN_RAD])
ASIDE_PAN_RAD = float(ASIDE_RAD[0])  # shoulder_pan to either side: the arm hides neither sheet nor tape
NUDGE_RAD, NUDGE_RAD_S, NUDGE_WAIT_S = float(np.deg2rad(5.0)), 0.3, 0.7
SLACK_RAD = float(np.deg2rad(4.0))  # moved before, so that friction and backlash do not count
# how far the joint may be from there, and how far the others may move: other friction, and sag
NUDGE_ERROR_RAD, NUDGE_OTHERS_RAD = float(np.deg2rad(2.0)), float(np.deg2rad(2.0))


class Nudge(NamedTuple):
    """A joint's move of five degrees, as its encoder saw it."""

    moved_rad: float
    question: str  # for the person who watches


STILL_S, PICTURE_WAIT_S = 0.2, 2.0  # after a motion: until the arm is still, and at most until there is a picture of it
CHANGED = 20.0  # a pixel that differs by this much, in 1/255, after a blur over 5 pixels, shows something that moved
MIN_CHANGED = 0.003  # share of the picture that the arm must cover
MAX_RESTLESS = 0.3  # share of the change that may also be between two pictures with the arm in the same pose
MIN_SHIFT_M, MIN_ALONG = 0.06, 0.7  # across the table, and as the cosine to its y axis, between the arm's two sides


class Side(NamedTuple):
    """On which side of the table the camera stands."""

    turned: bool  # on the arm's side, so that the picture is turned by half a turn
    shift_m: float  # how far the arm moved to its left in the picture, as if the camera stood opposite the arm
    along: float  # cosine between that motion and the table's y axis, in [-1, 1]


def camera_side(left: np.ndarray, middle: np.ndarray, right: np.ndarray, to_picture: np.ndarray) -> Side:
    """On which side a camera stands, by where it sees the arm.

    The rectangle of tape looks the same from both sides, so a homography that was found from the tape is that of a
    camera opposite the arm. The table's y axis in it points to the arm's left. If the arm is seen to move to the right
    when it moves to the left, the camera stands on the arm's side.

    Args:
        left, middle, right: pictures (H, W, 3) uint8 with the arm turned to its left, ahead, and to its right.
        to_picture: homography (3, 3) from the table, m, to pixels, the result of SheetLocator.find_tape.

    Raises:
        NotSeen: the arm is not seen to move across the picture.
    """
    cv2 = import_extra("cv2", "arm", "finding the camera's side")
    pictures = [cv2.blur(each.astype(np.float32), (5, 5)) for each in (left, middle, right)]
    background, centers = np.median(pictures, axis=0), []
    for picture in (pictures[0], pictures[2]):
        rows, columns = np.nonzero(np.abs(picture - background).max(axis=2) > CHANGED)
        if len(rows) < MIN_CHANGED * background[..., 0].size:
            raise NotSeen("the camera does not see the arm move: does it look at the table, and is this its index?")
        centers.append((columns.mean(), rows.mean()))
    moved = np.subtract(*centers)
    ends = project(to_picture, TAPE_CENTER_M + np.array([[0.0, 0.05], [0.0, -0.05]]))
    axis = (ends[0] - ends[1]) / 0.1  # pixels per m
    shift_m, along = moved @ axis / (axis @ axis), moved @ axis / np.linalg.norm(axis) / np.linalg.norm(moved)
    if abs(shift_m) < MIN_SHIFT_M or abs(along) < MIN_ALONG:
        raise NotSeen(
            "the camera does not see the arm move along the long sides of the tape: it must stand opposite the arm, or "
            "behind it, and see both of its sides"
        )
    return Side(bool(shift_m < 0), float(shift_m), float(along))


DRAG_M, DRAG_LONGEST_M, DRAG_M_S, DRAG_DEPTH_M, DRAG_TILT_RAD = 0.02, 0.05, 0.03, 0.006, -0.6
DRAG_REACH_M, DRAG_INSET_M = (0.22, 0.32), 0.02  # where a drag may begin, and how far inside the sheet's edges
GRIPS = 0.7  # share of the tip's path that a sheet must follow


class Grip(NamedTuple):
    """How a sheet followed the fingertip that pressed on it."""

    share: float  # the sheet's path as a share of the tip's
    tip_m: float  # length of the tip's path
    advice: str  # empty if the fingertip grips


def _place_on_sheet(pose: np.ndarray) -> Place:
    """The place on a sheet with pose (3,), m and rad, nearest to its centre from which it can be dragged to the base.

    Raises RobotError if there is none.
    """
    forward = pose[:2] - PAN_AXIS_M
    reach_m, bearing = float(np.hypot(*forward)), forward / np.hypot(*forward)
    within_m = float(np.clip(reach_m, *DRAG_REACH_M))
    point = PAN_AXIS_M + within_m * bearing
    if distance_to_rectangle(point[None], pose[None, :2], pose[2:], SHEET_HALF_M, DRAG_INSET_M)[0] > 0:
        raise RobotError("the sheet is too near to the arm, or too far: lay it into the middle of the tape")
    return Place(within_m, float(-np.arctan2(bearing[1], bearing[0])), DRAG_TILT_RAD)


def _raised(pan_rad: float) -> np.ndarray:
    """RAISED_OPEN_RAD with another shoulder_pan."""
    return np.append(pan_rad, RAISED_OPEN_RAD[1:])


class ArmCheck:
    """The steps of the check that move the arm. Each leaves the fingertip above the table.

    After an error the arm is where it was, for Loop.leave.

    Args:
        loop: on the arm; its policy is not used. Its offset_rad and the gain_factor of its controller
            are where the check begins, and change with what it measures.
    """

    def __init__(self, loop: Loop):
        self.loop, self.finger = loop, Fingertip()
        self.loop.measure()

    @property
    def gain_factor(self) -> float:
        """Gain of the servos as a factor of that at their P coefficient, as far as it is known."""
        return self.loop.controller.gain_factor

    def believe(self, gain_factor: float, offset_rad: np.ndarray) -> None:
        """Go on with this gain and these joint offsets (6,), rad. The arm's present targets remain."""
        controller, moved = self.loop.controller, self.loop.offset_rad - offset_rad
        controller.gain_factor, controller.gain_floor = gain_factor, 1.0
        if controller.command_rad is not None:
            controller.command_rad = controller.command_rad + moved
        self.loop.offset_rad = offset_rad
        controller.joints_rad = controller.joints_rad + moved
        self.loop.measure()

    def follow(self, joints_rad: np.ndarray) -> None:
        """One control step towards joint positions (6,), rad, on a path; then measure."""
        c = self.loop.controller
        self.loop.move(joints_rad + c.gravity_n_m / c.gain - c.command_rad)
        self.loop.clock.wait()
        self.loop.measure()

    @contextlib.contextmanager
    def in_air(self) -> Iterator[None]:
        """Widen the command window, so that an arm whose gain is not known yet can carry itself."""
        controller = self.loop.controller
        slack_rad, controller.slack_rad = controller.slack_rad, AIR_WINDOW_RAD
        try:
            yield
        finally:
            controller.slack_rad = slack_rad

    def go(self, joints_rad: np.ndarray) -> None:
        """Move slowly to joint positions (6,), rad, above the table.

        Raises:
            RobotError: the arm does not arrive.
        """
        with self.in_air():
            self.loop.go(joints_rad, GO_SHARE, touch_rad=0.0)

    # -- the gain

    def measure_sag(self) -> list[Sag]:
        """Move shoulder_lift and elbow_flex up and down in the air.

        Raises:
            RobotError: a joint does not follow.
        """
        loop, sags = self.loop, []
        with self.in_air():
            for joint, start_rad, travel_rad in SWEEPS:
                self.go(start_rad)
                step, commands, joints, directions = np.zeros(ACT_DIM), [], [], []
                loop.clock.start()
                for direction in (1, -1):
                    step[joint] = direction * SWEEP_RAD_S / CONTROL_HZ
                    for tick in range(round(travel_rad / SWEEP_RAD_S * CONTROL_HZ)):
                        loop.move(step)
                        loop.clock.wait()
                        loop.measure()
                        if tick >= SWEEP_SETTLE_S * CONTROL_HZ:
                            c = loop.controller
                            commands.append(c.command_rad[joint] + self.loop.offset_rad[joint])
                            joints.append(c.joints_rad + self.loop.offset_rad)
                            directions.append(direction)
                sags.append(Sag(joint, np.array(commands), np.array(joints), np.array(directions)))
        return sags

    def fit_gain(self, sags: Sequence[Sag]) -> Gain:
        """The gain by the motions of measure_sag, with the joint offsets that are known by now."""
        gain_n_m = self.loop.controller.gain / self.gain_factor
        return fit_gain(self.finger, sags, gain_n_m, self.loop.offset_rad)

    # -- touching the table

    def touch(self, place: Place) -> np.ndarray:
        """Lower the fingertip until it rests on the table, measure, and lift it again.

        The command window bounds the force; the descent ends when the tip presses by about 1 N.

        Args:
            place: where.

        Returns:
            Joint positions (6,), rad, at rest on the table, in the coordinates of the encoders.

        Raises:
            RobotError: no table was felt.
        """
        self.hover(place)
        touched_rad = self._lower(place)
        self._lift(place)
        return touched_rad

    def hover(self, place: Place) -> None:
        """Move the fingertip to HOVER_M above a place, by way of a raised pose."""
        for joints_rad in (_raised(place.pan_rad), self.finger.joints_at(place, HOVER_M)):
            self.go(joints_rad)
        self.loop.clock.start()

    def _lower(self, place: Place) -> np.ndarray:
        """See touch."""
        joints, torques, heights, aim_m = [], [], [HOVER_M], HOVER_M
        while heights[-1] > LOWEST_M and aim_m > LOWEST_M - LEAD_M:
            aim_m = max(aim_m - LOWER_M_S / CONTROL_HZ, heights[-1] - LEAD_M)
            self.follow(self.finger.joints_at(place, aim_m))
            c = self.loop.controller
            joints.append(c.joints_rad)
            torques.append(c.gain * (c.command_rad - c.joints_rad) - c.gravity_n_m)
            heights.append(float(self.finger.point_m(c.joints_rad)[2]))
            if len(joints) < SETTLE_STEPS + FREE_STEPS[0]:
                continue
            free = np.mean(torques[-FREE_STEPS[0] : -FREE_STEPS[1]], axis=0)
            force_n = self.finger.force_n(c.joints_rad, np.mean(torques[-4:], axis=0) - free)
            fell_m = np.mean(heights[-4 - STALL_STEPS : -STALL_STEPS]) - np.mean(heights[-4:])
            if fell_m < STALL_M and (force_n > PRESS_N or aim_m < heights[-1] - LEAD_M + STALL_M):
                return np.mean(joints[-4:], axis=0) + self.loop.offset_rad
        raise RobotError(
            f"no table was felt within {-1000 * LOWEST_M:.0f} mm of the height of the base: is there a table below the "
            "fingertip, and was every joint calibrated to both of its stops?"
        )

    def _lift(self, place: Place) -> None:
        """Lift the fingertip to HOVER_M."""
        self.loop.measure()
        height_m = float(self.finger.point_m(self.loop.controller.joints_rad)[2])
        with self.in_air():
            while height_m < HOVER_M:
                height_m += LIFT_M_S / CONTROL_HZ
                self.follow(self.finger.joints_at(place, height_m))

    def measure_offsets(self) -> Offsets:
        """Touch the table at several places, and go on with the joint offsets that follow."""
        touched: list[np.ndarray] = []  # joint positions (6,), rad, in the coordinates of the encoders
        for place in TOUCHES:
            touched.append(self.touch(place))
            offsets = fit_offsets(self.finger, touched)
            joint = int(np.abs(offsets.offset_rad).argmax())
            if abs(offsets.offset_rad[joint]) > MAX_OFFSET_RAD:
                degrees = np.rad2deg(offsets.offset_rad[joint])
                raise RobotError(
                    f"the zero of {JOINTS[joint]} is off by {degrees:.0f} degrees: calibrate the arm again"
                )
            self.believe(self.gain_factor, offsets.offset_rad)
        return offsets

    def measure_servos(self) -> tuple[Gain, Offsets]:
        """Measure gain and joint offsets, and go on with them.

        The sag under gravity gives a first gain. Joint offsets of a few degrees change it by up to 20 %, which is good
        enough for touching the table. The joint offsets that follow then give the gain to a few percent.

        Raises:
            RobotError: something is in the arm's way, or the table is not where it should be.
        """
        sags = self.measure_sag()
        self.believe(self.fit_gain(sags).factor, self.loop.offset_rad)
        offsets = self.measure_offsets()
        gain = self.fit_gain(sags)
        self.believe(gain.factor, self.loop.offset_rad)
        return gain, offsets

    # -- directions

    def nudge(self, joint: int) -> Nudge:
        """Move one joint by five degrees in its positive direction and back, after taking up friction and backlash.

        Raises:
            RobotError: the joint did not move that far, or another one moved.
        """
        self.go(RAISED_OPEN_RAD)
        before = self._step(joint, SLACK_RAD)
        moved = self._step(joint, NUDGE_RAD) - before
        self._step(joint, -NUDGE_RAD - SLACK_RAD)
        others = np.abs(np.delete(moved, joint))
        if others.max() > NUDGE_OTHERS_RAD:
            other = [name for name in JOINTS if name != JOINTS[joint]][int(others.argmax())]
            raise RobotError(
                f"{other} moved by {np.rad2deg(others.max()):.0f} degrees when {JOINTS[joint]} should: are their servo "
                "ids swapped? run lerobot-setup-motors"
            )
        if abs(moved[joint] - NUDGE_RAD) > NUDGE_ERROR_RAD:
            raise RobotError(
                f"{JOINTS[joint]} moved by {np.rad2deg(moved[joint]):.1f} degrees instead of 5: is something in its "
                "way, its horn loose, or its torque off?"
            )
        return Nudge(float(moved[joint]), f"{JOINTS[joint]} moved by 5 degrees and back: did {DIRECTIONS[joint]}?")

    def _step(self, joint: int, delta_rad: float) -> np.ndarray:
        """Change one joint's target slowly, and return the joint positions (6,), rad, at rest."""
        loop, step = self.loop, np.zeros(ACT_DIM)
        count = max(round(abs(delta_rad) / NUDGE_RAD_S * CONTROL_HZ), 1)
        step[joint] = delta_rad / count
        loop.clock.start()
        with self.in_air():
            for tick in range(count + round(NUDGE_WAIT_S * CONTROL_HZ)):
                loop.move(step * (tick < count))
                loop.clock.wait()
                loop.measure()
        return loop.controller.joints_rad

    # -- the camera's side

    def find_side(self, locator: SheetLocator) -> Side:
        """Turn the raised arm to both sides, and find out on which side of the table the camera stands.

        Args:
            locator: for a camera opposite the arm.

        Raises:
            NotSeen: the tape is not seen, or not the arm, or something else moves.
        """
        pictures = {}
        aside = ASIDE_PAN_RAD
        for name, pan_rad in (("left", -aside), ("middle", 0.0), ("right", aside), ("again", -aside)):
            pictures[name] = self.look(pan_rad)
        left, middle, right, again = pictures.values()
        restless = [np.abs(each.astype(np.float32) - left).max(axis=2) > 2 * CHANGED for each in (again, right)]
        if restless[0].sum() > MAX_RESTLESS * restless[1].sum():
            raise NotSeen("the picture changes while the arm is still: keep out of it, and switch off flickering light")
        reason: NotSeen | None = None
        for picture in (middle, left, right):  # the arm may hide a part of the tape in one of them
            try:
                return camera_side(left, middle, right, locator.find_tape(picture))
            except NotSeen as error:
                reason = error
        raise reason

    def look(self, pan_rad: float) -> np.ndarray:
        """A picture (H, W, 3) uint8 with the arm raised and turned."""
        self.go(_raised(pan_rad))
        still_s = self.loop.clock.now() + STILL_S
        for _ in range(round(PICTURE_WAIT_S * CONTROL_HZ)):
            self.loop.clock.sleep(1 / CONTROL_HZ)
            self.loop.measure()
            if (picture := self.loop.robot.picture()).time_s >= still_s:
                return picture.image
        raise RobotError(f"the camera has taken no picture in {PICTURE_WAIT_S:.0f} s: is it unplugged?")

    # -- friction of the fingertip

    def measure_grip(self, locator: SheetLocator) -> Grip:
        """Press on the sheet, drag it by 20 mm towards the base, and see how far it followed.

        Args:
            locator: for this camera's side.

        Raises:
            NotSeen: tape or sheet is not seen.
            RobotError: the sheet is out of reach, is not felt, or does not move.
        """
        picture = self.look(ASIDE_PAN_RAD)
        to_picture = locator.find_tape(picture)
        before = locator.locate(picture, to_picture)
        place = _place_on_sheet(before)
        self.hover(place)
        self._lower(place)
        start = self.finger.point_m(self.loop.controller.joints_rad)
        tip, aim = np.zeros(2), place
        while np.linalg.norm(tip) < DRAG_M:
            if aim.reach_m < place.reach_m - DRAG_LONGEST_M:
                raise RobotError("the pressed fingertip does not move over the paper: is the sheet held, or sticky?")
            aim = aim._replace(reach_m=aim.reach_m - DRAG_M_S / CONTROL_HZ)
            self.follow(self.finger.joints_at(aim, start[2] - DRAG_DEPTH_M))
            tip = (self.finger.point_m(self.loop.controller.joints_rad) - start)[:2]
        self._lift(place._replace(reach_m=place.reach_m - DRAG_M))
        after = locator.locate(self.look(ASIDE_PAN_RAD), to_picture)
        # where the paper under the tip went: the sheet may have turned, too
        under = rotate((start[:2] - before[:2])[None], np.array([after[2] - before[2]]))[0]
        share = float((after[:2] + under - start[:2]) @ tip / (tip @ tip))
        advice = "" if share >= GRIPS else "the fingertip slips on the paper: put a rubber band around it"
        return Grip(share, float(np.linalg.norm(tip)), advice)
