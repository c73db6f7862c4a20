"""Reinforcement learning on the arm itself: an arm practises the task, and a residual learns from every step it makes.

    python -m so101.practice --virtual-time --gain 0.7                   # a simulated arm with weak servos, in minutes
    python -m so101.practice --robot lerobot:/dev/ttyACM0 --robot-id my_arm --camera 0 --minutes 20

The loop of so101.drive runs a policy and a residual that explores. A learner in a process of its own learns by SAC
(so101/sac.py) from what the arm has measured and the camera has seen; new weights come between episodes. After each
episode the arm drags the sheet to a new start by itself. Read docs/practice.md, and docs/arm.md before the first run
on a real arm.
"""

if __name__ == "__main__":  # Ctrl+C during the imports ends the program without a traceback
    import signal

    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tqdm import tqdm

from so101 import drive
from so101 import sac as trainer
from so101.arm_film import CameraFilm
from so101.base import BasePolicy, check_base
from so101.camera import CAMERA
from so101.checkpoints import CHECKPOINT, load_file, restoring, to_numpy, to_plain
from so101.cli import check_flags, check_memory, check_unused, command_of, flag_of, parse, run_script
from so101.demos import Demos, read_demos, watch
from so101.extras import import_extra
from so101.files import write_json
from so101.learner import FILM_EVERY, MODEL, RECENT, Episode, Judge, LearnerProcess, Lesson, LocalLearner, set_weights
from so101.learner import Run as LearnerRun
from so101.locator import Marks
from so101.loop import RAISED_RAD, Blind, Clock, Loop, ask, say
from so101.opencv import OpenCVPolicy
from so101.policies import load_policy
from so101.practising import PractisingPolicy
from so101.recorder import Run
from so101.robot import LEROBOT_P, Robot
from so101.run_dirs import describe_run, new_run_dir
from so101.scene_reset import HandNeeded, SceneReset
from so101.server import Server
from so101.settings import MAX_COUNT, restore_args, restore_settings
from so101.simulated_arm import Flaws, SimulatedRobot
from so101.trust import allow_flags, trust_of
from so101.virtual_time import VirtualClock, VirtualRobot
from so101_env import SO101ResidualVectorEnv, Task
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error
from so101_sim.scene import ASSETS, CONTROL_HZ
from so101_sim.vector import set_generator

SCRIPT = Path(__file__).name
FILMED = 10  # every tenth episode is filmed, with the reset before it; the first one, too
PRIOR_BATCH = 0.1  # --base-batch with a prior: simulation and arm differ, and more of the one delays learning the other
RECORD = {"success", "steps", "missed", "waited_s"}  # what the record of every episode has, among others
FAR = 1e-3  # relative rounding of joint targets in a dataset
MAX_HANDS = 5  # a sheet that cannot be reset after a person has laid it this often ends the run

# ---------------------------------------------------------------------------------------------------------------------
# settings: every field is a flag


