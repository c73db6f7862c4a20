"""A residual and its base on arms with a camera: from measured joints and pictures to joint targets, step by step.

Nothing here drives an arm or keeps time: whoever calls `ResidualArms.step` does, as LeRobot's commands do with the
policy in extras/lerobot_plugin. so101.drive has a loop of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import numpy as np

from so101.camera import CAMERA
from so101.loop import count_inside, observe, way_from, way_up
from so101.opencv import OpenCVPolicy
from so101.robot import RobotError
from so101_env import HOME_RAD, SUCCESS_STEPS, BaseObservation, load_model
from so101_sim.control import ACT_DIM, BACKLASH_RAD, GAIN_FLOOR, LATENCY_S, Calibration, Controller
from so101_sim.scene import CONTROL_HZ

BEYOND_MODEL_RAD = float(np.deg2rad(20))  # a folded arm may be measured this far beyond the model's limits
NEAR_HOME_RAD = 0.2  # a joint this far from the start pose is moved there first
LOCATOR_HEIGHT, LOCATOR_ASPECT = 240, 4 / 3  # larger or wider pictures are scaled and cut, as so101.drive does

log = logging.getLogger(__name__)


class SeenResidual(OpenCVPolicy):
    """A residual that corrects its base where the sheet's pose is seen, and leaves the base alone where it is not."""

    def rest(self, obs: BaseObservation, mask: np.ndarray) -> np.ndarray:
        """Joint deltas (N, 6), rad, without a pose: the base's, if it sees through cameras of its own."""
        delta = np.zeros((len(mask), ACT_DIM))
        if self.base.base is not None and self.base.base.cameras:
            delta = self.base.base_delta(obs, mask)
        self.base.residual[mask] = 0.0
        return delta


class ResidualArms:
    """A SeenResidual on N arms. Every call of `step` is one control step, 1/30 s.

    At the start of an episode an arm that is elsewhere moves slowly to the task's start pose. When its sheet is seen
    inside the tape it lifts, and rests until the next `reset`.

    Args:
        policy: the residual; its firmware_p is that of the arms.
        tape_margin: m between sheet and tape on every side.
        servo_gain: gain of the servos, as a factor of the 12 V STS3215's at the same P; None: estimated on the way to
            the start pose, and on an arm that is there already taken as 1.
        start_at_home: whether an arm that is elsewhere moves to the start pose.
    """

    def __init__(
        self, policy: SeenResidual, tape_margin: float, servo_gain: float | None = None, start_at_home: bool = True
    ):  # fmt: skip
        self.policy, self.tape_margin, self.servo_gain = policy, tape_margin, servo_gain
        self.start_at_home, self.model = start_at_home, load_model(tape_margin)
        low, high = self.model.actuator_ctrlrange.T
        self.reachable = Calibration(low - BEYOND_MODEL_RAD, high + BEYOND_MODEL_RAD)
        self.reset()

    def reset(self) -> None:
        """A new episode begins with the next step."""
        self.controllers: list[Controller] = []

    def step(self, joints_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next joint targets (N, 6), rad.

        Args:
            joints_rad: measured joint positions (N, 6).
            images: pictures (N, H, W, 3) uint8 by the scene's camera; policy.cameras names those that are needed.

        Raises:
            SO101Error: joint positions that no calibrated arm has.
        """
        if len(self.controllers) != len(joints_rad):
            self._begin(joints_rad, images)
        now = self.count / CONTROL_HZ
        for controller, joints in zip(self.controllers, joints_rad):
            controller.measure(joints, now)
        obs, delta = observe(self.controllers, self.policy, images), np.zeros((len(joints_rad), ACT_DIM))
        for i, way in enumerate(self.ways):
            if way is not None:
                delta[i], self.ways[i] = self._next(way)
        moving = np.array([way is not None for way in self.ways])
        acting = ~moving & (self.streak < SUCCESS_STEPS)
        if moving.any():
            self.policy.look(obs, moving)
        if acting.any():
            delta[acting] = self.policy.act(obs, acting)[acting]
            self._judge(acting)
        self.count += 1
        return np.array([controller.move(each, now) for controller, each in zip(self.controllers, delta)])

    def _begin(self, joints_rad: np.ndarray, images: Mapping[str, np.ndarray]) -> None:
        """Begin an episode; arguments as in step."""
        height, width = images[CAMERA].shape[1:3]
        scale = min(1.0, LOCATOR_HEIGHT / height)
        self.policy.image_size = round(scale * height), round(scale * min(width, LOCATOR_ASPECT * height))
        self.policy.reset(np.ones(len(joints_rad), bool))
        self.count, self.said, self.ways, self.controllers = 0, "", [], []
        self.streak = np.zeros(len(joints_rad), np.int64)  # see count_inside
        gain, floor = self.servo_gain or 1.0, 1.0 if self.servo_gain else GAIN_FLOOR
        for joints in joints_rad:
            controller = Controller(
                self.model, self.policy.firmware_p, BACKLASH_RAD, LATENCY_S, gain_factor=gain, gain_floor=floor,
                measured=self.reachable,
            )  # fmt: skip
            self.controllers.append(controller)
            far = self.start_at_home and np.abs(joints - HOME_RAD).max() > NEAR_HOME_RAD
            self.ways.append(way_from(controller) if far else None)
        if any(self.ways):
            log.info("the arm moves to the start pose first")

    def _next(self, way: Iterator[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray] | None]:
        """The next joint deltas (6,), rad, of a slow motion, and what is left of it; None at its end."""
        try:
            return next(way), way
        except StopIteration:
            return np.zeros(ACT_DIM), None
        except RobotError as error:
            log.warning("the arm goes on from where it is: %s", error)
            return np.zeros(ACT_DIM), None

    def _judge(self, acting: np.ndarray) -> None:
        """Let those of the acting arms, (N,) bool, rest whose sheet is seen inside the tape; say what is not seen."""
        self.streak[acting] = count_inside(self.streak, self.policy, self.tape_margin)[acting]
        trouble = self.policy.trouble
        for i in np.flatnonzero(acting & (self.streak >= SUCCESS_STEPS)):
            log.info("the sheet is seen inside the tape: the arm lifts, and rests until the next episode")
            self.ways[i] = way_up(self.controllers[i])
        if trouble and not self.said:
            log.warning("the base policy acts alone: %s", trouble)
        elif self.said and not trouble:
            log.info("the sheet is seen again: the residual acts, too")
        self.said = trouble
