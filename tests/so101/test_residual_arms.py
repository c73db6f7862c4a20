"""A residual and its base on arms with a camera, in virtual time: what LeRobot's policy of this project does."""

import logging

import numpy as np
import pytest
from conftest import ROOT

from so101.base import BasePolicy
from so101.loop import HOME_SPEED_RAD_S, REST_RAD
from so101.residual_arms import ResidualArms, SeenResidual
from so101.simulated_arm import SimulatedArm
from so101_env import HOME_RAD, TAPE_MARGIN_M, Task, sheet_inside
from so101_sim.control import ACT_DIM
from so101_sim.errors import SO101Error
from so101_sim.scene import CONTROL_HZ, Renderer

pytest.importorskip("cv2")
onnx = pytest.importorskip("so101.onnx")

SEED, TASK = 1_530_000_000, Task(firmware_p=16)


class Table:
    """A simulated arm with its camera, in virtual time."""

    def __init__(self, seed: int, start_rad: np.ndarray = HOME_RAD):
        self.arm, self.dark = SimulatedArm(TASK), False
        self.arm.reset(seed, start_rad)
        self.painter = Renderer(self.arm.model, (240, 320), fast=True)

    def see(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        image = self.painter.render(self.arm.qpos, "top", None)
        return self.arm.joints_rad, {"top": image * (not self.dark), "wrist": image}

    def move(self, target_rad: np.ndarray) -> None:
        self.arm.command(target_rad)
        for _ in range(round(1 / CONTROL_HZ / self.arm.timestep_s)):
            self.arm.step()


def step(arms: ResidualArms, tables: list[Table]) -> np.ndarray:
    """One control step of the arms; returns their targets (N, 6), rad."""
    seen = [table.see() for table in tables]
    images = {name: np.stack([pictures[name] for _, pictures in seen]) for name in ("top", "wrist")}
    targets = arms.step(np.array([joints for joints, _ in seen]), images)
    for table, target in zip(tables, targets):
        table.move(target)
    return targets


def make_arms(base: BasePolicy | None = None, **options) -> ResidualArms:
    residual = onnx.OnnxPolicy(str(ROOT / "assets" / "arm.onnx"))
    if base is not None:
        residual.base = base
    policy = SeenResidual(residual)
    if base is not None:
        policy.cameras = ("top", *base.cameras)
    policy.firmware_p = 16
    return ResidualArms(policy, TAPE_MARGIN_M, **options)


def test_a_folded_arm_goes_home_slides_the_sheet_and_rests(caplog):
    caplog.set_level(logging.INFO)
    table, arms, joints, moving = Table(SEED, REST_RAD), make_arms(), [], []
    for _ in range(600):
        step(arms, [table])
        joints.append(table.arm.joints_rad)
        moving.append(arms.ways[0] is not None)
    speeds, home = np.abs(np.diff(joints, axis=0)).max(1) * CONTROL_HZ, moving.index(False)
    assert home > 100 and np.abs(joints[home] - HOME_RAD).max() < 0.1 and speeds[:home].max() < 1.5 * HOME_SPEED_RAD_S
    assert table.arm.truth()["inside"] and arms.streak[0] == 5
    assert arms.controllers[0].tip_m[2] > 0.03 and speeds[-30:].max() < 0.05  # above the sheet, at rest
    said = [record.message for record in caplog.records if record.name == "so101.residual_arms"]
    assert "start pose" in said[0] and "inside the tape" in said[-1]


class Sweeper(BasePolicy):
    """A base policy that sees through the wrist camera, and turns the pan joint."""

    cameras, image_size = ("wrist",), (32, 48)

    def __init__(self):
        self.shapes, self.residuals = set(), []

    def act(self, obs, mask):
        self.shapes.add(obs["observation.images.wrist"].shape)
        self.residuals.append(obs["residual"].copy())
        return np.tile(0.004 * np.eye(ACT_DIM)[0], (len(mask), 1))


def test_where_the_sheet_is_not_seen_the_base_acts_alone_and_says_so(caplog):
    base, table = Sweeper(), Table(SEED)
    arms, targets = make_arms(base, start_at_home=False), []

    def commands(dark: bool, steps: int) -> np.ndarray:
        table.dark = dark
        return np.array([step(arms, [table])[0] for _ in range(steps)])

    blind = commands(dark=True, steps=6)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "red tape" in caplog.records[0].message
    np.testing.assert_allclose(np.diff(blind, axis=0)[:, 0], 0.004, atol=1e-6)  # the base's
    assert np.abs(np.diff(blind, axis=0)[:, 1:]).max() < 1e-6 and not np.any(base.residuals)
    seen = commands(dark=False, steps=3)
    assert np.abs(np.diff(seen, axis=0)[:, 1:]).max() > 1e-3 and arms.policy.trouble == ""  # the residual's, too
    targets = commands(dark=True, steps=40)  # the last pose is used for a second
    assert np.abs(np.diff(targets[:29], axis=0)[:, 1:]).max() > 1e-3
    assert not arms.policy.base.residual.any() and "acts alone" in caplog.records[-1].message
    assert base.shapes == {(1, 32, 48, 3)}  # pictures in its own size


def test_an_arm_in_a_batch_is_told_what_it_is_told_alone():
    def targets(seeds: list[int]) -> np.ndarray:
        tables, arms = [Table(seed) for seed in seeds], make_arms()
        return np.array([step(arms, tables) for _ in range(25)])

    both, alone = targets([SEED, SEED + 1]), [targets([SEED + k])[:, 0] for k in range(2)]
    np.testing.assert_array_equal(both[:, 0], alone[0])
    np.testing.assert_array_equal(both[:, 1], alone[1])
    assert not np.array_equal(alone[0], alone[1])


def test_joints_that_no_calibrated_arm_has_are_refused():
    joints, image = HOME_RAD.copy(), np.zeros((1, 240, 320, 3), np.uint8)
    joints[2] += 3.0
    with pytest.raises(SO101Error, match="elbow_flex is .* degrees outside its range: calibrate the arm"):
        make_arms().step(joints[None], {"top": image})


@pytest.mark.parametrize("shape, size", [((480, 640), (240, 320)), ((720, 1280), (240, 320)), ((96, 96), (96, 96))])
def test_pictures_of_any_size_reach_the_locator_in_its_own(shape, size):
    arms = make_arms()
    arms.step(HOME_RAD[None], {"top": np.zeros((1, *shape, 3), np.uint8)})
    assert arms.policy.image_size == size


def test_sheets_are_found_in_small_square_pictures():
    """LeRobot's environment has 96 x 96 pixels by default."""
    table, arms = Table(SEED), make_arms()
    table.painter = Renderer(table.arm.model, (96, 96), fast=True)
    step(arms, [table])
    pose, truth = arms.policy.estimate[0], table.arm.truth()["sheet"]
    assert np.linalg.norm(pose[:2] - truth[:2]) < 0.004 and not sheet_inside(pose[None, :2], pose[2:], 0.04)[0]