@dataclasses.dataclass
class Args:
    base_policy: str | None = None
    """policy to start from, which the residual corrects: onnx:PATH, checkpoint:PATH, jacobian, bc:PATH or any other
    base policy (default: assets/arm.onnx); with --demos also zero. Where it needs the sheet's pose, it gets it from
    OpenCV"""
    minutes: float = 20.0
    """arm time in all, in minutes: episodes and resets"""
    robot: str = "sim"
    """sim, or lerobot:PORT"""
    robot_id: str = "so101"
    """with lerobot: the name under which LeRobot has stored the arm's calibration"""
    camera: str = "0"
    """with lerobot: index, path or http address of the camera that looks at the table"""
    servo_gain: float | None = None
    """with lerobot: gain of the servos as a factor of the 12 V STS3215's at the same P (default: as so101.drive)"""
    max_speed: float = 2.0
    """largest speed of a joint's target, rad/s"""
    marks: Marks = "tape"
    """what shows the camera where the rectangle lies: red tape, or the four tags of assets/tags.pdf at its corners"""
    firmware_p: int | None = None
    """P coefficient that the servos are set to (default: what the base policy was trained with; otherwise 16)"""
    tape_margin: float | None = None
    """m between sheet and tape on every side (default: what the base policy was trained with)"""
    alpha: float = Task.alpha
    """share of 0.02 rad per control step that the residual commands, in [0, 1]"""
    observe_base: bool = True
    """append the base policy's action to what the residual observes"""
    seed: int = 1
    """seed of weights, exploration, samples and starts; with sim also of the arm"""
    virtual_time: bool = False
    """with sim: as fast as this machine can; the same command gives the same numbers"""
    learner_process: bool = True
    """learn in a process of its own; with --virtual-time the results do not depend on it"""
    log_dir: str = "logs"
    """directory that gets one directory per run"""
    run_name: str | None = None
    """name of that directory (default: practice, the time and the seed)"""
    prior: str | None = None
    """checkpoint of so101.sac on the same base policy, in simulation: its networks are where learning starts, and its
    steps are --base-batch of every batch, by default a tenth"""
    demos: str | None = None
    """LeRobotDataset of this arm and camera with demonstrations by a person or another policy: practice learns from
    them first, and they are --base-batch of every batch"""
    demos_camera: str = CAMERA
    """with --demos: name of the camera in the dataset"""
    demos_units: str | None = None
    """with --demos: unit of the joints, deg, deg-old, norm or rad, for a dataset that does not contain it"""
    resume: str | None = None
    """practice_model.pt of a run to go on with, with its buffer; --minutes counts from its beginning"""
    sac: trainer.SAC = dataclasses.field(default_factory=lambda: trainer.SAC(num_envs=1, train_episode_steps=150))
    networks: trainer.Networks = dataclasses.field(default_factory=trainer.Networks)
    server: Server = dataclasses.field(default_factory=Server)
    flaws: Flaws = dataclasses.field(default_factory=Flaws)


@dataclasses.dataclass
class ArmState:
    """What a checkpoint has of the arm and of the process that moves it, see Practice.state."""

    generator: torch.Tensor  # of the exploration
    rng: dict  # bit generator of the starts
    ticks: int  # control steps of all runs: arm time
    hands: int  # how often a hand had to lay the sheet
    steps: int  # control steps that were learned from
    demonstrations: int  # of the arm's steps, how many the base alone makes at first
    robot: str  # sim or lerobot
    robot_id: str
    virtual_time: bool
    max_speed: float  # rad/s
    marks: Marks
    flaws: Flaws
    scene: dict | None  # in virtual time: arm and sheet, and what the loop knows of them

    RANGES: ClassVar[dict[str, tuple[float, float]]] = dict.fromkeys(
        ("ticks", "hands", "steps", "demonstrations"), (0, MAX_COUNT)
    )


RANGES = {**trainer.RANGES, "minutes": (0.1, 10_000), "num_envs": (1, 1)}
# flags that must be those of the prior; those that a resumed run may not change, in addition to sac and networks. The
# base policy is compared by its content, see check_base
FROM_PRIOR = {
    "": ("firmware_p", "tape_margin", "alpha", "observe_base"),
    "sac": ("gamma", "reward_scale", "shaping", "learning_starts"),
}
LEARNED = (*FROM_PRIOR[""], "seed", "max_speed", "marks")
# settings of the task that must be those of the prior: what networks see, what residuals do, and how they are rewarded
SAME_TASK = ("observe_load", "arrival_yaw_weight", "act_scale", "residual_penalty")


def check_flaws(flaws: Flaws) -> None:
    """Raise SO101Error with the name of the first flaw that is out of range, or that an arm in this process lacks."""
    check_flags(flaws, Flaws.RANGES)
    if flaws.picture_latency_s:
        raise SO101Error("--picture-latency-s: only the camera of so101.virtual_arm has it; drop the flag")


