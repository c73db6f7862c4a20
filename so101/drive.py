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

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from so101.arm_check import MAX_OFFSET_RAD, ArmProfile
from so101.arm_film import CameraFilm, print_replay, replay_film
from so101.base import BasePolicy
from so101.camera import CAMERA
from so101.cli import (
    Stop,
    Stoppable,
    check_flags,
    check_output,
    check_plain_name,
    check_unused,
    parse,
    run_script,
    use_one_torch_thread,
)
from so101.evaluation import TEST_SEED
from so101.extras import import_extra
from so101.files import check_file, write_json
from so101.guide import STEPS, Guide, load_profile
from so101.lerobot_arm import LeRobotArm
from so101.locator import Marks, SheetLocator
from so101.loop import RAISED_RAD, Blind, Clock, Loop, ask, make_controller, say
from so101.opencv import OpenCVPolicy
from so101.policies import load_policy
from so101.robot import LEROBOT_P, Robot
from so101.server import Server
from so101.simulated_arm import SimulatedRobot
from so101_env import MAX_EPISODE_STEPS, Task
from so101_sim.control import ACT_DIM, Calibration
from so101_sim.errors import SO101Error
from so101_sim.scene import ASSETS, CONTROL_HZ

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
    """with lerobot: index, path or http address of the camera that looks at the table, opposite the arm; also on the
    arm's side, if --check has found it there"""
    firmware_p: int | None = None
    """P coefficient that the servos are set to (default: what the model was trained with; without a model 16)"""
    servo_gain: float | None = None
    """with lerobot: gain of the servos as a factor of the 12 V STS3215's at the same P (default: what --check has
    measured; without a check estimated before every episode, starting at 1 above 9 V, otherwise at the 7.4 V variant's
    0.55)"""
    max_speed: float = 2.0
    """largest speed of a joint's target, rad/s"""
    episodes: int = 1
    """number of episodes; on a real arm each starts when you press Enter"""
    episode_steps: int = MAX_EPISODE_STEPS
    """control steps until an episode ends without success"""
    tape_margin: float | None = None
    """m between sheet and tape on every side (default: what the model was trained with)"""
    dry_run: bool = False
    """print the joint targets, and write nothing to the servos; a limp arm can be moved by hand"""
    visual_randomization: bool = True
    """with sim: draw another look of the scene in every episode"""
    json: str | None = None
    """write the results to this file"""
    video: str | None = None
    """film what the camera sees, with outlines of tape and sheet, as this MP4 file"""
    outlines: bool = True
    """with --video: draw the outlines; --no-outlines makes a film that --replay can use"""
    marks: Marks = "tape"
    """what shows the camera where the rectangle lies: red tape, or the four tags of assets/tags.pdf at its corners"""
    check: bool = False
    """with lerobot: check the arm step by step before its first run, and keep what was measured for later runs"""
    replay: str | None = None
    """instead of a run: find tape and sheet in this film of the camera, which must have no outlines"""
    server: Server = dataclasses.field(default_factory=Server)


