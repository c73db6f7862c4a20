"""Arms that run_so101.py drives, behind one interface: a real SO-101 through LeRobot, or a simulated one in real time.

The simulated arm runs in a process of its own and knows nothing of policies: it has an encoder that is off, servos at
LeRobot's gain with a degree of backlash, commands that arrive late, and a camera. What it is asked, it answers as a bus
does; what it is not asked (`truth`), only the report at the end sees.
"""

import dataclasses
import multiprocessing
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from so101_control import ACT_DIM, BACKLASH_RAD, JOINTS, from_rad, read_calibration, to_rad
from so101_env import DomainRandomization, SO101Error, SO101ResidualVectorEnv, Task
from so101_scene import CONTROL_HZ, Painter, VisualRandomization, add_noise, camera_names, draw_look

ANSWER_S = 0.05  # a bus that has not answered after so long is gone
LEROBOT_P = 16


class RobotError(SO101Error):
    """An arm, or its camera, that cannot be used any more."""


class Picture(NamedTuple):
    """What the camera saw, and when."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    time_s: float  # time.monotonic()


class Robot:
    """What run_so101.py needs of an arm. All raise RobotError once it is gone."""

    def read(self) -> tuple[np.ndarray, float]:
        """Joint positions (6,), rad, as the encoders say, and when, of time.monotonic()."""
        raise NotImplementedError

    def write(self, target_rad: np.ndarray) -> None:
        """Joint targets (6,), rad, from now on."""
        raise NotImplementedError

    def picture(self) -> Picture:
        """The newest picture of the camera."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the arm."""


# ---------------------------------------------------------------------------------------------------------------------
# simulated


class SimulatedArm:
    """The physics of one arm, sheet and table, stepped by 1/240 s, with what simulations of training leave out.

    Args:
        task: `firmware_p` is that of the servos.
        backlash_rad: of every joint.
    """

    def __init__(self, task: Task, backlash_rad: float = BACKLASH_RAD):
        full = DomainRandomization.full()
        self.max_latency_s = full.latency_steps / CONTROL_HZ
        # of the latency there is more to choose from here, and nobody adds noise to what an encoder says
        ranges = dataclasses.replace(
            full, latency_steps=0, observation_noise=0.0, backlash_rad=(backlash_rad, backlash_rad)
        )
        self.envs = SO101ResidualVectorEnv(1, task=task, randomization=ranges, num_threads=1)
        self.timestep_s, self.everyone = self.envs.model.opt.timestep, np.ones(1, bool)

    def reset(self, seed: int) -> None:
        """A sheet somewhere, another arm, at rest at home."""
        self.envs.reset(seed=seed)
        self.look = draw_look(self.envs.model, VisualRandomization(), seed)
        self.latency_s = float(np.random.default_rng(seed).uniform(0, self.max_latency_s))
        self.target, self.late, self.time_s, self.count = self.envs.command[0], [], 0.0, 0

    @property
    def joints_rad(self) -> np.ndarray:
        """What the encoders say, (6,)."""
        ticks = 2 * np.pi / 4096
        return np.round((self.envs.qpos[0, :ACT_DIM] + self.envs.joint_offset[0]) / ticks) * ticks

    def command(self, target_rad: np.ndarray) -> None:
        """Targets (6,), rad, that take effect latency_s later."""
        self.late.append((self.time_s + self.latency_s, np.asarray(target_rad, np.float64)))

    def step(self) -> None:
        """A time step of the physics."""
        while self.late and self.late[0][0] <= self.time_s:
            self.target = self.late.pop(0)[1]
        if self.count % self.envs.substeps == 0:
            self.envs.carry_presses(self.everyone)
        self.envs.substep(self.target[None], self.everyone)
        self.time_s, self.count = self.time_s + self.timestep_s, self.count + 1

    def truth(self) -> dict[str, Any]:
        """What only a simulation knows."""
        inside = self.envs.success(self.envs._scene())
        return {"sheet": self.envs.qpos[0, [6, 7, 9]], "inside": bool(inside[0]), "qpos": self.envs.qpos[0]}


def _run_arm(pipe: Connection, task: Task, visual: bool, size: tuple[int, int]) -> None:
    """The process of a simulated robot: physics in real time, a camera, and answers."""
    arm = SimulatedArm(task)
    arm.reset(0)
    newest: dict[str, Any] = {"episode": 0}
    stop = threading.Event()

    def film() -> None:
        painter = Painter(arm.envs.model, size, fast=True)
        number, due = camera_names().index("top"), time.monotonic()
        while not stop.is_set():
            seen = newest["episode"]
            taken, qpos, look = time.monotonic(), arm.envs.qpos[0], arm.look if visual else None
            image = painter.paint(qpos, "top", look)
            if look is not None:
                add_noise(image, look, arm.count, number)
            if newest["episode"] == seen:  # else it shows the last episode, or a mixture
                newest["picture"] = Picture(image, taken)
            due = max(due + 1 / CONTROL_HZ, time.monotonic())
            stop.wait(due - time.monotonic())
        painter.close()

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
                pipe.send(newest.get("picture"))
            elif word == "reset":
                newest["episode"] = None  # what is drawn meanwhile is thrown away
                arm.reset(value)
                newest.pop("picture", None)
                newest["episode"] = value
                began = time.monotonic()
                pipe.send(None)
            elif word == "truth":
                pipe.send(arm.truth())
    except (EOFError, OSError, KeyboardInterrupt):  # nobody is there any more
        pass
    finally:
        stop.set()
        camera.join()


