"""A simulated arm that behaves like a real one, in real time and in its own process.

It has encoder errors, servos at LeRobot's gain with one degree of backlash, command latency, and a camera. It answers
requests like the bus of a real arm. Only the report at the end uses the true state (`truth`).
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import mujoco
import numpy as np
from gymnasium.utils import seeding

from so101.processes import spawn
from so101.robot import Picture, Robot, RobotError
from so101_env import (
    FINGERS,
    TAPE_CENTER_M,
    DomainRandomization,
    PaperVisuals,
    Task,
    draw_start,
    make_arms,
    resample_sheet,
    scene_of,
    sheet_inside,
    start_qpos,
    support_presses,
)
from so101_sim.control import ACT_DIM, BACKLASH_RAD, TICKS_PER_TURN
from so101_sim.errors import SO101Error, check_arrays
from so101_sim.scene import CONTROL_HZ, Renderer, add_noise, camera_names

AWAY_M = 0.9  # x of a sheet that is out of reach and out of view
ANSWER_S = 0.05  # a bus without an answer for this long counts as lost
RESET_S = 10.0  # longest wait for a new episode, and for its first picture


HALF_TURN = np.array([0.0, 0.0, 0.0, 1.0])  # quaternion, about the vertical


@dataclasses.dataclass(frozen=True)
class Flaws:
    """What is wrong with an arm, its servos, its table or its camera. The defaults are an arm in good order."""

    joint_offset_deg: tuple[float, float, float, float, float, float] = (0.0,) * ACT_DIM
    """degrees that each joint's encoder reads too much: a calibration that is off, shoulder_pan first"""
    gain: float = 1.0
    """factor on the gain of all servos"""
    backlash_deg: float = float(np.rad2deg(BACKLASH_RAD))
    """degrees of play of every joint"""
    latency_s: float = 0.0
    """s by which every command takes effect later"""
    picture_latency_s: float = 0.0
    """s until a picture is delivered"""
    finger_friction: float | None = None
    """friction between fingertips and sheet; None: that of the model, 1.2"""
    table_friction: float | None = None
    """friction between sheet and table; None: that of the model, 0.3"""
    table_height_m: float = 0.0
    """m that the table is higher than the arm's foot"""
    camera_turned: bool = False
    """the camera stands on the arm's side of the table and looks away from the arm"""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "joint_offset_deg": (-45.0, 45.0), "gain": (0.1, 4.0), "backlash_deg": (0.0, 10.0), "latency_s": (0.0, 1.0),
        "picture_latency_s": (0.0, 2.0), "finger_friction": (0.05, 3.0), "table_friction": (0.05, 3.0),
        "table_height_m": (-0.05, 0.05),
    }  # fmt: skip