OF_A_REPLAY = {"replay", "tape_margin", "marks", "json", "video", "server"}  # flags that --replay uses, and a group


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that cannot be used."""
    ranges = {
        "firmware_p": Task.RANGES["firmware_p"], "max_speed": (0.05, 5.0), "episodes": (1, 100_000),
        "episode_steps": (1, 10**6), "tape_margin": Task.RANGES["tape_margin"], "servo_gain": (0.2, 3.0),
    }  # fmt: skip
    check_flags(args, ranges)
    check_flags(args.server, Server.RANGES)
    check_output("--json", args.json, (".json",), args.model)
    check_output("--video", args.video, (".mp4",), args.replay or args.model)
    kind, _, port = args.robot.partition(":")
    if args.robot != "sim" and (kind != "lerobot" or not port):
        raise SO101Error(f"--robot {args.robot}: give sim, or lerobot:PORT, as in lerobot:/dev/ttyACM0")
    if args.check and (kind != "lerobot" or args.dry_run):
        raise SO101Error("--check: needs an arm, --robot lerobot:PORT, without --dry-run")
    if args.check and (flag := "--json" if args.json else "--video" if args.video else ""):
        raise SO101Error(f"{flag}: --check keeps its results in a file of its own; drop {flag}")
    if args.replay is not None:
        check_file(args.replay, "--replay")
    check_plain_name("--robot-id", args.robot_id)
    check_arm_flags(args)
    if args.model is not None and args.base_policy is not None:
        raise SO101Error(f"--base-policy {args.base_policy}: --model names a policy already; drop one of them")
    if args.model is not None and Path(args.model).suffix not in (".onnx", ".pt"):
        raise SO101Error(f"--model {args.model}: must end in .onnx or .pt")


def check_arm_flags(args: Any) -> None:
    """Raise SO101Error for the first flag, of these arguments or of so101.practice's, without effect on this arm."""
    if args.robot == "sim":
        check_unused(args, ("robot_id", "camera", "servo_gain"), "only a real arm, --robot lerobot:PORT, has it")


def check_use(args: Args) -> None:
    """Raise SO101Error for the first flag that does nothing in what the others ask for."""
    if args.replay is not None:
        check_unused(args, vars(args).keys() - OF_A_REPLAY, "--replay needs no arm and no policy, and draws outlines")
    if args.robot != "sim":
        check_unused(args, ("visual_randomization",), "only the simulated arm, --robot sim, has it")
    if args.video is None:
        check_unused(args, ("outlines",), "needs --video")
    if args.check:
        check_unused(args, ("episodes", "episode_steps"), "--check has steps of its own")
    args.server.check_used(policy_spec(args))


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
        policy = OpenCVPolicy(policy, task.tape_margin, args.marks)
    policy.firmware_p = task.firmware_p
    return policy, task


# ---------------------------------------------------------------------------------------------------------------------
# the script


def make_robot(args: Args, task: Task) -> Robot:
    """The arm that --robot names, with servos that are set to task.firmware_p."""
    if args.robot == "sim":
        return SimulatedRobot(task, args.visual_randomization)
    return LeRobotArm(args.robot.partition(":")[2], args.robot_id, args.camera, task.firmware_p, say)


@contextlib.contextmanager
def arm_loop(
    args: Args, policy: BasePolicy, task: Task,
    open_arm: Callable[[Args, Task], tuple[Robot, Clock]] = lambda args, task: (make_robot(args, task), Clock()),
) -> Iterator[Loop]:  # fmt: skip
    """The control loop of a policy on the arm; on the way out the arm is left as Loop.leave describes.

    Args:
        args: settings of arm and command law.
        policy: see Loop.
        task: with the P coefficient of the servos and the tape's margin.
        open_arm: opens the arm, and makes its clock.
    """
    with Stoppable():
        (robot, clock), offset_rad = open_arm(args, task), None
        ended: BaseException | None = None
        try:
            if args.robot != "sim":
                profile = load_profile(robot, args.robot_id)
                offset_rad = use_profile(args, robot, policy, profile)
            measured = robot.ranges and Calibration(
                robot.ranges.low_rad - MAX_OFFSET_RAD, robot.ranges.high_rad + MAX_OFFSET_RAD
            )
            controller = make_controller(robot, task, args.max_speed, measured)
            loop = Loop(robot, policy, controller, clock, args.dry_run, offset_rad)
            try:
                yield loop
            except BaseException as error:
                ended = error
                raise
            finally:
                loop.leave(ended)
        finally:
            robot.close()


