"""Run a policy on an arm: a simulated one in real time, or an SO-101 through LeRobot, with the sheet's pose by camera.

    python run_so101.py                                              # the policy that comes along, on a simulated arm
    python run_so101.py --policy onnx:policy.onnx --episodes 100     # how often does it succeed there?
    python run_so101.py --robot lerobot:/dev/ttyACM0 --robot-id my_arm --camera 0 --dry-run

Thirty times a second: read the joints, see where the sheet lies, ask the policy, hold its answer within limits, write
the targets. The simulated arm is not the simulation of training: it lags, has backlash, encoders that are off and half
the servo gain, and runs in a process of its own that waits for nobody. Read docs/real_arm.md before the first run on a
real arm.
"""

if __name__ == "__main__":  # Ctrl+C while importing ends the program, without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import tyro
from tqdm import tqdm

from so101_control import BACKLASH_RAD, JOINTS, LATENCY_S, Controller, from_rad
from so101_env import (
    HOME_RAD,
    MAX_EPISODE_STEPS,
    SUCCESS_STEPS,
    BaseObservation,
    SO101Error,
    Task,
    base_observation,
    make_observation,
    sheet_inside,
)
from so101_policies import BasePolicy, load_policy
from so101_robot import LEROBOT_P, LeRobotRobot, Picture, Robot, RobotError, SimulatedRobot
from so101_runs import TEST_SEED, check_flags, check_output, run_script, write_json
from so101_scene import ASSETS, CONTROL_HZ, TAPE_CENTER_M, load_model
from so101_vision import CAMERA, OpenCVPolicy

HOME_SPEED_RAD_S, HOME_NEAR_RAD, HOME_WAIT_S = 0.4, 0.015, 15.0
HOME_SHARE = 0.2  # of what is left to go, in a step: more, and an arm with latency swings about its goal
RAISED_RAD = HOME_RAD - np.array([0.0, 0.35, 0, 0, 0, 0])  # tip well above the table: on the way to and from home
ASIDE_RAD = np.array([0.9, 0.0, 0, 0, 0, 0])  # from RAISED_RAD, to either side: out of the camera's way
PICTURE_AGE_S = 0.25  # an older picture shows another scene
POSE_ERROR_M = 0.003  # by so much a sheet that is seen inside the tape must be clear of it


@dataclasses.dataclass
class RunArgs:
    """A policy on an arm."""

    policy: str = f"onnx:{os.path.relpath(ASSETS / 'arm.onnx')}"
    """what acts: onnx:PATH, checkpoint:PATH, or any other base policy; one that does not see is told by OpenCV where
    the sheet lies"""
    robot: str = "sim"
    """sim, or lerobot:PORT"""
    robot_id: str = "so101"
    """with lerobot: the name under which LeRobot has the arm's calibration"""
    camera: str = "0"
    """with lerobot: index or path of the camera that looks at the table from opposite the arm"""
    firmware_p: int = LEROBOT_P
    """P coefficient of the servos"""
    max_speed: float = 2.0
    """rad/s that no joint's target exceeds"""
    episodes: int = 1
    """how often; on a real arm, each begins with Enter"""
    episode_s: float = MAX_EPISODE_STEPS / CONTROL_HZ
    """seconds until an episode is given up"""
    tape_margin: float | None = None
    """m between sheet and tape on every side (default: that of the policy's task)"""
    dry_run: bool = False
    """print what would be sent, and send nothing"""
    visual_randomization: bool = True
    """with sim: another look of the scene in every episode"""
    json: str | None = None
    """write the results to this file"""


def check_run_args(args: RunArgs) -> None:
    """Raise SO101Error for what cannot work."""
    ranges = {
        "firmware_p": Task.RANGES["firmware_p"], "max_speed": (0.05, 5.0), "episodes": (1, 100_000),
        "episode_s": (0.1, 3600.0), "tape_margin": Task.RANGES["tape_margin"],
    }  # fmt: skip
    check_flags(args, ranges)
    check_output("--json", args.json, (".json",))
    kind, _, port = args.robot.partition(":")
    if args.robot != "sim" and (kind != "lerobot" or not port):
        raise SO101Error(f"--robot {args.robot}: give sim, or lerobot:PORT, as in lerobot:/dev/ttyACM0")


class Blind(SO101Error):
    """The policy cannot see what it needs to see."""


class Clock:
    """Ticks at CONTROL_HZ, and counts those that were missed."""

    def __init__(self) -> None:
        self.ticks, self.missed, self.worst_s = 0, 0, 0.0
        self.start()

    def now(self) -> float:
        """Time in s, as robots have it."""
        return time.monotonic()

    def start(self) -> None:
        """A tick is now."""
        self.due = self.now()

    def wait(self) -> None:
        """Until the next tick; if that has passed already, it was missed, and the next one is a period from now."""
        self.due, now = self.due + 1 / CONTROL_HZ, self.now()
        self.ticks, self.worst_s = self.ticks + 1, max(self.worst_s, now - self.due + 1 / CONTROL_HZ)
        if now > self.due:
            self.missed, self.due = self.missed + 1, now
        self.sleep(self.due - now)

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)