def check_args(args: Args) -> None:
    """Raise SO101Error with the name of the first flag that cannot be used."""
    drive.check_args(drive_args(args))
    for settings in (args, args.sac, args.networks, args.server):
        check_flags(settings, {name: limits for name, limits in RANGES.items() if hasattr(settings, name)})
    check_flaws(args.flaws)
    Run(run_name=args.run_name).check_name()
    if args.base_policy == "zero" and args.demos is None and args.resume is None:
        raise SO101Error("--base-policy zero: an arm needs a policy or --demos to start from; name one")
    if (args.base_policy or "").startswith("opencv:"):
        raise SO101Error(f"--base-policy {args.base_policy}: the sheet is located anyway; drop opencv:")
    if args.robot != "sim" and args.virtual_time:
        raise SO101Error(f"--virtual-time: --robot {args.robot} runs in real time; drop one of them")
    if args.robot != "sim":
        for field in dataclasses.fields(Flaws):
            if getattr(args.flaws, field.name) != field.default:
                raise SO101Error(f"{flag_of(field.name)}: only the simulated arm, --robot sim, can be given flaws")
    for name in ("prior", "demos") if args.resume is not None else ():
        if getattr(args, name) is not None:
            raise SO101Error(f"{flag_of(name)}: a resumed run has begun already; drop the flag")
    if args.demos is None:
        check_unused(args, ("demos_camera", "demos_units"), "needs --demos")
    elif args.prior is not None:
        raise SO101Error("--prior: brings steps of its own, which take the place of demonstrations; drop --demos or it")
    elif args.alpha == 0:
        raise SO101Error("--alpha 0: a residual of zero learns nothing from --demos; raise it")
    else:
        check_unused(args.sac, ("learning_starts",), "--demos take the place of the first steps")
    for name in ("run_name", "log_dir") if args.resume is not None else ():
        if getattr(args, name) != getattr(Args, name):
            raise SO101Error(f"{flag_of(name)}: a resumed run goes on in its own directory; drop the flag")


def drive_args(args: Args) -> drive.Args:
    """The settings that the loop of so101.drive needs."""
    names = ("robot", "robot_id", "camera", "servo_gain", "max_speed", "marks", "firmware_p", "tape_margin")
    return drive.Args(**{name: getattr(args, name) for name in names}, server=args.server)


def parse_args() -> tuple[Args, dict[str, Any] | None]:
    """The command line; with --resume or --prior also that checkpoint, whose settings are then the defaults."""
    args = parse(Args, __doc__)
    check_args(args)
    path = args.resume or args.prior
    if path is None:
        args.server.check_used(args.base_policy or "onnx:")
        return args, None
    saved = load_file(path, CHECKPOINT)
    own = saved["ranks"][0] if saved["ranks"] else None
    if args.resume and (saved["script"] != trainer.SCRIPT or not isinstance(own, dict) or "arm" not in own):
        raise SO101Error(f"--resume {path}: not of so101.practice; resume it with the script that wrote it")
    if saved["script"] != trainer.SCRIPT:
        raise SO101Error(f"--prior {path}: not of so101.sac, but of {saved['script']:.50}")
    trust = trust_of(args).also(args.base_policy)
    then = restore_args(trainer.Args, trainer.check_args, saved["args"], path, trust)
    if args.prior:
        if then.base.base_policy == "zero":
            raise SO101Error(f"--prior {path}: was trained from scratch; train one on a policy, with --base-policy")
        then.sac.num_envs, then.sac.train_episode_steps = 1, args.sac.train_episode_steps
        then.sac.base_batch = PRIOR_BATCH
    task = {name: getattr(then.task, name) for name in ("firmware_p", "tape_margin", "alpha")}
    before = dataclasses.replace(
        Args(), seed=then.seed if args.resume else Args.seed, sac=then.sac, networks=then.networks,
        server=then.base.server, base_policy=then.base.base_policy, observe_base=then.base.observe_base, **task,
        **(same_arm(restore_settings(ArmState, own["arm"], path), args) if args.resume else {}),
    )  # fmt: skip
    args = parse(Args, __doc__, default=before)
    fixed = {"": LEARNED, "sac": vars(args.sac), "networks": vars(args.networks)}
    for part, names in (fixed | ({"flaws": vars(args.flaws)} if args.resume else FROM_PRIOR)).items():
        now, old = (getattr(each, part) if part else each for each in (args, before))
        for name in names:
            if (new := getattr(now, name)) != getattr(old, name):
                was = getattr(old, name)
                raise SO101Error(f"{flag_of(name)} {new}: {path} was trained with {was}; drop the flag")
    check_args(args)
    return args, saved