def use_profile(args: Args, arm: LeRobotArm, policy: BasePolicy, profile: ArmProfile | None) -> np.ndarray:
    """Let arm and policy use what --check has measured, and print what it is; returns the joint offsets (6,), rad."""
    done = {} if profile is None else profile.steps
    profile_gain = profile.gain_factor if "zero and gain" in done else None
    arm.servo_gain = args.servo_gain or profile_gain or arm.servo_gain
    arm.gain_known = bool(args.servo_gain or profile_gain)
    say(f"servos at {arm.voltage:.1f} V, P = {arm.firmware_p}, gain {arm.servo_gain:.2f} of the 12 V STS3215's")
    if (missing := [step for step in STEPS if step not in done]) and not args.check:
        say(f"this arm was not checked: {', '.join(missing)}; check it once with so101.drive --check")
    if profile is None:
        return np.zeros(ACT_DIM)
    lift, elbow = np.rad2deg(profile.offset_rad[1:3])
    side = "on the arm's side" if profile.camera_turned else "opposite the arm"
    say(f"zero of shoulder_lift off by {lift:+.1f} degrees, of elbow_flex by {elbow:+.1f}; camera {side}")
    if isinstance(policy, OpenCVPolicy):
        policy.locator.turned = profile.camera_turned
    return np.array(profile.offset_rad)


def run_episode(loop: Loop, args: Args, task: Task, number: int) -> dict[str, Any]:
    """One episode, from the start of the scene to a raised arm; returns what the report needs of it."""
    robot, policy, sim = loop.robot, loop.policy, args.robot == "sim"
    loop.controller.reset()
    if sim:
        robot.reset(TEST_SEED + number)
    else:
        ask("lay the sheet, keep clear of the arm, and press Enter (Ctrl+C stops at any time) ", robot)
        if not args.dry_run and not robot.enabled:
            loop.enable()
    loop.measure()
    if not args.dry_run:
        loop.home()
    episode = {"episode": number, "trouble": "", "seen_inside": False}
    try:
        episode |= loop.episode(args.episode_steps, task.tape_margin)
    except Blind as blind:
        episode |= {"trouble": str(blind), "ticks": loop.moves, "missed": loop.missed}
        if not sim:
            say(f"stopped: {blind}")
    if sim:
        truth, estimate = robot.truth(), policy.estimate
        known = estimate is not None and np.isfinite(estimate).all()
        error_mm = 1000 * float(np.linalg.norm(estimate[0, :2] - truth["sheet"][:2])) if known else None
        episode |= {"success": truth["inside"], "error_mm": error_mm}
    elif not args.dry_run and not policy.quit:
        loop.lift()
        loop.go(RAISED_RAD)
    return episode


def run_episodes(
    args: Args, policy: BasePolicy, task: Task, film: CameraFilm | None
) -> tuple[dict[str, Any], BaseException | None]:  # fmt: skip
    """All episodes, filmed; returns the results, and what has ended the run early."""
    episodes: list[dict[str, Any]] = []
    bar = tqdm(total=args.episodes, unit="episode", dynamic_ncols=True, delay=1e-3, disable=args.episodes == 1 or None)
    loop, ended = None, None
    try:
        with arm_loop(args, policy, task) as loop:
            loop.film = film
            for number in range(args.episodes):
                episode = run_episode(loop, args, task, number)
                if loop.policy.quit:  # the episode does not count
                    break
                episodes.append(episode)
                bar.update()
    except BaseException as error:  # main raises it again, after the results are written
        if loop is None:
            raise
        ended = error
        if isinstance(error, SO101Error):
            where = "after the last episode" if len(episodes) == args.episodes else f"in episode {len(episodes) + 1}"
            ended = SO101Error(f"--robot {args.robot}: stopped {where}: {error}")
    finally:
        bar.close()
    result = {**summarize(episodes, loop.clock, args.robot == "sim"), "events": dict(loop.robot.events)}
    if ended:
        result["stopped"] = f"signal {ended.signum}" if isinstance(ended, Stop) else str(ended) or repr(ended)
    return {**result, "episode_list": episodes}, ended