class SimulatedArm:
    """Physics of one arm, sheet and table, stepped by 1/240 s, with effects that the training simulation leaves out.

    Commands have a latency in continuous time, encoders have the resolution of real ones, and every joint has backlash.

    Args:
        task: settings of the task; firmware_p is that of the servos.
        flaws: what is wrong with this arm.
        drawn: draw the rest for each episode, as with --full-randomization; otherwise only the sheet's start and look.
        joint_range_deg: where the joints' end stops are, (6, 2). None: where those of the model are, at which the
            servos' targets end, too.
    """

    def __init__(
        self,
        task: Task,
        flaws: Flaws | None = None,
        drawn: bool = True,
        joint_range_deg: np.ndarray | None = None,
    ):
        full = DomainRandomization.full()
        self.task, self.flaws = task, flaws or Flaws()
        self.max_latency_s = full.latency_steps / CONTROL_HZ * drawn
        backlash_rad = float(np.deg2rad(self.flaws.backlash_deg))
        self.ranges = dataclasses.replace(
            full if drawn else dataclasses.replace(DomainRandomization.nominal(), limp_sheet=True),
            latency_steps=0,  # simulated here, in physics steps instead of control steps
            backlash_rad=(backlash_rad, backlash_rad),
            supply_gain=(self.flaws.gain, self.flaws.gain),
        )
        self.arms = make_arms(1, task, self.ranges, num_threads=1)
        self.model, self.timestep_s = self.arms.model, self.arms.model.opt.timestep
        self._active = np.ones(1, bool)
        self._torque_n_m = self.arms.batch.bind("actuator_force")
        # set by whoever simulates the servos' firmware, see Arms.substep
        self.strength: np.ndarray | None = None
        self.max_torque_n_m: np.ndarray | None = None
        if joint_range_deg is not None:
            for name, rows in (("jnt_range", slice(0, ACT_DIM)), ("actuator_ctrlrange", slice(None))):
                self._change(name, rows, np.deg2rad(joint_range_deg))
        self._apply(self.flaws)

    def _change(self, name: str, rows: Any, value: Any) -> None:
        """Set rows of a field of the model, which the batch has copied already."""
        getattr(self.model, name)[rows] = value
        field = self.arms.fields[name] if name in self.arms.fields else self.arms.batch.expand(name)
        field[(0, *rows) if isinstance(rows, tuple) else (0, rows)] = value

    def _apply(self, flaws: Flaws) -> None:
        """Change the model by what does not differ between episodes."""
        model = self.model
        table = ["sheet_table", *(f"{finger}_spot_table" for finger in FINGERS)]
        tips = [f"{finger}_finger_sheet" for finger in FINGERS]
        for names, friction in ((table, flaws.table_friction), (tips, flaws.finger_friction)):
            if friction is None:
                continue
            scale = friction / model.pair_friction[model.pair(names[0]).id, 0]
            for row in [model.pair(name).id for name in names]:
                self._change("pair_friction", (row, slice(0, 3)), model.pair_friction[row, :3] * scale)
            if names is table:  # the limp sheet's own weight, too
                rows = slice(ACT_DIM, None)
                self._change("dof_frictionloss", rows, model.dof_frictionloss[rows] * scale)
        if flaws.table_height_m:
            self._change("body_pos", (model.body("base").id, 2), -flaws.table_height_m)
        if flaws.camera_turned:
            camera = model.camera("top").id
            turned = np.zeros(4)
            mujoco.mju_mulQuat(turned, HALF_TURN, model.cam_quat[camera])
            model.cam_pos[camera, 0] = 2 * TAPE_CENTER_M[0] - model.cam_pos[camera, 0]
            model.cam_quat[camera] = turned

    def reset(self, seed: int, start_rad: np.ndarray | None = None) -> None:
        """Draw another start of the sheet and another look; if drawn, also another arm and latency.

        Args:
            seed: seed of everything that is drawn.
            start_rad: where the joints rest, (6,), rad; None: at home.
        """
        rng = seeding.np_random(seed)[0]
        self.arms.qpos[0] = start_qpos(self.arms, draw_start(rng, self.ranges, self.task.tape_margin))
        resample_sheet(self.arms, 0, rng, self.ranges)
        self.arms.resample(0, rng)
        drawn = self.arms.joint_offset[0] if self.ranges.joint_offset_rad else 0.0
        self.arms.joint_offset[0] = drawn + np.deg2rad(self.flaws.joint_offset_deg)
        if start_rad is None:
            self.arms.start(np.array([0]))
        else:
            self.place(start_rad)
        self.look = PaperVisuals().draw(self.model, seed)
        self.latency_s = float(np.random.default_rng(seed).uniform(0, self.max_latency_s)) + self.flaws.latency_s
        self.target_rad = self.arms.command[0].copy()
        self.pending: list[tuple[float, np.ndarray]] = []  # commands, and when they take effect, s
        self.time_s, self.count = 0.0, 0  # since the reset; count is in physics steps

    def place(self, joints_rad: np.ndarray) -> None:
        """Put the joints at rest at positions (6,), rad; the sheet stays where it is."""
        self.arms.qpos[0, :ACT_DIM] = joints_rad
        self.arms.start(np.array([0]), at_home=False)

    def lay_sheet(self, seed: int | None) -> None:
        """Put the sheet where reset(seed) puts it, or out of reach; the arm stays where it is."""
        start = draw_start(seeding.np_random(seed or 0)[0], self.ranges, self.task.tape_margin)
        self.arms.qpos[0, ACT_DIM:] = start_qpos(self.arms, start)[ACT_DIM:]
        if seed is None:
            self.arms.qpos[0, ACT_DIM] = AWAY_M
        self.arms.qvel[0, ACT_DIM:] = 0.0

    @property
    def qpos(self) -> np.ndarray:
        """Copy of the true positions (10,): joints (6, rad), sheet x, y, z (m) and yaw (rad)."""
        return self.arms.qpos[0].copy()

    @property
    def velocity_rad_s(self) -> np.ndarray:
        """True joint velocities (6,), rad/s."""
        return self.arms.joint_vel[0].copy()

    @property
    def torque_n_m(self) -> np.ndarray:
        """Torques of the servos (6,), N m, in the last step."""
        return self._torque_n_m[0].copy()

    @property
    def encoders_rad(self) -> np.ndarray:
        """Joint positions (6,), rad, with the error of the calibration, but at an unlimited resolution."""
        return self.arms.joints_rad[0].copy()

    @property
    def joints_rad(self) -> np.ndarray:
        """Joint positions (6,), rad, as the encoders measure them."""
        tick = 2 * np.pi / TICKS_PER_TURN
        return np.round(self.encoders_rad / tick) * tick

    def command(self, target_rad: np.ndarray) -> None:
        """Joint targets (6,), rad, that take effect latency_s later."""
        self.pending.append((self.time_s + self.latency_s, np.asarray(target_rad, np.float64)))

    def step(self) -> None:
        """One physics step of timestep_s."""
        while self.pending and self.pending[0][0] <= self.time_s:
            self.target_rad = self.pending.pop(0)[1]
        if self.count % self.arms.substeps == 0:
            support_presses(self.arms, self._active)
        self.arms.substep(self.target_rad[None], self._active, self.strength, self.max_torque_n_m)
        self.time_s, self.count = self.time_s + self.timestep_s, self.count + 1

    def get_state(self) -> dict[str, Any]:
        """Everything that the next steps depend on, besides the seed of the last reset, as arrays."""
        times_s, targets_rad = [time_s for time_s, _ in self.pending], [target for _, target in self.pending]
        return {
            "arms": self.arms.get_state(), "target_rad": self.target_rad.copy(), "time_s": np.array(self.time_s),
            "count": np.array(self.count), "pending_s": np.array(times_s, np.float64),
            "pending_rad": np.array(targets_rad, np.float64).reshape(-1, ACT_DIM),
        }  # fmt: skip

    def set_state(self, state: Mapping[str, Any]) -> None:
        """After a reset with the same seed: go on where get_state was called.

        Raises SO101Error, and changes nothing, for a state that does not fit.
        """
        count = len(state["pending_s"])
        own = {"target_rad": np.zeros(ACT_DIM), "time_s": np.zeros(()), "count": np.zeros((), np.int64)}
        own |= {"pending_s": np.zeros(count), "pending_rad": np.zeros((count, ACT_DIM))}
        check_arrays(own, state, "state of the simulated arm")
        self.arms.check_state(state["arms"])
        self.arms.set_state(state["arms"])
        self.target_rad = state["target_rad"].copy()
        self.time_s, self.count = float(state["time_s"]), int(state["count"])
        self.pending = list(zip(state["pending_s"].tolist(), state["pending_rad"].copy()))

    def truth(self) -> dict[str, Any]:
        """The ground truth: sheet, (3,): x, y (m), yaw (rad); inside, whether it lies inside the tape; qpos, (10,)."""
        scene, qpos = scene_of(self.arms), self.qpos
        inside = sheet_inside(scene.sheet_xy_m, scene.sheet_yaw_rad, self.task.tape_margin)
        return {"sheet": qpos[[6, 7, 9]], "inside": bool(inside[0]), "qpos": qpos}


