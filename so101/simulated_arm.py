"""A simulated arm that behaves like a real one, in real time and in its own process.

It has encoder errors, servos at LeRobot's gain with one degree of backlash, command latency, and a camera. It answers
requests like the bus of a real arm. Only the report at the end uses the true state (`truth`).
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import threading
import time
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from so101.robot import Picture, Robot, RobotError
from so101_env import (
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
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ, Renderer, add_noise, camera_names

ANSWER_S = 0.05  # a bus without an answer for this long counts as lost


@dataclasses.dataclass(frozen=True)
class Flaws:
    """How a simulated arm differs from the one that a policy expects, on top of what is drawn for each episode."""

    joint_offset_rad: tuple[float, ...] = (0.0,) * ACT_DIM
    """calibration error of each encoder: what it reads minus the true angle"""
    gain: float = 1.0
    """factor of the servo gain"""
    backlash_rad: float = BACKLASH_RAD
    """play of every joint"""
    finger_friction: float = 1.0
    """factor of the friction between fingertips and sheet"""
    sheet_friction: float = 1.0
    """factor of the friction between sheet and table"""
    table_height_m: float = 0.0
    """height of the table above the plane that the arm is mounted on"""
    command_delay_s: float = 0.0
    """further latency of every command"""

    def ranges(self) -> DomainRandomization:
        """What is drawn for every episode of such an arm, as with --full-randomization, and these flaws."""
        return dataclasses.replace(
            DomainRandomization.full(),
            latency_steps=0,  # simulated in physics steps instead of control steps
            backlash_rad=(self.backlash_rad, self.backlash_rad),
            supply_gain=(self.gain, self.gain),
            finger_friction_factor=(self.finger_friction, self.finger_friction),
            sheet_friction_factor=(self.sheet_friction, self.sheet_friction),
            table_height_m=(self.table_height_m, self.table_height_m),
        )


class SimulatedArm:
    """Physics of one arm, sheet and table, stepped by 1/240 s, with effects that the training simulation leaves out.

    Commands have a latency in continuous time, encoders have the resolution of real ones, and every joint has backlash.
    The rest is drawn as with --full-randomization.

    Args:
        task: settings of the task; firmware_p is that of the servos.
        flaws: what is wrong with this arm.
    """

    def __init__(self, task: Task, flaws: Flaws | None = None):
        self.task, self.flaws = task, flaws or Flaws()
        self.ranges, self.max_latency_s = self.flaws.ranges(), DomainRandomization.full().latency_steps / CONTROL_HZ
        self.arms = make_arms(1, task, self.ranges, num_threads=1)
        self.model, self.timestep_s = self.arms.model, self.arms.model.opt.timestep
        self._active = np.ones(1, bool)

    def reset(self, seed: int) -> None:
        """Draw another arm, start of the sheet, look and latency; the arm rests at home."""
        rng = seeding.np_random(seed)[0]
        self.arms.qpos[0] = start_qpos(self.arms, draw_start(rng, self.ranges, self.task.tape_margin))
        resample_sheet(self.arms, 0, rng, self.ranges)
        self.arms.resample(0, rng)
        self.arms.joint_offset[0] += self.flaws.joint_offset_rad
        self.arms.start(np.array([0]))
        self.look = PaperVisuals().draw(self.model, seed)
        self.latency_s = float(np.random.default_rng(seed).uniform(0, self.max_latency_s)) + self.flaws.command_delay_s
        self.target_rad = self.arms.command[0].copy()
        self.pending: list[tuple[float, np.ndarray]] = []  # commands, and when they take effect, s
        self.time_s, self.count = 0.0, 0  # since the reset; count is in physics steps

    @property
    def qpos(self) -> np.ndarray:
        """Copy of the true positions (10,): joints (6, rad), sheet x, y, z (m) and yaw (rad)."""
        return self.arms.qpos[0].copy()

    @property
    def joints_rad(self) -> np.ndarray:
        """Joint positions (6,), rad, as the encoders measure them."""
        tick = 2 * np.pi / TICKS_PER_TURN
        return np.round((self.arms.qpos[0, :ACT_DIM] + self.arms.joint_offset[0]) / tick) * tick

    def command(self, target_rad: np.ndarray) -> None:
        """Joint targets (6,), rad, that take effect latency_s later."""
        self.pending.append((self.time_s + self.latency_s, np.asarray(target_rad, np.float64)))

    def step(self) -> None:
        """One physics step of timestep_s."""
        while self.pending and self.pending[0][0] <= self.time_s:
            self.target_rad = self.pending.pop(0)[1]
        if self.count % self.arms.substeps == 0:
            support_presses(self.arms, self._active)
        self.arms.substep(self.target_rad[None], self._active)
        self.time_s, self.count = self.time_s + self.timestep_s, self.count + 1

    def truth(self) -> dict[str, Any]:
        """The ground truth: sheet, (3,): x, y (m), yaw (rad); inside, whether it lies inside the tape; qpos, (10,)."""
        scene, qpos = scene_of(self.arms), self.qpos
        inside = sheet_inside(scene.sheet_xy_m, scene.sheet_yaw_rad, self.task.tape_margin)
        return {"sheet": qpos[[6, 7, 9]], "inside": bool(inside[0]), "qpos": qpos}


def _run_arm(pipe: Connection, task: Task, visual: bool, size: tuple[int, int]) -> None:
    """The process of a SimulatedRobot: physics in real time, a camera in a thread, and answers to requests."""
    arm = SimulatedArm(task)
    arm.reset(0)
    # episode: seed of the present one, None during a reset; picture: the newest; problem: why there is no camera
    newest: dict[str, Any] = {"episode": 0}
    stop = threading.Event()

    def film() -> None:
        """Take a picture every control step."""
        try:
            renderer = Renderer(arm.model, size, fast=True)
        except SO101Error as error:
            newest["problem"] = str(error)  # the next request for a picture raises it in the other process
            return
        number, due = camera_names(arm.model).index("top"), time.monotonic()
        while not stop.is_set():
            episode = newest["episode"]
            taken, qpos, look = time.monotonic(), arm.qpos, arm.look if visual else None
            image = renderer.render(qpos, "top", look)
            if look is not None:
                add_noise(image, look, arm.count, number)
            if newest["episode"] == episode:  # otherwise the picture shows the last episode, or parts of both
                newest["picture"] = Picture(image, taken)
            due = max(due + 1 / CONTROL_HZ, time.monotonic())
            stop.wait(due - time.monotonic())
        renderer.close()

    camera = threading.Thread(target=film)
    camera.start()
    began = time.monotonic()
    try:
        while True:
            while arm.count * arm.timestep_s < time.monotonic() - began:
                arm.step()
            if not pipe.poll(max(began + arm.count * arm.timestep_s - time.monotonic(), 0.0)):
                continue
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
                began = time.monotonic()
                pipe.send(None)
            elif word == "truth":
                pipe.send(arm.truth())
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
    """

    def __init__(self, task: Task, visual: bool = True, size: tuple[int, int] = (240, 320)):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run_arm, args=(theirs, task, visual, size), daemon=True)
        # The new process inherits the signal mask, so Ctrl+C interrupts only this process. Its end closes the pipe, and
        # that ends the new process, without a traceback.
        resource_tracker.ensure_running()  # first, because starting it unblocks the signal
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            self._ask("read", timeout_s=60.0)
        except BaseException:
            # A new process that is killed while it imports leaves the traceback of a process that glfw starts then
            if self.process.pid is not None:
                theirs.close()
                self.close()
            raise

    def _ask(self, word: str, value: Any = None, timeout_s: float | None = None) -> Any:
        """Send a request and return its answer."""
        timeout_s = max(timeout_s or 0.0, ANSWER_S)
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
        self._ask("reset", seed, timeout_s=10.0)
        for _ in range(200):
            if self._ask_picture(timeout_s=1.0) is not None:
                return
            time.sleep(0.01)
        raise RobotError("the simulated camera has taken no picture in 2 s")

    def truth(self) -> dict[str, Any]:
        """The ground truth, see SimulatedArm.truth."""
        return self._ask("truth", timeout_s=1.0)

    def close(self) -> None:
        """See Robot."""
        self.pipe.close()
        self.process.join(5.0)
        self.process.kill()
