"""The control loop: thirty times a second from joints and picture to joint targets."""

from __future__ import annotations

import collections
import os
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from so101.arm_film import CameraFilm
from so101.base import BasePolicy
from so101.cli import Stop, silence_output
from so101.extras import import_extra
from so101.opencv import OpenCVPolicy
from so101.robot import SAY_AGAIN_S, Picture, Robot, RobotError, ServoFault, signals_wait
from so101_env import (
    HOME_RAD,
    SUCCESS_STEPS,
    TAPE_CENTER_M,
    BaseObservation,
    Task,
    base_observation,
    load_model,
    make_observation,
    sheet_inside,
)
from so101_sim.control import (
    ACT_DIM,
    BACKLASH_RAD,
    GAIN_FLOOR,
    JOINTS,
    LATENCY_S,
    Calibration,
    Controller,
    from_rad,
    valid_delta,
)
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ

HOME_SPEED_RAD_S, HOME_NEAR_RAD = 0.4, 0.015  # slow motions, between poses
PASSING_RAD = 0.1  # near enough to a pose that is only passed
HOME_WAIT_S, HOME_WAITS = 10.0, 1.5  # s, and a factor of the time at full speed: what they may take
# an arm that stops this near its goal for this long has met the table: its zero or the table's height is off
HOME_TOUCH_RAD, HOME_STILL_RAD, HOME_STILL_S = float(np.deg2rad(5.0)), 0.002, 1.0
REST_S = 0.5  # until an arm that was moving is at rest
HOME_SHARE = 0.2  # share of the remaining distance per step; with more, an arm with latency oscillates about its goal
RAISED_RAD = HOME_RAD - np.array([0.0, 0.35, 0, 0, 0, 0])  # tip well above the table, for the way to and from home
ASIDE_RAD = np.array([0.9, 0.0, 0, 0, 0, 0])  # from RAISED_RAD to either side, out of the camera's view
# Folded, the fingertip 23 mm above the table: without torque the model's joints fall by at most 4 degrees. On the
# straight way from RAISED_RAD no part of the arm touches the table.
REST_RAD = np.array([0.0, -1.70, 1.50, 1.20, HOME_RAD[4], 0.0])
PICTURE_AGE_S = 0.25  # older pictures are not used
POSE_ERROR_M = 0.003  # a sheet counts as seen inside the tape if it is at least this far from the tape
MISSED_MANY = 8  # deadlines missed in a second that are worth a line


def say(text: str) -> None:
    """Print a line to stderr, beside a progress bar. If nobody can read it any more, the arm's motion goes on."""
    try:
        tqdm.write(text, file=sys.stderr)
    except OSError:
        silence_output()


def ask(question: str, robot: Robot) -> str:
    """What a person at the terminal answers to a question; meanwhile an arm under torque is watched.

    Raises:
        SO101Error: there is no terminal.
        RobotError: the arm is lost, or a servo must not hold it any longer.
    """
    try:
        if sys.stdin is None:  # started with its descriptor closed
            raise EOFError("it is closed")
        return read_line(question, robot.watch if robot.enabled else lambda: None).strip().lower()
    except BrokenPipeError:
        raise
    except (EOFError, OSError, UnicodeDecodeError) as error:
        raise SO101Error(f"no terminal to press Enter at, without which an arm does not move ({error})") from error


def read_line(question: str, idle: Callable[[], Any]) -> str:
    """What standard input answers to a question; meanwhile idle is called at CONTROL_HZ. Raises EOFError at its end.

    Keys that were pressed before the question is printed are discarded: the person did not know it.
    """
    line, descriptor = b"", sys.stdin.fileno()
    if os.isatty(descriptor):
        termios.tcflush(descriptor, termios.TCIFLUSH)
    print(question, end="", flush=True)
    while not line.endswith(b"\n"):
        while not select.select([descriptor], [], [], 1 / CONTROL_HZ)[0]:
            idle()
        letter = os.read(descriptor, 1)  # not more: select does not see what Python has read ahead
        if not letter:
            if not line:
                raise EOFError("it has ended")
            break
        line += letter
    return line.decode()


