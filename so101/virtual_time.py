"""A simulated arm in virtual time: the loop's clock advances the physics, and computing takes no time.

For experiments: the same command gives the same numbers on any machine, however loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from so101.base import BasePolicy
from so101.camera import CAMERA
from so101.loop import Clock, Loop, make_controller
from so101.robot import Picture, Robot
from so101.simulated_arm import Flaws, SimulatedArm
from so101_env import Task
from so101_sim.errors import check_arrays
from so101_sim.scene import Renderer

SIZE = (240, 320)  # height and width of the camera's pictures, pixels


class VirtualRobot(Robot):
    """A SimulatedArm whose time passes when a VirtualClock says so.

    Args:
        task: settings of the task; firmware_p is that of the servos.
        flaws: what is wrong with the arm, its servos or its table.
        pictures: render what the camera sees; otherwise its pictures are black.
    """

    def __init__(self, task: Task, flaws: Flaws | None = None, pictures: bool = True):
        super().__init__()
        self.arm, self.time_s = SimulatedArm(task, flaws), 0.0
        self.pictures = pictures
        self._renderer: Renderer | None = None

    def monotonic(self) -> float:
        """Virtual time, s."""
        return self.time_s

    def sleep(self, seconds: float) -> None:
        """Let time pass, rounded to physics steps."""
        for _ in range(round(seconds / self.arm.timestep_s)):
            self.arm.step()
            self.time_s += self.arm.timestep_s

    def reset(self, seed: int) -> None:
        """Start an episode, see SimulatedArm.reset."""
        self.arm.reset(seed)

    def lay_sheet(self, seed: int) -> None:
        """Put the sheet where reset(seed) would, as a hand does; the arm stays where it is."""
        self.arm.lay_sheet(seed)

    def read(self) -> tuple[np.ndarray, float]:
        """See Robot."""
        return self.arm.joints_rad, self.time_s

    def write(self, target_rad: np.ndarray) -> None:
        """See Robot."""
        self.arm.command(target_rad)

    def render(self, qpos: np.ndarray) -> np.ndarray:
        """The camera's picture (H, W, 3) uint8 of positions (10,)."""
        if not self.pictures:
            return np.zeros((*SIZE, 3), np.uint8)
        if self._renderer is None:  # at the first picture: until then the model may be changed
            self._renderer = Renderer(self.arm.model, SIZE, fast=True)
        return self._renderer.render(qpos, CAMERA, self.arm.look)

    def picture(self) -> Picture:
        """See Robot."""
        return Picture(self.render(self.arm.qpos), self.time_s)

    def get_state(self) -> dict[str, Any]:
        """See SimulatedArm.get_state; with the time."""
        return {**self.arm.get_state(), "now_s": np.array(self.time_s)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """See SimulatedArm.set_state."""
        check_arrays({"now_s": np.zeros(())}, state, "state of the simulated arm")
        self.arm.set_state(state)
        self.time_s = float(state["now_s"])

    def truth(self) -> dict[str, Any]:
        """The ground truth, see SimulatedArm.truth."""
        return self.arm.truth()

    def close(self) -> None:
        """See Robot."""
        if self._renderer is not None:
            self._renderer.close()


class TimeSource(Protocol):
    """What a VirtualClock reads and advances: a VirtualRobot, for example."""

    def monotonic(self) -> float:
        """Virtual time, s."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        ...


class VirtualClock(Clock):
    """A clock in virtual time. Its waiting advances the simulation."""

    def __init__(self, time: TimeSource):
        self.time = time
        super().__init__()

    def now(self) -> float:
        """See Clock."""
        return self.time.monotonic()

    def sleep(self, seconds: float) -> None:
        """See Clock."""
        self.time.sleep(seconds)


def virtual_loop(robot: VirtualRobot, policy: BasePolicy, task: Task) -> Loop:
    """The loop of so101.drive on an arm in virtual time, see make_controller."""
    return Loop(robot, policy, make_controller(robot, task), VirtualClock(robot))