def summarize(episodes: list[dict[str, Any]], clock: Clock, sim: bool) -> dict[str, Any]:
    """Means over the episodes; `sim` adds what only a simulation can measure."""
    if not episodes:
        return {"episodes": 0}
    ticks, missed = (sum(episode[name] for episode in episodes) for name in ("ticks", "missed"))
    result = {
        "episodes": len(episodes),
        "seen_inside_rate": float(np.mean([episode["seen_inside"] for episode in episodes])),
        "mean_steps": ticks / len(episodes),
        "missed_deadlines": missed / max(ticks, 1),
        "worst_period_ms": 1000 * clock.worst_s,
        "blind": sum(bool(episode["trouble"]) for episode in episodes),
    }
    if sim:
        seen = [episode["error_mm"] for episode in episodes if episode["error_mm"] is not None]
        result["success_rate"] = float(np.mean([episode["success"] for episode in episodes]))
        result["mean_error_mm"] = float(np.mean(seen)) if seen else None
    return result


def print_report(result: dict[str, Any]) -> None:
    """Print what `summarize` returned, and what the arm reported."""
    if result["episodes"]:
        print(f"{result['episodes']} episodes, {result['mean_steps']:.0f} steps each")
        if "success_rate" in result:
            print(f"success, ground truth      {result['success_rate']:.2f}")
        print(f"success, by camera         {result['seen_inside_rate']:.2f}")
        print(f"episodes without a view    {result['blind']}")
        ticks = result["episodes"] * result["mean_steps"]
        print(f"deadlines missed at {CONTROL_HZ} Hz  {result['missed_deadlines']:.2%} of {ticks:.0f}")
    print_events(result["events"])


def print_events(events: Mapping[str, int]) -> None:
    """Print what an arm has counted, such as answers of its bus that were lost."""
    for what, count in sorted(events.items()):
        if count:
            print(f"{what:<26} {count}")


def main() -> int:
    """Run the episodes, the check, or the locator over a film; returns the exit code."""
    args = parse(Args, __doc__)
    check_args(args)
    check_use(args)
    import_extra("cv2", "arm", "python -m so101.drive")  # fails early, before the arm moves
    if args.replay is not None:
        return replay(args)
    policy, task = make_policy(args)
    use_one_torch_thread()
    try:
        if args.check:
            with arm_loop(args, policy, task) as loop:
                Guide(loop, args.robot_id, task.tape_margin, args.marks).run()
            return 0
        film = None if args.video is None else CameraFilm(args.video, task.tape_margin, args.outlines)
        result, ended = run_episodes(args, policy, task, film)
    finally:
        policy.close()
    if not result["episodes"] and not ended:
        ended = SO101Error(f"{policy_spec(args)}: quit before its first episode ended; there is nothing to report")
    keep_results(args, task, result, film, ended)
    return 0


def keep_results(
    args: Args, task: Task, result: dict[str, Any], film: CameraFilm | None, ended: BaseException | None
) -> None:  # fmt: skip
    """Write and print everything that a run leaves, also if one of it fails; then raise what has ended the run.

    Raises what could not be written if the run has not ended by an error.
    """

    def write_results() -> None:
        if args.json:
            head = {"base_policy": policy_spec(args), "robot": args.robot, "firmware_p": task.firmware_p}
            write_json(Path(args.json), {**head, **result})

    for keep in (write_results, lambda: print_report(result), film.save if film else lambda: None):
        try:
            keep()
        except (SO101Error, OSError) as error:
            if ended is not None:
                say(f"also: {error}")
            ended = ended or error
    if ended is not None:
        raise ended


def replay(args: Args) -> int:
    """Find tape and sheet in a recorded film; returns the exit code."""
    margin = Task().tape_margin if args.tape_margin is None else args.tape_margin
    film = None if args.video is None else CameraFilm(args.video, margin, every=1)
    result = replay_film(args.replay, SheetLocator(margin, args.marks), film)
    if film is not None:
        film.save()
    if args.json:
        write_json(Path(args.json), result)
    print_replay(result)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