class Blind(SO101Error):
    """The policy has no view of what it needs to see. The message is the reason."""


class Clock:
    """Ticks at CONTROL_HZ, counts missed deadlines, and says so when there are many in a second."""

    def __init__(self) -> None:
        self.ticks, self.missed, self.worst_s = 0, 0, 0.0
        self._late = collections.deque([0.0] * CONTROL_HZ, CONTROL_HZ)  # s, in the last second
        self._said_s = -np.inf
        self.start()

    def now(self) -> float:
        """Time in s, of the same clock as the robot's measurements."""
        return time.monotonic()

    def start(self) -> None:
        """Start counting: this is a tick."""
        self.due = self.now()

    def wait(self) -> None:
        """Wait until the next tick. If it has passed already, it counts as missed, and the next wait starts now."""
        self.due, now = self.due + 1 / CONTROL_HZ, self.now()
        self.ticks, self.worst_s = self.ticks + 1, max(self.worst_s, now - self.due + 1 / CONTROL_HZ)
        self._late.append(now - self.due)
        if now > self.due:
            self.missed, self.due = self.missed + 1, now
            missed = sum(late > 0 for late in self._late)
            if missed >= MISSED_MANY and now - self._said_s > SAY_AGAIN_S:
                self._said_s = now
                worst_ms = 1000 * (max(self._late) + 1 / CONTROL_HZ)
                step = f"the longest step took {worst_ms:.0f} ms"
                say(f"{missed} of {CONTROL_HZ} deadlines missed, {step}: close other programs")
        self.sleep(self.due - now)

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        time.sleep(seconds)


def make_controller(
    robot: Robot, task: Task, max_speed_rad_s: float = 2.0, measured: Calibration | None = None
) -> Controller:  # fmt: skip
    """The command law for an arm; it estimates the servo gain, unless robot.gain_known. Arguments: see Controller."""
    return Controller(
        load_model(task.tape_margin), task.firmware_p, BACKLASH_RAD, LATENCY_S, max_speed_rad_s, robot.servo_gain,
        1.0 if robot.gain_known else GAIN_FLOOR, measured,
    )  # fmt: skip


def way_to(
    controller: Controller, goal_rad: np.ndarray, share: float = HOME_SHARE, touch_rad: float = HOME_TOUCH_RAD,
    speed_rad_s: float = HOME_SPEED_RAD_S, near_rad: float = HOME_NEAR_RAD,
) -> Iterator[np.ndarray]:  # fmt: skip
    """A slow motion: joint deltas (6,), rad, one per control step. Measure between them.

    Args:
        controller: of the arm.
        goal_rad, share, touch_rad: see `Loop.go`.
        speed_rad_s: of the fastest joint.
        near_rad: distance of every joint from its goal at which the motion ends.

    Raises:
        RobotError: the arm does not arrive.
    """
    step, nearest, still = speed_rad_s / CONTROL_HZ, np.inf, 0
    way = np.abs(goal_rad - controller.joints_rad).max() / min(step, controller.max_step_rad)  # steps
    for _ in range(round(HOME_WAIT_S * CONTROL_HZ + HOME_WAITS * way)):
        left = goal_rad - controller.joints_rad
        far = np.abs(left).max()
        nearest, still = (far, 0) if far < nearest - HOME_STILL_RAD else (nearest, still + 1)
        if far < near_rad or (far < touch_rad and still > HOME_STILL_S * CONTROL_HZ):
            return
        yield np.clip(share * left, -step, step)
    joint = int(np.abs(left).argmax())
    raise RobotError(
        f"{JOINTS[joint]} stays {np.rad2deg(abs(left[joint])):.0f} degrees short of its goal: is something "
        "in its way, or its torque off?"
    )


def way_home(controller: Controller, speed_rad_s: float = HOME_SPEED_RAD_S) -> Iterator[np.ndarray]:
    """The slow motion to home, from above; in the air the servo gain is estimated, unless it is known. See way_to."""
    near_rad = PASSING_RAD if controller.gain_known else HOME_NEAR_RAD
    yield from way_to(controller, RAISED_RAD, speed_rad_s=speed_rad_s, near_rad=near_rad)
    if not controller.gain_known:
        yield from [np.zeros(ACT_DIM)] * round(REST_S * CONTROL_HZ)
        controller.learn_gain()
    yield from way_to(controller, HOME_RAD, speed_rad_s=speed_rad_s)


