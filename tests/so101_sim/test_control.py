"""The command law against a slow version, measurements, limits, the watchdog, and LeRobot's units."""

import json

import numpy as np
import pytest
from conftest import ROOT
from small_task import HOME_RAD, load_model

from so101_sim.control import (
    ACT_DIM,
    BACKLASH_RAD,
    COMMAND_WINDOW_RAD,
    JOINTS,
    UNITS,
    WATCHDOG_S,
    Calibration,
    Controller,
    from_rad,
    read_calibration,
    to_rad,
)
from so101_sim.errors import SO101Error

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model():
    return load_model()


def test_the_command_law_joint_by_joint(model):
    """The lag of a free arm is allowed, the torque against an obstacle is bounded, limits hold. Written as loops."""
    n = 50
    controller = Controller(model, firmware_p=64, backlash_rad=0.01, latency_s=0.05)
    gain, damping = 2 * model.actuator_gainprm[:, 0], model.dof_damping
    low, high = model.actuator_ctrlrange.T
    joints, velocity = RNG.uniform(low, high, (n, 6)), RNG.normal(0, 0.5, (n, 6))
    gravity, target = RNG.normal(0, 0.5, (n, 6)), RNG.uniform(low - 0.1, high + 0.1, (n, 6))
    target[:25] = joints[:25] + RNG.normal(0, 0.02, (25, 6))
    result = controller.limit(target, joints, velocity, gravity)
    within = 0
    for i in range(n):
        for j in range(ACT_DIM):
            free = joints[i, j] + gravity[i, j] / gain[j] + damping[j] / gain[j] * velocity[i, j]
            late = free + 0.05 * velocity[i, j]
            least = max(low[j], min(free, late) - COMMAND_WINDOW_RAD / 2 - 0.005)
            most = min(high[j], max(free, late) + COMMAND_WINDOW_RAD / 2 + 0.005)
            expected = min(max(target[i, j], least), most)
            within += expected == target[i, j]
            assert result[i, j] == pytest.approx(expected, abs=1e-12)
    assert 0 < within < n * ACT_DIM