class SimulatedRobot(Robot):
    """A SimulatedArm in a process of its own, in real time, at the end of a bus.

    Args:
        task: of the policy; firmware_p is that of the servos.
        visual: whether its camera sees another look in every episode.
        size: height and width of its pictures, pixels.
    """

    def __init__(self, task: Task, visual: bool = True, size: tuple[int, int] = (240, 320)):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run_arm, args=(theirs, task, visual, size), daemon=True)
        self.process.start()
        theirs.close()
        self._ask("read", timeout_s=60.0)

    def _ask(self, word: str, value: Any = None, timeout_s: float | None = None) -> Any:
        timeout_s = timeout_s or ANSWER_S
        try:
            self.pipe.send((word, value))
            if not self.pipe.poll(timeout_s):
                raise RobotError(f"the arm has not answered for {1000 * timeout_s:.0f} ms: is its bus unplugged?")
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            raise RobotError("the arm is gone: its bus has been unplugged") from error

    def read(self) -> tuple[np.ndarray, float]:
        """See Robot."""
        return self._ask("read")

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        try:
            self.pipe.send(("write", target_rad))
        except OSError as error:
            raise RobotError("the arm is gone: its bus has been unplugged") from error

    def picture(self) -> Picture:
        """See Robot."""
        if (picture := self._ask("picture")) is None:
            raise RobotError("the camera has no picture yet")
        return picture

    def reset(self, seed: int) -> None:
        """Start an episode of the simulation, and wait for the first picture of it."""
        self._ask("reset", seed, timeout_s=10.0)
        for _ in range(200):
            if self._ask("picture", timeout_s=1.0) is not None:
                return
            time.sleep(0.01)
        raise RobotError("the camera gives no pictures: off-screen rendering does not work here")

    def truth(self) -> dict[str, Any]:
        """What only a simulation knows: see SimulatedArm.truth."""
        return self._ask("truth", timeout_s=1.0)

    def close(self) -> None:
        """See Robot."""
        self.pipe.close()
        self.process.join(5.0)
        self.process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# real


class LeRobotRobot(Robot):
    """An SO-101 follower through LeRobot's own driver, with a camera through OpenCV. Runs in LeRobot's environment.

    Args:
        port: serial port, as LeRobot has it.
        robot_id: name under which LeRobot has kept the arm's calibration.
        camera: index or path of the camera that looks at the table, for OpenCV.
        firmware_p: P coefficient that the servos are set to.

    Raises:
        RobotError: LeRobot is not installed here, no arm or no calibration, no camera.
    """

    def __init__(self, port: str, robot_id: str, camera: str, firmware_p: int = LEROBOT_P):
        try:
            from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig

            self.arm = SO101Follower(SO101FollowerConfig(port=port, id=robot_id, use_degrees=True))
        except ImportError as error:
            raise RobotError(
                f"lerobot:{port}: needs LeRobot's environment, see docs/real_arm.md, and there, {error.name}"
            ) from error
        self.port = port
        if not self.arm.calibration:
            raise RobotError(
                f"lerobot:{port}: no calibration in {self.arm.calibration_fpath}; run lerobot-calibrate "
                f"--robot.type=so101_follower --robot.port={port} --robot.id={robot_id}"
            )
        self.ranges = read_calibration(self.arm.calibration_fpath)
        self.camera = Camera(camera)
        try:
            self.arm.connect(calibrate=False)
            for joint in JOINTS:
                self.arm.bus.write("P_Coefficient", joint, firmware_p)
        except Exception as error:  # serial ports and LeRobot's bus raise many kinds
            self.camera.close()
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> RobotError:
        return RobotError(f"lerobot:{self.port}: the arm cannot be reached ({error}); check cable and power")

    def read(self) -> tuple[np.ndarray, float]:
        """See Robot."""
        try:
            said = self.arm.bus.sync_read("Present_Position")
        except Exception as error:  # as above
            raise self._gone(error) from error
        return to_rad(np.array([said[joint] for joint in JOINTS]), "deg", self.ranges), time.monotonic()

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        degrees = from_rad(target_rad, "deg", self.ranges)
        try:
            self.arm.bus.sync_write("Goal_Position", dict(zip(JOINTS, degrees.tolist())))
        except Exception as error:  # as above
            raise self._gone(error) from error

    def picture(self) -> Picture:
        """See Robot."""
        return self.camera.picture()

    def close(self) -> None:
        """See Robot. The arm goes limp where LeRobot's disconnect lets it: hold it."""
        self.camera.close()
        if self.arm.is_connected:
            self.arm.disconnect()


class Camera:
    """The newest picture of a camera, taken in a thread. Raises RobotError without a camera."""

    def __init__(self, source: str, size: tuple[int, int] = (480, 640)):
        import cv2

        self.source, self.cv2 = source, cv2
        self.capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
        self.capture.set(cv2.CAP_PROP_FRAME_HEIGHT, size[0])
        self.capture.set(cv2.CAP_PROP_FRAME_WIDTH, size[1])
        self.capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        self.newest: Picture | None = None
        self.running = self.capture.isOpened()
        self.thread = threading.Thread(target=self._film, daemon=True)
        self.thread.start()
        for _ in range(300):
            if self.newest is not None or not self.running:
                break
            time.sleep(0.01)
        if self.newest is None:
            self.close()
            raise RobotError(f"--camera {source}: gives no pictures; name another index or path")

    def _film(self) -> None:
        while self.running:
            done, image = self.capture.read()
            if not done:
                self.running = False
                return
            self.newest = Picture(self.cv2.cvtColor(image, self.cv2.COLOR_BGR2RGB), time.monotonic())

    def picture(self) -> Picture:
        """The newest picture."""
        if not self.running or self.newest is None:
            raise RobotError(f"--camera {self.source}: gives no more pictures; is it unplugged?")
        return self.newest

    def close(self) -> None:
        """Let go of the camera."""
        self.running = False
        self.thread.join(2.0)
        self.capture.release()