class Loop:
    """A policy on an arm, step by step."""

    def __init__(self, robot: Robot, policy: BasePolicy, controller: Controller, clock: Clock, dry_run: bool):
        self.robot, self.policy, self.controller, self.clock = robot, policy, controller, clock
        self.dry_run = dry_run

    def measure(self) -> None:
        """Read the joints."""
        self.controller.measure(*self.robot.read())

    def move(self, delta_rad: np.ndarray) -> None:
        """Send the next targets, or print them."""
        target = self.controller.move(delta_rad, self.clock.now())
        if not self.dry_run:
            self.robot.write(target)
            return
        said = "  ".join(f"{joint} {degrees:7.2f}" for joint, degrees in zip(JOINTS, from_rad(target, "deg")))
        tqdm.write(f"would send  {said}", file=sys.stdout)

    def go(self, goal_rad: np.ndarray) -> None:
        """Move to joint positions (6,), rad, slowly. Raises RobotError if the arm does not get there."""
        step = HOME_SPEED_RAD_S / CONTROL_HZ
        self.clock.start()
        for _ in range(round(HOME_WAIT_S * CONTROL_HZ)):
            self.measure()
            left = goal_rad - self.controller.joints_rad
            if np.abs(left).max() < HOME_NEAR_RAD:
                return
            self.move(np.clip(HOME_SHARE * left, -step, step))
            self.clock.wait()
        joint = int(np.abs(left).argmax())
        raise RobotError(
            f"{JOINTS[joint]} stays {np.rad2deg(abs(left[joint])):.0f} degrees short of its goal: is something "
            "in its way, or its torque off?"
        )

    def lift(self) -> None:
        """Off the sheet."""
        goal = self.controller.joints_rad.copy()
        goal[1] += RAISED_RAD[1] - HOME_RAD[1]
        self.go(np.maximum(goal, self.controller.low_rad + HOME_NEAR_RAD))

    def observe(self, picture: Picture) -> BaseObservation:
        """What the policy sees; where the sheet lies, it must see for itself."""
        c = self.controller
        nowhere = np.append(TAPE_CENTER_M, 0.0)[None]
        flat = make_observation(c.joints_rad[None], c.velocity_rad_s[None], c.tip_m[None], nowhere)
        height, width = self.policy.image_size

        def image(camera: str, ids: np.ndarray) -> np.ndarray:
            return resize(picture.image, (height, width))[None][ids]

        return base_observation(flat, c.command_rad[None], cameras=self.policy.cameras, render=image)

    def episode(self, max_steps: int, tape_margin: float) -> dict[str, Any]:
        """Act until the sheet is seen inside the tape for SUCCESS_STEPS steps, or time is up.

        Returns success as seen, ticks, and the deadlines missed. Raises RobotError where the arm is lost, Blind where
        the view is.
        """
        mask, streak, done, clear_m = np.ones(1, bool), 0, False, tape_margin - POSE_ERROR_M
        self.policy.reset(mask)
        self.measure()
        try:
            delta = self._ask(mask)  # the first look takes longer; nothing moves yet
        except Blind as blind:
            if self.dry_run:
                raise
            delta = self._look_from_aside(mask, blind)
        self.clock.start()
        before = self.clock.ticks, self.clock.missed
        for _ in range(max_steps):
            self.move(delta)
            self.clock.wait()
            self.measure()
            delta, pose = self._ask(mask), self.policy.estimate
            inside = np.isfinite(pose).all() and sheet_inside(pose[:, :2], pose[:, 2], clear_m)[0]
            streak = (streak + 1) * bool(inside)
            if done := streak >= SUCCESS_STEPS:
                break
        ticks, missed = self.clock.ticks - before[0], self.clock.missed - before[1]
        return {"seen_inside": done, "ticks": ticks, "missed": missed}

    def _look_from_aside(self, mask: np.ndarray, blind: Blind) -> np.ndarray:
        """What the policy asks for at home, having looked with the arm out of the way. Raises Blind."""
        self.go(RAISED_RAD)
        for side in (1, -1):
            self.go(RAISED_RAD + side * ASIDE_RAD)
            try:
                self._ask(mask)
                break
            except Blind as error:
                blind = error
        else:
            raise blind
        for goal in (RAISED_RAD, HOME_RAD):  # nothing has moved meanwhile but the arm, so what was seen still holds
            self.go(goal)
        return self._ask(mask)

    def _ask(self, mask: np.ndarray) -> np.ndarray:
        """The policy's joint deltas (6,), rad, for what is measured and seen now."""
        picture = self.robot.picture()
        if (age := self.clock.now() - picture.time_s) > PICTURE_AGE_S:
            raise RobotError(f"the camera's newest picture is {1000 * age:.0f} ms old")
        delta = self.policy.act(self.observe(picture), mask)[0]
        if self.policy.trouble:
            raise Blind(self.policy.trouble)
        if self.clock.now() - self.controller.time_s > 1 / CONTROL_HZ:  # it took its time: where is the arm now?
            self.measure()
        return delta


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture of `size`, height and width, from the middle of another one: what a camera of that shape would see."""
    height, width = image.shape[:2]
    share = min(1.0, size[1] / size[0] * height / width), min(1.0, size[0] / size[1] * width / height)
    columns, rows = round(width * share[0]), round(height * share[1])
    left, top = (width - columns) // 2, (height - rows) // 2
    return cv2.resize(image[top : top + rows, left : left + columns], size[::-1], interpolation=cv2.INTER_AREA)


def make_robot(args: RunArgs, task: Task) -> Robot:
    """The arm that --robot names."""
    if args.robot == "sim":
        return SimulatedRobot(dataclasses.replace(task, firmware_p=args.firmware_p), args.visual_randomization)
    return LeRobotRobot(args.robot.partition(":")[2], args.robot_id, args.camera, args.firmware_p)


def report(episodes: list[dict[str, Any]], clock: Clock, sim: bool) -> dict[str, Any]:
    """Print and return what came of the episodes."""
    ticks = max(sum(episode["ticks"] for episode in episodes), 1)
    missed = sum(episode["missed"] for episode in episodes)
    result = {
        "episodes": len(episodes),
        "seen_inside_rate": float(np.mean([episode["seen_inside"] for episode in episodes])),
        "mean_steps": ticks / len(episodes),
        "missed_deadlines": missed / ticks,
        "worst_period_ms": 1000 * clock.worst_s,
        "blind": sum(bool(episode["trouble"]) for episode in episodes),
    }
    print(f"{len(episodes)} episodes, {result['mean_steps']:.0f} steps each")
    if sim:
        result["success_rate"] = float(np.mean([episode["success"] for episode in episodes]))
        seen = [episode["error_mm"] for episode in episodes if np.isfinite(episode["error_mm"])]
        result["mean_error_mm"] = float(np.mean(seen)) if seen else None
        print(f"success in truth           {result['success_rate']:.2f}")
    print(f"sheet seen inside          {result['seen_inside_rate']:.2f}")
    print(f"episodes without a view    {result['blind']}")
    print(f"deadlines missed at {CONTROL_HZ} Hz  {result['missed_deadlines']:.2%} of {ticks}")
    return result


def main() -> int:
    """Run the episodes; returns the exit code."""
    args = tyro.cli(RunArgs, description=__doc__)
    check_run_args(args)
    torch.set_num_threads(1)  # the other cores are the simulation's, or the camera's
    spec = args.policy.removeprefix("opencv:")
    policy = load_policy(spec)
    if policy is None or CAMERA not in policy.cameras or spec != args.policy:
        policy = OpenCVPolicy(policy, args.tape_margin)
    task = getattr(policy, "task", Task())
    margin = task.tape_margin if args.tape_margin is None else args.tape_margin
    task = dataclasses.replace(task, tape_margin=margin)
    policy.firmware_p = args.firmware_p
    sim, max_steps = args.robot == "sim", max(1, round(args.episode_s * CONTROL_HZ))
    robot = make_robot(args, task)
    controller = Controller(
        load_model(margin), args.firmware_p, BACKLASH_RAD, LATENCY_S, max_speed_rad_s=args.max_speed
    )
    loop, episodes = Loop(robot, policy, controller, Clock(), args.dry_run), []
    bar = tqdm(total=args.episodes, unit="episode", dynamic_ncols=True, delay=1e-3, disable=args.episodes == 1)
    try:
        for number in range(args.episodes):
            controller.reset()
            if sim:
                robot.reset(TEST_SEED + number)
            else:
                input("lay the sheet, keep clear of the arm, and press Enter (Ctrl+C stops at any time) ")
            loop.measure()
            for goal in [] if args.dry_run else [HOME_RAD] if sim else [RAISED_RAD, HOME_RAD]:
                loop.go(goal)
            episode = {"episode": number, "trouble": "", "seen_inside": False, "ticks": 0, "missed": 0}
            try:
                episode |= loop.episode(max_steps, margin)
            except Blind as blind:
                episode["trouble"] = str(blind)
                if not sim:
                    print(f"stopped: {blind}", file=sys.stderr)
            if sim:
                truth = robot.truth()
                off = np.linalg.norm(np.subtract(policy.estimate[0, :2], truth["sheet"][:2]))
                episode |= {"success": truth["inside"], "error_mm": 1000 * float(off)}
            elif not args.dry_run:
                loop.lift()
                loop.go(RAISED_RAD)
            episodes.append(episode)
            bar.update()
    except RobotError as error:
        raise SO101Error(f"--robot {args.robot}: stopped in episode {len(episodes) + 1}: {error}") from error
    finally:
        bar.close()
        robot.close()
        policy.close()
    result = report(episodes, loop.clock, sim)
    if args.json:
        write_json(Path(args.json), {"policy": args.policy, "robot": args.robot, **result, "episode_list": episodes})
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