def test_a_window_for_arms_that_may_be_weaker(model):
    """It is wider by what the weakest arm lags more, on the side of this lag; on the other side it is as ever."""
    gravity, velocity = np.array([[0.0, -0.6, 0.3, 0.0, 0.0, 0.0]]), np.array([[0.2, 0.0, 0.0, 0.0, -0.2, 0.0]])
    bounds = []  # lowest and highest targets (2, 6)
    for controller in (Controller(model), Controller(model, gain_floor=0.5)):
        targets = [controller.limit(np.full((1, 6), far), np.zeros((1, 6)), velocity, gravity) for far in (-1.0, 1.0)]
        bounds.append(np.concatenate(targets))
    lag = 0.6 * 0.2 / 17.8  # damping
    np.testing.assert_allclose(bounds[1][0] - bounds[0][0], [0, -0.6 / 17.8, 0, 0, -lag, 0], atol=1e-12)
    np.testing.assert_allclose(bounds[1][1] - bounds[0][1], [lag, 0, 0.3 / 17.8, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("firmware_p, gain_factor", [(8, 1.0), (16, 1.0), (16, 0.5), (32, 1.6)])
def test_the_torque_against_an_obstacle_does_not_depend_on_the_gain(model, firmware_p, gain_factor):
    controller = Controller(model, firmware_p=firmware_p, gain_factor=gain_factor)
    controller.measure(HOME_RAD, 0.0)
    for step in range(1, 20):
        controller.measure(HOME_RAD, step / 30)  # it does not move
        target = controller.move(np.full(6, 0.01), step / 30)
    torque = model.actuator_gainprm[:, 0] * gain_factor * firmware_p / 32 * (target - HOME_RAD) - controller.gravity_n_m
    np.testing.assert_allclose(torque, COMMAND_WINDOW_RAD * model.actuator_gainprm[:, 0], rtol=1e-6)


def test_an_arm_is_measured(model):
    """Its tip against the reference kinematics, its velocity in uniform motion; the first targets hold it in place."""
    with np.load(ROOT / "tests/data/so101_fk_reference.npz", allow_pickle=False) as data:
        joints, tips = data["qpos_rad"], data["gripperframe_pos_base_m"]
    controller = Controller(model)
    for q, tip in zip(joints[:100], tips):
        controller.reset()
        controller.measure(q, 1.0)
        assert np.linalg.norm(controller.tip_m - tip) < 1e-4
        hold = np.clip(q + controller.gravity_n_m / controller.gain, controller.low_rad, controller.high_rad)
        np.testing.assert_allclose(controller.command_rad, hold)
    velocity = RNG.normal(0, 0.3, 6)
    controller.reset()
    for step in range(4):
        controller.measure(HOME_RAD + velocity * step / 30, step / 30)
    np.testing.assert_allclose(controller.velocity_rad_s, velocity, atol=1e-9)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_gain_is_learned_from_an_arm_that_hangs(model, factor):
    """Exactly from a sag of gravity over gain and half of the backlash; a supported arm teaches nothing."""
    controller = Controller(model, firmware_p=16, backlash_rad=0.02, gain_floor=0.5)
    controller.measure(HOME_RAD, 0.0)
    lag = controller.gravity_n_m / (8.9 * factor) + 0.01 * np.sign(controller.gravity_n_m)
    controller.command_rad = HOME_RAD + lag
    controller.learn_gain()
    assert controller.gain_factor == pytest.approx(factor, rel=1e-6)
    np.testing.assert_allclose(controller.gain, 8.9 * factor)
    controller.reset()  # the next arm may be another
    assert controller.gain_factor == 1.0 and controller.gain_floor == 0.5

    supported = Controller(model, firmware_p=16, backlash_rad=0.02, gain_floor=0.5)
    supported.measure(HOME_RAD, 0.0)
    supported.command_rad = HOME_RAD - lag
    supported.learn_gain()
    assert supported.gain_factor == 1.0 and supported.gain_floor == 0.5


def test_targets_are_no_faster_than_allowed(model):
    controller = Controller(model, max_speed_rad_s=0.3, backlash_rad=BACKLASH_RAD)
    controller.measure(HOME_RAD, 0.0)
    before = controller.command_rad.copy()
    after = controller.move(np.array([1.0, -1.0, 1.0, -1.0, 1.0, 0.001]), 0.0)
    np.testing.assert_allclose((after - before)[:5], np.array([1, -1, 1, -1, 1]) * 0.3 / 30, atol=1e-12)
    assert after[5] - before[5] == pytest.approx(0.001)


@pytest.mark.parametrize(
    "delta", [np.full(6, np.nan), [0, 0, 0, 0, 0, np.inf], -np.inf, np.zeros((1, 6)), np.zeros(5), 0.01, None], ids=str
)
def test_no_target_for_deltas_that_are_not_six_finite_numbers(model, delta):
    controller = Controller(model)
    controller.measure(HOME_RAD, 0.0)
    before = controller.command_rad.copy()
    with pytest.raises(SO101Error, match="joint deltas must be 6 finite numbers, got"):
        controller.move(delta, 0.0)
    np.testing.assert_array_equal(controller.command_rad, before)


def test_no_target_without_a_fresh_measurement(model):
    controller = Controller(model)
    with pytest.raises(SO101Error, match="measurement of the arm never happened"):
        controller.move(np.zeros(6), 0.0)
    controller.measure(HOME_RAD, 10.0)
    controller.move(np.zeros(6), 10.0 + 0.9 * WATCHDOG_S)
    with pytest.raises(SO101Error, match="measurement of the arm was 110 ms ago"):
        controller.move(np.zeros(6), 10.0 + 1.1 * WATCHDOG_S)


@pytest.mark.parametrize(
    "joints, text",
    [
        (np.array([0, np.nan, 0, 0, 0, 0]), "check cables"),
        (np.array([0, 0, 0, 1.9, 0, 0]), "wrist_flex is 14 degrees outside"),
    ],
)
def test_impossible_measurements_are_errors(model, joints, text):
    with pytest.raises(SO101Error, match=text):
        Controller(model).measure(joints, 0.0)


@pytest.mark.parametrize("side", [-1, 1])
def test_an_arm_that_is_folded_beyond_its_limits_moves_in_from_there(model, side):
    """Its calibration says how far it may lie outside. Its targets stay within the window."""
    low, high = model.actuator_ctrlrange.T
    limit = (low if side < 0 else high)[1]
    ranges = Calibration(low - np.deg2rad(11), high + np.deg2rad(11))
    joints = np.zeros(6)
    joints[1] = limit + side * np.deg2rad(10)
    with pytest.raises(SO101Error, match="shoulder_lift is 10 degrees outside"):
        Controller(model).measure(joints, 0.0)
    controller = Controller(model, measured=ranges)
    for step in range(1000):
        controller.measure(joints, step / 30)
        target = controller.move(np.array([0, -0.02 * side, 0, 0, 0, 0.0]), step / 30)
        ahead = (
            target
            - joints
            - (controller.gravity_n_m + controller.damping * controller.velocity_rad_s) / controller.gain
        )
        assert np.abs(ahead).max() < COMMAND_WINDOW_RAD + 1e-9
        joints = joints + 0.5 * (target - controller.gravity_n_m / controller.gain - joints)
        if abs(joints[1]) < abs(limit) - 0.1:
            break
    else:
        raise AssertionError("it stays outside")


def test_a_calibration_file_of_lerobot(tmp_path):
    """-100 and 100 are the ends of the calibrated range; degrees count from its middle."""
    motors = {
        joint: {"id": i, "drive_mode": 0, "homing_offset": 7, "range_min": 2048 - 1150, "range_max": 2048 + 1150}
        for i, joint in enumerate(JOINTS)
    }
    motors["wrist_roll"] |= {"range_min": 0, "range_max": 4095}
    motors["gripper"] |= {"range_min": 2000, "range_max": 3138}  # 100.02 degrees
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(motors))
    ranges = read_calibration(path)
    end = to_rad(np.array([100.0, -100, 50, 0, 100, 0]), "norm", ranges)
    degrees = np.array([1150, -1150, 575, 0]) * 360 / 4096
    np.testing.assert_allclose(np.rad2deg(end[:4]), degrees)
    assert np.rad2deg(end[4]) == pytest.approx(180, abs=0.1) and end[5] == pytest.approx(-0.17453)
    opened = to_rad(np.array([0.0, 0, 0, 0, 0, 100]), "norm", ranges)[5] - end[5]
    assert np.rad2deg(opened) == pytest.approx(1138 * 360 / 4096)
    for unit in UNITS:
        np.testing.assert_allclose(to_rad(from_rad(HOME_RAD, unit, ranges), unit, ranges), HOME_RAD, atol=1e-12)

    # without a calibration the wrist roll has the range that LeRobot writes into every calibration
    for unit in ("norm", "deg"):
        probe = np.array([0.0, 0, 0, 0, 55, 0])
        assert to_rad(probe, unit)[4] == pytest.approx(to_rad(probe, unit, ranges)[4])
        assert from_rad(np.full(6, 0.7), unit)[4] == pytest.approx(from_rad(np.full(6, 0.7), unit, ranges)[4])


ENDS = {"range_min": 1000, "range_max": 3000}


@pytest.mark.parametrize(
    "content, words",
    [
        (json.dumps({joint: ENDS for joint in JOINTS if joint != "elbow_flex"}), "must have the joints"),
        (json.dumps({joint: ENDS for joint in (*JOINTS, "elbow_roll")}), "must have the joints"),
        (json.dumps({joint: {**ENDS, "drive_mode": 1} for joint in JOINTS}), "drive_mode 0"),
        (json.dumps({joint: {**ENDS, "range_max": 10**400} for joint in JOINTS}), "OverflowError"),
        (json.dumps({joint: {**ENDS, "range_max": 2000.5} for joint in JOINTS}), "whole numbers"),
        (json.dumps({joint: {**ENDS, "range_max": 9000} for joint in JOINTS}), "has a range of 703"),
        (json.dumps({joint: {**ENDS, "range_max": float("nan")} for joint in JOINTS}), "contains NaN"),
        (json.dumps({joint: ENDS for joint in JOINTS}).replace("}", ', "range_max": 3001}'), "'range_max' twice"),
        (json.dumps([ENDS] * 6), "AttributeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"a": "\udcff"}', "UnicodeDecodeError"),
        (None, "calibrate the arm first"),
    ],
)
def test_what_is_no_calibration_is_an_error(tmp_path, content, words):
    path = tmp_path / "arm.json"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    with pytest.raises(SO101Error, match=words) as error:
        read_calibration(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_units_to_radians(model):
    low, high = model.actuator_ctrlrange.T
    limited = [0, 1, 2, 3, 5]  # LeRobot measures their range, and assumes a full turn for the wrist roll
    for end, limit, roll in (([-100.0] * 5 + [0.0], low, -180), ([100.0] * 6, high, 180)):
        joints = to_rad(np.array([end]), "norm")[0]
        np.testing.assert_allclose(joints[limited], limit[limited])
        assert np.rad2deg(joints[4]) == pytest.approx(roll, abs=0.1)
    # LeRobot keeps the gripper in 0 to 100 even where the joints are in degrees
    expected = [*np.deg2rad([0.0, 90, -90, 45, 10]), (low[5] + high[5]) / 2]
    np.testing.assert_allclose(to_rad(np.array([[0.0, 90, -90, 45, 10, 50]]), "deg")[0], expected)
    for unit in UNITS:
        np.testing.assert_allclose(from_rad(to_rad(np.full(6, 3.0), unit), unit), np.full(6, 3.0))