def same_arm(saved: ArmState, args: Args) -> dict[str, Any]:
    """The settings that make the simulated arm of a resumed run; `saved` is what the checkpoint has of the arm.

    Raises SO101Error if args name another arm: steps of two arms do not belong into one buffer. Port and camera of a
    real arm are not taken from a file.
    """
    name, dynamics = saved.robot_id, {"max_speed": saved.max_speed, "marks": saved.marks}
    if saved.robot == "sim":
        if args.robot != "sim":
            raise SO101Error(f"--robot {args.robot}: {args.resume} practised on a simulated arm; begin a new run")
        return dynamics | {"flaws": saved.flaws, "virtual_time": saved.virtual_time}
    if args.robot == "sim":
        raise SO101Error(f"--robot sim: {args.resume} practised on the arm {name:.50}; name its --robot and --camera")
    if args.robot_id != name:
        raise SO101Error(f"--robot-id {args.robot_id}: {args.resume} practised on the arm {name:.50}")
    return dynamics


def check_prior(saved: dict[str, Any], args: Args, task: Task) -> None:
    """Raise SO101Error unless the prior was trained on the task that the arm practises."""
    for name in SAME_TASK:
        if (old := saved["args"]["task"][name]) != (new := getattr(task, name)):
            raise SO101Error(f"--prior {args.prior}: was trained with {flag_of(name)} {old}; practice needs {new}")


def check_time(saved: dict[str, Any], args: Args) -> None:
    """Raise SO101Error if no time is left for a resumed run."""
    done = saved["ranks"][0]["arm"]["ticks"] / CONTROL_HZ / 60
    if done >= args.minutes:
        raise SO101Error(f"--minutes {args.minutes:g}: {args.resume} has {done:.1f} already; name more")


def learner_args(args: Args, task: Task, capacity: int) -> trainer.Args:
    """Settings for the learner and its checkpoints: complete ones of so101/sac.py."""
    base = trainer.Base(args.base_policy, args.observe_base, args.server)
    return trainer.Args(args.seed, capacity, args.sac, args.networks, base, task, Run())


# ---------------------------------------------------------------------------------------------------------------------
# the residual in the loop


def make_policy(args: Args, agent: trainer.Agent, base: BasePolicy | None, task: Task) -> OpenCVPolicy:
    """The policy of the loop: OpenCV, the residual, and its base."""
    residual = PractisingPolicy(base, task, agent, args.observe_base, args.seed)
    policy = OpenCVPolicy(residual, task.tape_margin, args.marks, turned=args.flaws.camera_turned)
    policy.firmware_p = task.firmware_p
    return policy