class RealTime:
    """Steps a simulation as fast as time passes, in short turns, so that requests are answered between them.

    On a machine that is too slow the simulation falls behind. Arrears beyond MAX_LAG_S are dropped, and `report` gets
    a sentence about the speed, every REPORT_S at most.

    Args:
        step: one step of the simulation.
        timestep_s: simulated time of a step.
        report: takes the sentence.
        clock: time in s.
    """

    TURN_S = 0.004  # wall time of a turn, at most, but for its last step
    MAX_LAG_S = 0.1
    REPORT_S = 5.0
    REPORTED_SHARE = 0.95  # share of real time; a slower simulation is reported

    def __init__(
        self,
        step: Callable[[], None],
        timestep_s: float,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.step, self.timestep_s, self.report, self.clock = step, timestep_s, report, clock
        self.restart()

    def restart(self) -> None:
        """Start from the present time."""
        self._due_s = self._since_s = self.clock()  # when the next step is due; when this report began
        self._steps = 0  # since then

    def wait_s(self) -> float:
        """Wall time until the next step is due; 0 if it is due already."""
        return max(self._due_s - self.clock(), 0.0)

    def advance(self) -> None:
        """Do the steps that are due, in one turn."""
        began = now = self.clock()
        while self._due_s <= now and now - began < self.TURN_S:
            self.step()
            self._due_s, self._steps = self._due_s + self.timestep_s, self._steps + 1
            now = self.clock()
        self._due_s = max(self._due_s, now - self.MAX_LAG_S)
        if (elapsed := now - self._since_s) >= self.REPORT_S:
            share = self._steps * self.timestep_s / elapsed
            if share < self.REPORTED_SHARE:
                self.report(f"the simulated arm runs at {100 * share:.0f} % of real time: this machine is too slow")
            self._since_s, self._steps = now, 0


def film(
    arm: Any,
    size: tuple[int, int],
    stop: threading.Event,
    publish: Callable[[Picture], None],
    visual: bool,
    episode: Callable[[], Any] = lambda: 0,
) -> None:
    """Take a picture with the camera `top` every control step until `stop`; runs in a thread.

    Args:
        arm: whose scene is filmed: a SimulatedArm, or what has its model, qpos, look and count.
        size: height and width, pixels.
        stop: ends it.
        publish: takes each picture.
        visual: whether the scene looks as drawn for the episode.
        episode: number of the present episode. A picture during which it changes is discarded.

    Raises:
        SO101Error: this machine cannot render.
    """
    renderer = Renderer(arm.model, size, fast=True)
    try:
        number, due = camera_names(arm.model).index("top"), time.monotonic()
        while not stop.is_set():
            before = episode()
            taken, qpos, look = time.monotonic(), arm.qpos, arm.look if visual else None
            image = renderer.render(qpos, "top", look)
            if look is not None:
                add_noise(image, look, arm.count, number)
            if episode() == before:  # otherwise the picture shows the last episode, or parts of both
                publish(Picture(image, taken))
            due = max(due + 1 / CONTROL_HZ, time.monotonic())
            stop.wait(due - time.monotonic())
    finally:
        renderer.close()


def report_speed(line: str) -> None:
    """Print a sentence of RealTime's."""
    print(line, file=sys.stderr, flush=True)


def _run_arm(pipe: Connection, task: Task, visual: bool, size: tuple[int, int], flaws: Flaws | None) -> None:
    """The process of a SimulatedRobot: physics in real time, a camera in a thread, and answers to requests."""
    arm = SimulatedArm(task, flaws)
    arm.reset(0)
    # episode: seed of the present one, None during a reset; picture: the newest; problem: why there is no camera
    newest: dict[str, Any] = {"episode": 0}
    stop = threading.Event()

    def run_camera() -> None:
        try:
            film(arm, size, stop, lambda picture: newest.update(picture=picture), visual, lambda: newest["episode"])
        except SO101Error as error:
            newest["problem"] = str(error)  # the next request for a picture raises it in the other process

    camera = threading.Thread(target=run_camera)
    camera.start()
    real_time = RealTime(arm.step, arm.timestep_s, report_speed)
    try:
        while True:
            waiting = pipe.poll(real_time.wait_s())
            if waiting:
                word, value = pipe.recv()
                if word == "read":
                    pipe.send((arm.joints_rad, time.monotonic()))
                elif word == "write":
                    arm.command(value)
                elif word == "picture":
                    pipe.send(newest.get("problem") or newest.get("picture"))
                elif word == "reset":
                    newest["episode"] = None  # discards the picture that is being rendered
                    arm.reset(value)
                    newest.pop("picture", None)
                    newest["episode"] = value
                    real_time.restart()
                    pipe.send(None)
                elif word == "lay_sheet":
                    arm.lay_sheet(value)
                    pipe.send(None)
                elif word == "truth":
                    pipe.send(arm.truth())
            real_time.advance()
    except (EOFError, ConnectionError):
        return  # the other process has closed the pipe, or has ended: so does this one
    finally:
        stop.set()
        camera.join()


class SimulatedRobot(Robot):
    """A SimulatedArm in its own process, in real time; requests to it correspond to those on a bus.

    Args:
        task: settings of the task; firmware_p is that of the servos.
        visual: whether every episode has another look for the camera.
        size: height and width of the pictures, pixels.
        answer_s: longest wait for an answer; None: as on a bus.
        flaws: what is wrong with the arm, its servos or its table.
    """

    def __init__(
        self, task: Task, visual: bool = True, size: tuple[int, int] = (240, 320), answer_s: float | None = None,
        flaws: Flaws | None = None,
    ):  # fmt: skip
        super().__init__()
        self.answer_s = answer_s or ANSWER_S
        self.process, self.pipe = spawn(_run_arm, task, visual, size, flaws)
        try:
            self._ask("read", timeout_s=60.0)
        except BaseException:  # a new process that is killed while it imports leaves a traceback
            self.close()
            raise

    def _ask(self, word: str, value: Any = None, timeout_s: float | None = None) -> Any:
        """Send a request and return its answer."""
        timeout_s = max(timeout_s or 0.0, self.answer_s)
        try:
            self.pipe.send((word, value))
            if not self.pipe.poll(timeout_s):
                raise RobotError(f"the arm has not answered for {1000 * timeout_s:.0f} ms: is its bus unplugged?")
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RobotError("the arm is lost: its bus has been unplugged") from error

    def _ask_picture(self, timeout_s: float | None = None) -> Picture | None:
        """The newest picture; None if there is none yet. Raises RobotError if the camera does not work."""
        answer = self._ask("picture", timeout_s=timeout_s)
        if isinstance(answer, str):
            raise RobotError(f"the simulated camera does not work: {answer}")
        return answer

    def read(self) -> tuple[np.ndarray, float]:
        """See Robot."""
        return self._ask("read")

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        try:
            self.pipe.send(("write", target_rad))
        except OSError as error:
            raise RobotError("the arm is lost: its bus has been unplugged") from error

    def picture(self) -> Picture:
        """See Robot."""
        if (picture := self._ask_picture()) is None:
            raise RobotError("the camera has no picture yet")
        return picture

    def reset(self, seed: int) -> None:
        """Start an episode, and wait for its first picture."""
        self._ask("reset", seed, timeout_s=RESET_S)
        deadline = time.monotonic() + RESET_S
        while time.monotonic() < deadline:
            if self._ask_picture(timeout_s=RESET_S) is not None:
                return
            time.sleep(0.01)
        raise RobotError(f"the simulated camera has taken no picture in {RESET_S:.0f} s")

    def lay_sheet(self, seed: int) -> None:
        """Put the sheet where reset(seed) would, as a hand does; the arm stays where it is."""
        self._ask("lay_sheet", seed, timeout_s=1.0)

    def truth(self) -> dict[str, Any]:
        """The ground truth, see SimulatedArm.truth."""
        return self._ask("truth", timeout_s=1.0)

    def close(self) -> None:
        """See Robot."""
        self.pipe.close()
        self.process.join(5.0)
        self.process.kill()
