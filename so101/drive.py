"""Run a policy on an arm: a simulated one in real time, or an SO-101 through LeRobot. A camera locates the sheet.

    python -m so101.drive                                            # the included policy, on a simulated arm
    python -m so101.drive --model policy.onnx --episodes 100         # measure its success rate there
    python -m so101.drive --robot lerobot:/dev/ttyACM0 --robot-id my_arm --camera 0 --dry-run

Thirty times a second: read the joints, locate the sheet, compute the policy's action, limit it, send the targets. The
simulated arm differs from the training simulation: it has latency, backlash, encoder errors and half the servo gain,
and it runs in its own process, in real time. Read docs/arm.md before the first run on a real arm.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from so101.base import BasePolicy
from so101.cli import Stop, Stoppable, check_flags, check_output, parse, run_script
from so101.evaluation import TEST_SEED
from so101.extras import import_extra
from so101.files import write_json
from so101.lerobot_arm import LeRobotRobot
from so101.opencv import CAMERA, OpenCVPolicy
from so101.policies import load_policy
from so101.robot import LEROBOT_P, Picture, Robot, RobotError
from so101.server import Server
from so101.simulated_arm import SimulatedRobot
from so101_env import (
    HOME_RAD,
    MAX_EPISODE_STEPS,
    SUCCESS_STEPS,
    TAPE_CENTER_M,
    BaseObservation,
    Task,
    base_observation,
    load_model,
    make_observation,
    sheet_inside,
)
from so101_sim.control import ACT_DIM, BACKLASH_RAD, GAIN_FLOOR, JOINTS, LATENCY_S, Controller, from_rad
from so101_sim.errors import SO101Error
from so101_sim.scene import ASSETS, CONTROL_HZ

HOME_SPEED_RAD_S, HOME_NEAR_RAD, HOME_WAIT_S = 0.4, 0.015, 15.0  # motions to and from home
# an arm that stops this near its goal for this long has met the table: its zero or the table's height is off
HOME_TOUCH_RAD, HOME_STILL_RAD, HOME_STILL_S = float(np.deg2rad(5.0)), 0.002, 1.0
REST_S = 0.5  # until an arm that was moving is at rest
HOME_SHARE = 0.2  # share of the remaining distance per step; with more, an arm with latency oscillates about its goal
RAISED_RAD = HOME_RAD - np.array([0.0, 0.35, 0, 0, 0, 0])  # tip well above the table, for the way to and from home
ASIDE_RAD = np.array([0.9, 0.0, 0, 0, 0, 0])  # from RAISED_RAD to either side, out of the camera's view
PICTURE_AGE_S = 0.25  # older pictures are not used
POSE_ERROR_M = 0.003  # a sheet counts as seen inside the tape if it is at least this far from the tape


# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class Args:
    model: str | None = None
    """policy to run, a checkpoint, student or ONNX file (default, without --base-policy: assets/arm.onnx)"""
    base_policy: str | None = None
    """instead of --model: jacobian, bc:PATH, MODULE:CLASS or any other base policy. A policy that does not use the
    camera gets the sheet's pose from OpenCV"""
    robot: str = "sim"
    """sim, or lerobot:PORT"""
    robot_id: str = "so101"
    """with lerobot: the name under which LeRobot has stored the arm's calibration"""
    camera: str = "0"
    """with lerobot: index or path of the camera, which stands opposite the arm and looks at the table"""
    firmware_p: int | None = None
    """P coefficient that the servos are set to (default: what the model was trained with; without a model 16)"""
    max_speed: float = 2.0
    """largest speed of a joint's target, rad/s"""
    episodes: int = 1
    """number of episodes; on a real arm each starts when you press Enter"""
    episode_steps: int = MAX_EPISODE_STEPS
    """control steps until an episode ends without success"""
    tape_margin: float | None = None
    """m between sheet and tape on every side (default: what the model was trained with)"""
    dry_run: bool = False
    """print the joint targets, and send nothing"""
    visual_randomization: bool = True
    """with sim: draw another look of the scene in every episode"""
    json: str | None = None
    """write the results to this file"""
    server: Server = dataclasses.field(default_factory=Server)


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that cannot be used."""
    ranges = {
        "firmware_p": Task.RANGES["firmware_p"], "max_speed": (0.05, 5.0), "episodes": (1, 100_000),
        "episode_steps": (1, 10**6), "tape_margin": Task.RANGES["tape_margin"],
    }  # fmt: skip
    check_flags(args, ranges)
    check_flags(args.server, Server.RANGES)
    check_output("--json", args.json, (".json",), args.model)
    kind, _, port = args.robot.partition(":")
    if args.robot != "sim" and (kind != "lerobot" or not port):
        raise SO101Error(f"--robot {args.robot}: give sim, or lerobot:PORT, as in lerobot:/dev/ttyACM0")
    if args.model is not None and args.base_policy is not None:
        raise SO101Error(f"--base-policy {args.base_policy}: --model names a policy already; drop one of them")
    if args.model is not None and Path(args.model).suffix not in (".onnx", ".pt"):
        raise SO101Error(f"--model {args.model}: must end in .onnx or .pt")


def policy_spec(args: Args) -> str:
    """The spec string, see so101.policies, of the policy that --model or --base-policy names."""
    if args.base_policy is not None:
        return args.base_policy
    model = args.model or os.path.relpath(ASSETS / "arm.onnx")
    return f"onnx:{model}" if Path(model).suffix == ".onnx" else f"checkpoint:{model}"


def make_policy(args: Args) -> tuple[BasePolicy, Task]:
    """The policy, which sees the camera itself or through OpenCV, and the task with margin and P of this run."""
    spec = policy_spec(args)
    policy = load_policy(spec.removeprefix("opencv:"), args.server)
    task = getattr(policy, "task", None) or Task(firmware_p=LEROBOT_P)  # models have the task they were trained on
    changes = {"firmware_p": args.firmware_p, "tape_margin": args.tape_margin}
    task = dataclasses.replace(task, **{name: value for name, value in changes.items() if value is not None})
    seen = () if policy is None else policy.cameras
    if others := [camera for camera in seen if camera != CAMERA]:
        raise SO101Error(f"{spec}: needs the camera {others[0]}, but the arm here only has {CAMERA}")
    if CAMERA not in seen or spec.startswith("opencv:"):
        policy = OpenCVPolicy(policy, task.tape_margin)
    policy.firmware_p = task.firmware_p
    return policy, task


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Blind(SO101Error):
    """The policy has no view of what it needs to see. The message is the reason."""


class Clock:
    """Ticks at CONTROL_HZ, and counts missed deadlines."""

    def __init__(self) -> None:
        self.ticks, self.missed, self.worst_s = 0, 0, 0.0
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
        if now > self.due:
            self.missed, self.due = self.missed + 1, now
        self.sleep(self.due - now)

    def sleep(self, seconds: float) -> None:
        """Wait for some seconds."""
        time.sleep(seconds)


class Loop:
    """The control loop of a policy on an arm.

    Args:
        robot: the arm.
        policy: sees the camera; with `estimate`, the sheet's pose.
        controller: limits the targets.
        clock: keeps the rate.
        dry_run: print the targets instead of sending them.
    """

    def __init__(self, robot: Robot, policy: BasePolicy, controller: Controller, clock: Clock, dry_run: bool):
        self.robot, self.policy, self.controller, self.clock = robot, policy, controller, clock
        self.dry_run = dry_run

    def measure(self) -> None:
        """Read the joints."""
        self.controller.measure(*self.robot.read())

    def move(self, delta_rad: np.ndarray) -> None:
        """Send the last targets plus delta (6,), rad, within limits; in a dry run print them."""
        target = self.controller.move(delta_rad, self.clock.now())
        if not self.dry_run:
            self.robot.write(target)
            return
        joints = "  ".join(f"{joint} {degrees:7.2f}" for joint, degrees in zip(JOINTS, from_rad(target, "deg")))
        tqdm.write(f"would send  {joints}", file=sys.stdout)

    def go(self, goal_rad: np.ndarray) -> None:
        """Move slowly to joint positions (6,), rad, or until the table stops the arm near them.

        Raises RobotError if the arm does not arrive.
        """
        step, nearest, still = HOME_SPEED_RAD_S / CONTROL_HZ, np.inf, 0
        self.clock.start()
        for _ in range(round(HOME_WAIT_S * CONTROL_HZ)):
            self.measure()
            left = goal_rad - self.controller.joints_rad
            far = np.abs(left).max()
            nearest, still = (far, 0) if far < nearest - HOME_STILL_RAD else (nearest, still + 1)
            if far < HOME_NEAR_RAD or (far < HOME_TOUCH_RAD and still > HOME_STILL_S * CONTROL_HZ):
                return
            self.move(np.clip(HOME_SHARE * left, -step, step))
            self.clock.wait()
        joint = int(np.abs(left).argmax())
        raise RobotError(
            f"{JOINTS[joint]} stays {np.rad2deg(abs(left[joint])):.0f} degrees short of its goal: is something "
            "in its way, or its torque off?"
        )

    def home(self) -> None:
        """Move to home, from above. In the air the servo gain is estimated, unless it is known."""
        self.go(RAISED_RAD)
        if not self.controller.gain_known:
            for _ in range(round(REST_S * CONTROL_HZ)):
                self.move(np.zeros(ACT_DIM))
                self.clock.wait()
                self.measure()
            self.controller.learn_gain()
        self.go(HOME_RAD)

    def lift(self) -> None:
        """Lift the tip off the sheet."""
        goal = self.controller.joints_rad.copy()
        goal[1] += RAISED_RAD[1] - HOME_RAD[1]
        self.go(np.maximum(goal, self.controller.low_rad + HOME_NEAR_RAD))

    def observe(self, picture: Picture) -> BaseObservation:
        """The policy's observation. The sheet's pose in it is a placeholder: the policy must see the sheet itself."""
        c = self.controller
        placeholder = np.append(TAPE_CENTER_M, 0.0)[None]
        flat = make_observation(c.joints_rad[None], c.velocity_rad_s[None], c.tip_m[None], placeholder)
        height, width = self.policy.image_size

        def image(camera: str, ids: np.ndarray) -> np.ndarray:
            return resize(picture.image, (height, width))[None][ids]

        load = c.load(c.command_rad, c.joints_rad, c.velocity_rad_s, c.gravity_n_m)[None]
        return base_observation(flat, c.command_rad[None], load=load, cameras=self.policy.cameras, render=image)

    def episode(self, max_steps: int, tape_margin: float) -> dict[str, Any]:
        """Act until the sheet is seen inside the tape for SUCCESS_STEPS steps, or for max_steps control steps.

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
        mask, streak, done, clear_m = np.ones(1, bool), 0, False, tape_margin - POSE_ERROR_M
        self.policy.reset(mask)
        self.measure()
        try:
            delta = self._ask(mask)  # the first picture takes longer to process; nothing moves yet
        except Blind as blind:
            if self.dry_run:
                raise
            delta = self._look_from_aside(mask, blind)
        self.clock.start()
        before = self.clock.ticks, self.clock.missed
        for _ in range(max_steps):
            if self.policy.quit:
                break
            self.move(delta)
            self.clock.wait()
            self.measure()
            delta, pose = self._ask(mask), self.policy.estimate
            seen = pose is not None and np.isfinite(pose).all()
            inside = seen and sheet_inside(pose[:, :2], pose[:, 2], clear_m)[0]
            streak = (streak + 1) * bool(inside)
            if done := streak >= SUCCESS_STEPS:
                break
        ticks, missed = self.clock.ticks - before[0], self.clock.missed - before[1]
        return {"seen_inside": done, "ticks": ticks, "missed": missed}

    def _look_from_aside(self, mask: np.ndarray, blind: Blind) -> np.ndarray:
        """Move the arm out of the view, look, and return home; the policy's joint deltas (6,), rad, there.

        Raises Blind if tape or sheet cannot be seen from either side.
        """
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
        for goal in (RAISED_RAD, HOME_RAD):  # only the arm moves meanwhile, so the pose remains valid
            self.go(goal)
        return self._ask(mask)

    def _ask(self, mask: np.ndarray) -> np.ndarray:
        """The policy's joint deltas (6,), rad, for the present measurement and picture."""
        picture = self.robot.picture()
        if (age := self.clock.now() - picture.time_s) > PICTURE_AGE_S:
            raise RobotError(f"the camera's newest picture is {1000 * age:.0f} ms old")
        delta = self.policy.act(self.observe(picture), mask)[0]
        if self.policy.trouble:
            raise Blind(self.policy.trouble)
        if self.clock.now() - self.controller.time_s > 1 / CONTROL_HZ:  # the policy was slow: measure again
            self.measure()
        return delta


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut the middle of a picture (H, W, 3) uint8 to the shape of `size`, height and width, and scale it to that size.

    The result is what a camera with this shape of picture would see.
    """
    cv2 = import_extra("cv2", "arm", "python -m so101.drive")
    height, width = image.shape[:2]
    share = min(1.0, size[1] / size[0] * height / width), min(1.0, size[0] / size[1] * width / height)
    columns, rows = round(width * share[0]), round(height * share[1])
    left, top = (width - columns) // 2, (height - rows) // 2
    return cv2.resize(image[top : top + rows, left : left + columns], size[::-1], interpolation=cv2.INTER_AREA)


# ---------------------------------------------------------------------------------------------------------------------
# the script


def make_robot(args: Args, task: Task) -> Robot:
    """The arm that --robot names, with servos set to task.firmware_p."""
    if args.robot == "sim":
        return SimulatedRobot(task, args.visual_randomization)
    return LeRobotRobot(args.robot.partition(":")[2], args.robot_id, args.camera, task.firmware_p)


def run_episode(loop: Loop, args: Args, task: Task, number: int) -> dict[str, Any]:
    """One episode, from the start of the scene to a raised arm; returns what the report needs of it."""
    robot, policy, sim = loop.robot, loop.policy, args.robot == "sim"
    loop.controller.reset()
    if sim:
        robot.reset(TEST_SEED + number)
    else:
        try:
            input("lay the sheet, keep clear of the arm, and press Enter (Ctrl+C stops at any time) ")
        except EOFError as error:
            raise SO101Error("no terminal to press Enter at, which starts each episode on an arm") from error
    loop.measure()
    if not args.dry_run:
        loop.home()
    episode = {"episode": number, "trouble": "", "seen_inside": False, "ticks": 0, "missed": 0}
    try:
        episode |= loop.episode(args.episode_steps, task.tape_margin)
    except Blind as blind:
        episode["trouble"] = str(blind)
        if not sim:
            print(f"stopped: {blind}", file=sys.stderr)
    if sim:
        truth, estimate = robot.truth(), policy.estimate
        error_m = np.nan if estimate is None else np.linalg.norm(estimate[0, :2] - truth["sheet"][:2])
        episode |= {"success": truth["inside"], "error_mm": 1000 * float(error_m)}
    elif not args.dry_run and not policy.quit:
        loop.lift()
        loop.go(RAISED_RAD)
    return episode


def summarize(episodes: list[dict[str, Any]], clock: Clock, sim: bool) -> dict[str, Any]:
    """Means over the episodes; `sim` adds what only a simulation can measure."""
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
    if sim:
        seen = [episode["error_mm"] for episode in episodes if np.isfinite(episode["error_mm"])]
        result["success_rate"] = float(np.mean([episode["success"] for episode in episodes]))
        result["mean_error_mm"] = float(np.mean(seen)) if seen else None
    return result


def print_report(result: dict[str, Any]) -> None:
    """Print what `summarize` returned."""
    print(f"{result['episodes']} episodes, {result['mean_steps']:.0f} steps each")
    if "success_rate" in result:
        print(f"success, ground truth      {result['success_rate']:.2f}")
    print(f"success, by camera         {result['seen_inside_rate']:.2f}")
    print(f"episodes without a view    {result['blind']}")
    ticks = result["episodes"] * result["mean_steps"]
    print(f"deadlines missed at {CONTROL_HZ} Hz  {result['missed_deadlines']:.2%} of {ticks:.0f}")


def main() -> int:
    """Run the episodes; returns the exit code."""
    args = parse(Args, __doc__)
    check_args(args)
    import_extra("cv2", "arm", "python -m so101.drive")  # fails early, before the arm moves
    torch.set_num_threads(1)  # leaves the other cores to the simulation or the camera
    policy, task = make_policy(args)
    sim, robot = args.robot == "sim", make_robot(args, task)
    controller = Controller(
        load_model(task.tape_margin), task.firmware_p, BACKLASH_RAD, LATENCY_S, args.max_speed, gain_floor=GAIN_FLOOR
    )
    loop, episodes = Loop(robot, policy, controller, Clock(), args.dry_run), []
    ended: BaseException | None = None  # what ended the run early; the complete episodes are reported nevertheless
    bar = tqdm(total=args.episodes, unit="episode", dynamic_ncols=True, delay=1e-3, disable=args.episodes == 1 or None)
    with Stoppable():
        try:
            for number in range(args.episodes):
                episode = run_episode(loop, args, task, number)
                if policy.quit:  # the episode does not count
                    break
                episodes.append(episode)
                bar.update()
        except (SO101Error, Stop) as error:
            ended = error
        finally:
            bar.close()
            robot.close()
            policy.close()
    if isinstance(ended, SO101Error):
        ended = SO101Error(f"--robot {args.robot}: stopped in episode {len(episodes) + 1}: {ended}")
    if episodes:
        result = summarize(episodes, loop.clock, sim)
        if args.json:
            head = {"base_policy": policy_spec(args), "robot": args.robot, "firmware_p": task.firmware_p}
            write_json(Path(args.json), {**head, **result, "episode_list": episodes})
        print_report(result)
    if ended:
        raise ended
    if not episodes:
        raise SO101Error(f"{policy_spec(args)}: quit before its first episode ended; there is nothing to report")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