def way_up(controller: Controller) -> Iterator[np.ndarray]:
    """The slow motion that lifts the tip off the sheet. See way_to."""
    goal = controller.joints_rad.copy()
    goal[1] += RAISED_RAD[1] - HOME_RAD[1]
    yield from way_to(controller, np.maximum(goal, controller.low_rad + HOME_NEAR_RAD))


def way_from(controller: Controller) -> Iterator[np.ndarray]:
    """The slow motion to home from any pose: first up, if the tip may be at the table. See way_to."""
    if controller.joints_rad[1] > RAISED_RAD[1]:
        yield from way_up(controller)
    yield from way_home(controller)


def observe(
    controllers: Sequence[Controller], policy: BasePolicy, images: Mapping[str, np.ndarray]
) -> BaseObservation:  # fmt: skip
    """What a policy observes of N measured arms, with pictures (N, H, W, 3) by camera, of any size.

    The sheets' poses in it are placeholders: the policy must see the sheets itself.
    """
    rows = [[getattr(c, k) for c in controllers] for k in ("joints_rad", "velocity_rad_s", "tip_m", "command_rad")]
    joints, velocities, tips, command = map(np.array, rows)
    load = np.array([c.load(c.command_rad, c.joints_rad, c.velocity_rad_s, c.gravity_n_m) for c in controllers])
    flat = make_observation(joints, velocities, tips, np.tile(np.append(TAPE_CENTER_M, 0.0), (len(joints), 1)))

    def render(camera: str, ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return np.stack([resize(image, size) for image in images[camera][ids]])

    return base_observation(flat, command, load=load, cameras=policy.cameras, render=render, size=policy.image_size)


def count_inside(streak: np.ndarray, policy: BasePolicy, tape_margin: float) -> np.ndarray:
    """How many successive pictures of each of N sheets have shown it inside the tape, (N,) int.

    Pictures that do not show the sheet do not count: the estimate of its pose is then that of an earlier one.

    Args:
        streak: the same before the last step, (N,) int.
        policy: with estimates of the poses in the last step.
        tape_margin: m between sheet and tape.
    """
    pose = policy.estimate
    if pose is None:
        return np.zeros_like(streak)
    seen = np.isfinite(pose).all(1) if policy.sees is None else policy.sees
    inside = sheet_inside(pose[:, :2], pose[:, 2], tape_margin - POSE_ERROR_M)
    return np.where(seen, (streak + 1) * inside, streak)


class Loop:
    """The control loop of a policy on an arm.

    Args:
        robot: the arm.
        policy: sees the camera; with `estimate`, the sheet's pose.
        controller: limits the targets.
        clock: keeps the rate.
        dry_run: print the targets instead of sending them.
        offset_rad: encoder minus true joint positions (6,), rad, as `so101.drive --check` finds them.
    """

    def __init__(
        self, robot: Robot, policy: BasePolicy, controller: Controller, clock: Clock, dry_run: bool = False,
        offset_rad: np.ndarray | None = None,
    ):  # fmt: skip
        self.robot, self.policy, self.controller, self.clock = robot, policy, controller, clock
        self.film: CameraFilm | None = None  # what the policy sees
        self.moves, self.missed = 0, 0  # control steps of the present episode, and deadlines missed in them
        self.dry_run, self.offset_rad = dry_run, np.zeros(ACT_DIM) if offset_rad is None else offset_rad

    def enable(self) -> None:
        """Switch the arm's torque on, if its joints are where they can be."""
        self.controller.reset()
        self.measure()
        self.robot.enable()
        self.controller.reset()  # the targets are now those of the arm at rest under torque
        self.measure()

    def measure(self) -> None:
        """Read the joints."""
        joints_rad, time_s = self.robot.read()
        self.controller.measure(joints_rad - self.offset_rad, time_s)

    def move(self, delta_rad: np.ndarray) -> None:
        """Send the last targets plus delta (6,), rad, within limits; in a dry run print them."""
        target = self.controller.move(delta_rad, self.clock.now())
        if not self.dry_run:
            self.robot.write(target + self.offset_rad)
            self.robot.watch()
            return
        joints = "  ".join(f"{joint} {degrees:7.2f}" for joint, degrees in zip(JOINTS, from_rad(target, "deg")))
        tqdm.write(f"would send  {joints}", file=sys.stdout)

    def go(self, goal_rad: np.ndarray, share: float = HOME_SHARE, touch_rad: float = HOME_TOUCH_RAD) -> None:
        """Move slowly to joint positions (6,), rad, or until the table stops the arm near them.

        Args:
            goal_rad: the joint positions.
            share: share of the remaining distance per step; weak servos need a smaller one.
            touch_rad: how far from the goal the table may stop the arm; 0: the arm must arrive.

        Raises:
            RobotError: the arm does not arrive.
        """
        self._follow(way_to(self.controller, goal_rad, share, touch_rad))

    def home(self, speed_rad_s: float = HOME_SPEED_RAD_S) -> None:
        """Move to home, from above, at speed_rad_s. In the air the servo gain is estimated, unless it is known."""
        self._follow(way_home(self.controller, speed_rad_s))

    def _follow(self, way: Iterator[np.ndarray]) -> None:
        """Move by the joint deltas (6,), rad, of a slow motion, one per control step."""
        self.clock.start()
        self.measure()
        for delta in way:
            self.move(delta)
            self.clock.wait()
            self.measure()

    def lift(self) -> None:
        """Lift the tip off the sheet."""
        self._follow(way_up(self.controller))

    def lift_if_low(self) -> None:
        """Lift the tip, unless it is raised already."""
        if self.controller.joints_rad[1] > RAISED_RAD[1]:
            self.lift()

    def leave(self, ended: BaseException | None) -> None:
        """The way out on an arm under torque: fold it slowly, then switch its torque off, and print what was done.

        A signal on the way, or an arm that cannot be moved, switches the torque off at once.

        Args:
            ended: what has ended the run; after a ServoFault the arm is not moved any more.

        Raises:
            SO101Error, Stop: what has stopped the arm on the way, or a torque that is not off; only if the run has not
                ended by an error.
        """
        if not self.robot.enabled:
            return
        where = "where it was: hold the arm, it falls"
        try:
            if isinstance(ended, ServoFault):
                say("the arm is not moved any more")
            else:
                say("the arm folds itself slowly; Ctrl+C switches its torque off at once")
                self.rest()
                where = "at rest"
        except (SO101Error, Stop) as error:
            say("stopped on the way" if isinstance(error, Stop) else f"stopped on the way: {error}")
            if ended is None:  # the first error is the one that is reported at the end
                raise
        finally:
            with signals_wait():
                if failed := self.robot.relax():
                    say(f"torque NOT off in {', '.join(failed)}: switch the arm's power off")
                else:
                    say(f"torque off {where}")
        if failed and ended is None:
            raise RobotError(f"torque not off in {', '.join(failed)}")

    def rest(self) -> None:
        """Fold the arm slowly, from wherever it is, to where it does not fall without torque.

        Raises RobotError if the arm does not arrive there.
        """
        self.controller.reset()
        self.measure()
        self.lift_if_low()
        self.go(REST_RAD)

    def observe(self, picture: Picture) -> BaseObservation:
        """The policy's observation, see the function `observe`."""
        return observe([self.controller], self.policy, dict.fromkeys(self.policy.cameras, picture.image[None]))

    def episode(self, max_steps: int, tape_margin: float) -> dict[str, Any]:
        """Act until SUCCESS_STEPS pictures have shown the sheet inside the tape, or for max_steps control steps.

        These are successive ones of those that show the sheet at all.

        With a policy that has no estimate of the sheet's pose, only max_steps end the episode.

        Args:
            max_steps: control steps until the episode ends without success.
            tape_margin: m between sheet and tape.

        Returns:
            seen_inside, whether it ended in success; ticks, its control steps; missed, the deadlines missed in it.

        Raises:
            RobotError: the arm or its camera is lost.
            Blind: tape or sheet cannot be seen.
        """
        mask, streak, done = np.ones(1, bool), np.zeros(1, np.int64), False
        self.moves = self.missed = 0
        self.policy.reset(mask)
        self.measure()
        try:
            delta = self.act(mask)  # the first picture takes longer to process; nothing moves yet
        except Blind as blind:
            if self.dry_run:
                raise
            delta = self.look_from_aside(mask, blind)
        self.clock.start()
        before = self.clock.missed
        for _ in range(max_steps):
            if self.policy.quit:
                break
            self.move(delta)
            self.moves += 1
            self.clock.wait()
            self.missed = self.clock.missed - before
            self.measure()
            delta = self.act(mask)
            streak = count_inside(streak, self.policy, tape_margin)
            if done := bool(streak[0] >= SUCCESS_STEPS):
                break
        return {"seen_inside": done, "ticks": self.moves, "missed": self.missed}

    def look_from_aside(self, mask: np.ndarray, blind: Blind) -> np.ndarray:
        """Move the arm out of the view, look, and return home; the policy's joint deltas (6,), rad, there.

        Raises Blind if tape or sheet cannot be seen from either side.
        """
        self.go(RAISED_RAD)
        for side in (1, -1):
            self.go(RAISED_RAD + side * ASIDE_RAD)
            try:
                self.act(mask)
                break
            except Blind as error:
                blind = error
        else:
            raise blind
        for goal in (RAISED_RAD, HOME_RAD):  # only the arm moves meanwhile, so the pose remains valid
            self.go(goal)
        return self.act(mask)

    def act(self, mask: np.ndarray) -> np.ndarray:
        """The policy's joint deltas (6,), rad, for the present measurement and picture."""
        picture = self.robot.picture()
        if (age := self.clock.now() - picture.time_s) > PICTURE_AGE_S:
            raise RobotError(f"the camera's newest picture is {1000 * age:.0f} ms old")
        delta = valid_delta(self.policy, self.policy.act(self.observe(picture), mask), mask)[0]
        if self.film is not None:
            seen = self.policy.seen if isinstance(self.policy, OpenCVPolicy) else {}
            to_picture = scaled(seen["to_picture"][0], self.policy.image_size, picture.image) if seen else None
            pose = None if self.policy.estimate is None else self.policy.estimate[0]
            self.film.add(picture.image, to_picture, pose, self.policy.trouble)
        if self.policy.trouble:
            raise Blind(self.policy.trouble)
        if self.clock.now() - self.controller.time_s > 1 / CONTROL_HZ:  # the policy was slow: measure again
            self.measure()
        return delta


def scaled(to_picture: np.ndarray, size: tuple[int, int], image: np.ndarray) -> np.ndarray:
    """A homography (3, 3) to pixels of a picture that `resize` has made of an image, as one to the image's pixels."""
    left, top, width, height = _cut(image.shape[:2], size)
    x, y = width / size[1], height / size[0]
    # pixel centres are whole numbers
    return np.array([[x, 0, left + (x - 1) / 2], [0, y, top + (y - 1) / 2], [0, 0, 1]]) @ to_picture


def _cut(shape: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the middle of a picture (H, W) that has the shape of `size`."""
    height, width = shape
    share = min(1.0, size[1] / size[0] * height / width), min(1.0, size[0] / size[1] * width / height)
    columns, rows = round(width * share[0]), round(height * share[1])
    return (width - columns) // 2, (height - rows) // 2, columns, rows


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut the middle of a picture (H, W, 3) uint8 to the shape of `size`, height and width, and scale it to that size.

    The result is what a camera with this shape of picture would see.
    """
    cv2 = import_extra("cv2", "arm", "python -m so101.drive")
    left, top, columns, rows = _cut(image.shape[:2], size)
    return cv2.resize(image[top : top + rows, left : left + columns], size[::-1], interpolation=cv2.INTER_AREA)