def load_base(args: Args) -> tuple[BasePolicy | None, Task]:
    """The base policy, None for zero, and the task with margin and P of this run."""
    base = load_policy(args.base_policy, args.server)
    if others := [camera for camera in base.cameras if camera != CAMERA] if base else []:
        raise SO101Error(f"--base-policy {args.base_policy}: needs the camera {others[0]}; the arm only has {CAMERA}")
    task = getattr(base, "task", None) or Task(firmware_p=LEROBOT_P, arm_randomization=True)
    changes = {"firmware_p": args.firmware_p, "tape_margin": args.tape_margin, "alpha": args.alpha}
    changes = {name: value for name, value in changes.items() if value is not None}
    return base, dataclasses.replace(task, observe_load=True, visual_randomization=False, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# practice


def open_arm(args: Args, task: Task) -> tuple[Robot, Clock]:
    """The arm that --robot names, and its clock."""
    if args.robot == "sim" and args.virtual_time:
        robot = VirtualRobot(task, args.flaws)
        return robot, VirtualClock(robot)
    if args.robot == "sim":
        return SimulatedRobot(task, flaws=args.flaws), Clock()
    return drive.make_robot(drive_args(args), task), Clock()


class Practice:
    """Episodes and resets on an arm, whose steps a learner gets.

    Args:
        args: settings.
        loop: the control loop, with an OpenCVPolicy on a PractisingPolicy.
        task: the residual's task.
        learner: a LocalLearner or a LearnerProcess.
        run_dir: where pictures go.
        demos: demonstrations to learn from first.
    """

    def __init__(
        self, args: Args, loop: Loop, task: Task, learner: LocalLearner | LearnerProcess, run_dir: Path,
        demos: Demos | None = None,
    ):  # fmt: skip
        self.args, self.loop, self.task, self.learner, self.run_dir = args, loop, task, learner, run_dir
        self.demos = demos
        self.residual: PractisingPolicy = loop.policy.base
        env = SO101ResidualVectorEnv(1, task=task, max_episode_steps=args.sac.train_episode_steps)
        self.judge = Judge(env, args.sac.gamma if args.sac.shaping else None)
        self.scene_reset = SceneReset(loop, task, loop.policy.locator)
        self.rng = np.random.default_rng((args.seed, 1))  # for starts; the simulated arm's own use the seed alone
        self.records: list[dict[str, Any]] = []
        self.steps, self.hands, self.earlier_ticks = 0, 0, 0  # steps learned from; control steps of earlier runs
        self.started = False  # whether the arm is where the run left it, otherwise see start
        # steps of the base alone, at first
        self.demonstrations = 0 if args.prior or args.demos else args.sac.learning_starts

    @property
    def arm_time_s(self) -> float:
        """Arm time, of earlier runs, too."""
        return self.ticks / CONTROL_HZ

    @property
    def ticks(self) -> int:
        """Control steps, of earlier runs, too, those of the resets included."""
        return self.earlier_ticks + self.loop.clock.ticks

    @property
    def parts(self) -> dict[str, Any]:
        """What a run in virtual time goes on with, to the bit; a real arm is measured and looked at again."""
        return {"robot": self.loop.robot, "controller": self.loop.controller, "scene_reset": self.scene_reset}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of this process."""
        scene = None
        if self.args.virtual_time:
            scene = to_plain({name: part.get_state() for name, part in self.parts.items()})
        return {
            "generator": self.residual.generator.get_state(), "rng": to_plain(self.rng.bit_generator.state),
            "ticks": self.ticks, "hands": self.hands, "steps": self.steps,
            "demonstrations": self.demonstrations, "robot": self.args.robot.partition(":")[0],
            "robot_id": self.args.robot_id, "virtual_time": self.args.virtual_time,
            "max_speed": self.args.max_speed, "marks": self.args.marks,
            "flaws": dataclasses.asdict(self.args.flaws), "scene": scene,
        }  # fmt: skip

    def set_state(self, saved: dict[str, Any], path: str) -> None:
        """Go on from the checkpoint at path, whose content is `saved`."""
        own, records = restore_settings(ArmState, saved["ranks"][0]["arm"], path), saved["recorder"]["recent_episodes"]
        with restoring(path):
            self.residual.generator.set_state(own.generator)
            set_generator(self.rng, to_numpy(own.rng))
            if not records or any(RECORD - each.keys() for each in records):
                raise ValueError("its episodes are not those of an arm")
            if self.args.virtual_time and own.scene is not None:
                self.loop.robot.reset(self.args.seed)
                for name, part in self.parts.items():
                    part.set_state(to_numpy(own.scene[name]))
                self.started = True
        self.earlier_ticks, self.hands, self.records = own.ticks, own.hands, [dict(record) for record in records]
        self.steps, self.demonstrations = own.steps, own.demonstrations

    def start(self) -> None:
        """Before the first episode: a sheet on the table, torque, and the arm, which may be folded, at home."""
        self.loop.controller.reset()
        if self.args.robot == "sim":
            self.loop.robot.reset(self.args.seed)
        else:
            request = "lay the sheet beside the tape, keep clear of the arm, and press Enter"
            ask(f"{request} (Ctrl+C stops at any time) ", self.loop.robot)
            self.loop.enable()
        self.loop.home()

    def study(self, demos: Demos) -> None:
        """Let the learner learn from demonstrations. The arm stays at home, where its servos' gain has been estimated.

        Raises SO101Error if the dataset cannot be used, or if none of its episodes succeeds as the camera sees it.
        """
        say(f"looking at the demonstrations: {len(demos.episodes)} episodes, {demos.steps} steps")
        if self.task.firmware_p != LEROBOT_P:
            say(f"the arm has P = {self.task.firmware_p}; LeRobot records with {LEROBOT_P}, which shows other loads")
        episodes, far = [], 0
        for number in tqdm(demos.episodes, unit="episode", dynamic_ncols=True, leave=False, disable=None):
            shown = watch(demos, number, self.loop, self.task.tape_margin)
            if shown is not None:
                obs, wanted, success = shown
                actions = np.clip(wanted, -1.0, 1.0)
                episodes.append(Episode(obs, actions, self.judge.rewards(obs, actions, success), success))
                far += int((np.abs(wanted) > 1.0 + FAR).any(axis=1).sum())
        steps, succeeded = sum(len(each.actions) for each in episodes), sum(each.terminated for each in episodes)
        if not succeeded:
            text = f"{len(episodes)} of {len(demos.episodes)} episodes show tape and sheet, and none of them success"
            raise SO101Error(f"--demos {demos.path}: {text}; check a video with so101.drive --replay FILE.mp4")
        beyond = f"{far / steps:.0%} of them farther from the base policy than the residual reaches"
        say(f"{len(episodes)} of them show tape and sheet, {succeeded} succeed: {steps} steps, {beyond}")
        say("learning from them")
        self.learner.study(episodes, self.loop.robot.watch)

    def run(self) -> Iterator[dict[str, Any]]:
        """Practise until the time is over; the record of every episode, once the learner has it."""
        if not self.started:
            self.start()
        if self.demos is not None:
            self.study(self.demos)
        while self.arm_time_s < 60 * self.args.minutes:
            before = self.loop.clock.ticks
            filmed = len(self.records) % FILMED == 0
            film = CameraFilm("episode.mp4", self.task.tape_margin, every=FILM_EVERY) if filmed else None
            self.loop.film = film  # it shows the reset, too
            hands = self.reset_scene()
            reset_ticks = self.loop.clock.ticks - before
            began = time.perf_counter()
            set_weights(self.residual.agent, self.learner.take(self.loop.robot.watch))
            waited_s = time.perf_counter() - began
            lesson = self.episode({"reset_ticks": reset_ticks, "hands": hands, "waited_s": waited_s}, film)
            if self.loop.policy.quit:  # the episode does not count
                break
            self.learner.give(lesson)
            self.records.append(lesson.record)
            yield lesson.record
        set_weights(self.residual.agent, self.learner.take(self.loop.robot.watch))

    def reset_scene(self) -> int:
        """Bring the sheet to a new start and the arm home; returns how often a hand had to lay it."""
        for hands in range(MAX_HANDS + 1):
            try:
                # a sheet that stays where an episode has failed makes every further episode start there
                self.scene_reset.run(self.rng, fresh=bool(self.records) and not hands)
                return hands
            except (HandNeeded, Blind) as error:
                if hands == MAX_HANDS:
                    raise
                self.hands += 1
                self.loop.lift_if_low()
                self.loop.go(RAISED_RAD)
                picture = self.run_dir / "hand.png"
                self.scene_reset.save_picture(picture, str(error))
                if self.args.robot == "sim":
                    self.loop.robot.lay_sheet(int(self.rng.integers(2**31)))
                else:
                    ask(f"{error} (see {picture}). The arm stays under torque. Then press Enter ", self.loop.robot)
                self.loop.measure()
        raise AssertionError("the loop returns or raises")

    def episode(self, record: dict[str, Any], film: CameraFilm | None) -> Lesson:
        """One episode; its lesson for the learner, with the record completed, and the film."""
        self.residual.exploring = self.steps >= self.demonstrations
        result, trouble = {"seen_inside": False}, ""
        try:
            result = self.loop.episode(self.args.sac.train_episode_steps, self.task.tape_margin)
        except Blind as blind:
            trouble = str(blind)
        obs, actions = self.residual.steps(self.loop.moves, complete=not trouble)
        rewards = self.judge.rewards(obs, actions, result["seen_inside"])
        self.steps += len(actions)
        record |= {
            "episode": len(self.records) + 1, "success": result["seen_inside"], "steps": self.loop.moves,
            "return": float(rewards.sum()), "arm_time_s": self.arm_time_s, "trouble": trouble,
            "exploring": self.residual.exploring, "missed": self.loop.missed,
            "residual_magnitude": float(np.linalg.norm(actions, axis=1).mean()) if len(actions) else 0.0,
        }  # fmt: skip
        episode = Episode(obs, actions, rewards, bool(result["seen_inside"]))
        return Lesson(episode, record, self.state(), film.frames if film else [])


def arm_flags(args: Args) -> str:
    """The flags that name the arm and its scene, for a command that is printed."""
    names = ("max_speed", "marks", *(() if args.robot == "sim" else ("robot", "robot_id", "camera", "servo_gain")))
    named = [name for name in names if getattr(args, name) != getattr(Args, name)]
    return "".join(f" {flag_of(name)} {shlex.quote(str(getattr(args, name)))}" for name in named)


def print_report(practice: Practice, run_dir: Path, args: Args) -> None:
    """Print how it went, and the commands that use the result."""
    records, model = practice.records[: len(practice.records) - practice.learner.lost], run_dir / MODEL
    if not records or not model.exists():
        print("no episode was learned from")
        return
    first, last = (np.mean([each["success"] for each in part]) for part in (records[:RECENT], records[-RECENT:]))
    ticks, missed = (sum(each[name] for each in records) for name in ("steps", "missed"))
    print(f"{len(records)} episodes in {practice.arm_time_s / 60:.1f} minutes of arm time, {ticks} steps")
    print(
        f"success of the first {min(RECENT, len(records))} {first:.2f}, of the last {last:.2f}, as seen by the camera"
    )
    print(f"hands {practice.hands}, missed deadlines {missed} of {ticks}", end=", ")
    print(f"waited for the learner {sum(each['waited_s'] for each in records):.1f} s")
    allow = allow_flags([args.base_policy], trust_of(args))
    drive.print_events(practice.loop.robot.events)
    arm, model = arm_flags(args), shlex.quote(str(model))
    print(f"run:      {command_of('so101.drive')} --model {model}{arm}{allow}")
    print(f"evaluate: {command_of('eval_so101.py')} --model {model}{allow}")
    print(f"go on:    {command_of('so101.practice')} --resume {model} --minutes {2 * args.minutes:g}{arm}{allow}")


def main() -> int:
    """Practise; returns the exit code."""
    args, saved = parse_args()
    import_extra("cv2", "arm", "python -m so101.practice")  # fails early, before the arm moves
    torch.set_num_threads(1)  # leaves the other cores to the learner, the simulation or the camera
    args.base_policy = args.base_policy or f"onnx:{ASSETS / 'arm.onnx'}"
    args.observe_base &= args.base_policy != "zero"
    base, task = load_base(args)
    begun_with = args.resume or args.prior
    capacity = round(60 * args.minutes * CONTROL_HZ) + args.sac.train_episode_steps
    demos = read_demos(Path(args.demos), args.demos_camera, args.demos_units) if args.demos is not None else None
    if saved:
        with restoring(begun_with):
            capacity += int(saved["global_step"])  # steps that the buffer begins with
    if demos is not None:
        capacity += demos.steps
        if demos.steps >= args.sac.buffer_size:
            raise SO101Error(f"--buffer-size {args.sac.buffer_size}: --demos has {demos.steps} steps; raise it")
        args.sac.learning_starts = 1
    if not args.prior and args.sac.learning_starts >= capacity:
        text = f"--learning-starts {args.sac.learning_starts}: nothing is learned in {args.minutes:g} minutes"
        raise SO101Error(f"{text}; lower it, or raise --minutes")
    settings = learner_args(args, task, capacity)
    trainer.check_args(settings)
    agent = trainer.Agent(settings)
    check_memory("--minutes", 8 * min(capacity, args.sac.buffer_size) * (agent.features.dim + ACT_DIM))
    if saved:
        check_base(saved, args.base_policy, base, begun_with)
    if args.resume:
        check_time(saved, args)
        run_dir = Path(args.resume).parent
        if (run_dir / MODEL).exists() and not (run_dir / MODEL).samefile(args.resume):
            text = f"the run would replace {run_dir / MODEL}; copy the file into a directory of its own"
            raise SO101Error(f"--resume {args.resume}: {text}")
    else:
        if args.prior:
            check_prior(saved, args, task)
        name = args.run_name or f"practice_{time.strftime('%Y%m%d-%H%M%S')}_s{args.seed}"
        run_dir = new_run_dir(Path(args.log_dir), name, "tensorboard")
        write_json(run_dir / "config.json", describe_run(SCRIPT, args))
    say(f"everything goes to {run_dir}; to watch: tensorboard --logdir {run_dir}")
    policy, practice = make_policy(args, agent, base, task), None
    run = LearnerRun(settings, capacity, run_dir, policy.fingerprint, args.resume, args.prior)
    learner = (LearnerProcess if args.learner_process else LocalLearner)(run)
    try:
        with contextlib.closing(policy), contextlib.closing(learner):
            learner.take()  # a learner that cannot begin says so before the arm moves
            with drive.arm_loop(drive_args(args), policy, task, lambda _, task: open_arm(args, task)) as loop:
                begun = Practice(args, loop, task, learner, run_dir, demos)
                if args.resume:
                    begun.set_state(saved, args.resume)
                practice = begun
                follow(practice)
    except SO101Error as error:
        if practice is None or not (run_dir / MODEL).exists():
            raise
        raise SO101Error(f"{error}; resume with --resume {shlex.quote(str(run_dir / MODEL))}") from error
    finally:
        if practice is not None:
            print_report(practice, run_dir, args)
    return 0


def follow(practice: Practice) -> None:
    """Practise to the end, and show arm time and success."""
    total = 60 * practice.args.minutes
    with tqdm(
        total=round(total), initial=round(practice.arm_time_s), unit="s", dynamic_ncols=True, disable=None
    ) as bar:
        for record in practice.run():
            recent = np.mean([each["success"] for each in practice.records[-RECENT:]])
            bar.set_description_str(f"success {recent:.2f}", refresh=False)
            bar.update(min(round(record["arm_time_s"]), bar.total) - bar.n)


if __name__ == "__main__":
    sys.exit(run_script(main))
